"""How the loss went, epoch by epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import LogLocator

from desisky_tune.errors import InputError
from desisky_tune.visualization.style import TEST, TRAIN, check_save_path, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Losses that span more than this factor are drawn on a logarithmic axis.
_LOGARITHMIC_BEYOND = 10.0


def plot_loss_curve(
    train_losses: Sequence[float],
    test_losses: Sequence[float],
    *,
    title: str = "Loss Curve",
    figsize: tuple[float, float] = (12, 5),
    save_path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the training and the test loss by epoch, and mark the best epoch.

    Parameters
    ----------
    train_losses, test_losses
        One value per epoch, counted from 0; NaN (an epoch without validation) leaves a gap that
        the line spans.
    title
        Above the axes.
    figsize
        Inches.
    save_path
        PNG, SVG or PDF by suffix; `None` saves nothing.

    Returns
    -------
    matplotlib.figure.Figure
        One axes.

    Raises
    ------
    InputError
        When there is no loss to draw, or the suffix is unknown.
    """
    check_save_path(save_path)
    curves = {
        "Training loss": (np.asarray(train_losses, dtype=float), TRAIN),
        "Test loss": (np.asarray(test_losses, dtype=float), TEST),
    }
    values = np.concatenate([losses[np.isfinite(losses)] for losses, _ in curves.values()])
    if not len(values):
        raise InputError("no finite loss to draw: both curves are empty or NaN")
    with new_figure(figsize) as figure:
        axes = figure.subplots()
        for name, (losses, colour) in curves.items():
            epochs = np.flatnonzero(np.isfinite(losses))
            axes.plot(epochs, losses[epochs], color=colour, label=name)
        test = curves["Test loss"][0]
        if np.isfinite(test).any():
            best = int(np.nanargmin(np.where(np.isfinite(test), test, np.nan)))
            text = f"Best: {test[best]:.4g} at epoch {best}"
            style = {"marker": "o", "linestyle": "none", "color": TEST, "markersize": 7}
            axes.plot([best], [test[best]], markeredgecolor="white", label=text, **style)  # type: ignore[arg-type]
        if values.min() > 0 and values.max() > _LOGARITHMIC_BEYOND * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.set(xlabel="Epoch", ylabel="Loss", title=title)
        axes.margins(x=0.01)
        axes.legend(loc="upper right")
        save_figure(figure, save_path)
    return figure
