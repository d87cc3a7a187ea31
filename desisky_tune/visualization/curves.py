"""How the loss went, epoch by epoch."""

from __future__ import annotations

import math
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
        One value per epoch, counted from 0. Fewer test than training losses are those of every
        k-th epoch (``validate_every``), the first included. NaN leaves a gap that the line spans.
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
    train, test = _finite_curve(train_losses, 1), _finite_curve(test_losses, 1)
    if len(test_losses) < len(train_losses) and len(test_losses):
        test = _finite_curve(test_losses, math.ceil(len(train_losses) / len(test_losses)))
    values = np.concatenate([train[1], test[1]])
    if not len(values):
        raise InputError("no finite loss to draw: both curves are empty or NaN")
    with new_figure(figsize) as figure:
        axes = figure.subplots()
        axes.plot(*train, color=TRAIN, label="Training loss")
        axes.plot(*test, color=TEST, label="Test loss")
        if len(test[1]):
            best = int(np.argmin(test[1]))
            epoch, loss = test[0][best], test[1][best]
            axes.plot(
                [epoch],
                [loss],
                marker="o",
                linestyle="none",
                color=TEST,
                markersize=7,
                markeredgecolor="white",
                label=f"Best: {loss:.4g} at epoch {epoch}",
            )
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


def _finite_curve(losses: Sequence[float], every: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs that have a number, and the numbers."""
    values = np.asarray(losses, dtype=float)
    finite = np.flatnonzero(np.isfinite(values))
    return finite * every, values[finite]
