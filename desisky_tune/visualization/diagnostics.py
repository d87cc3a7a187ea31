"""How far a model's predictions lie from the observations, band by band.

A residual is prediction minus observation: positive where the model takes the sky for too dark.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS
from desisky_tune.errors import InputError
from desisky_tune.inference import apply_model
from desisky_tune.visualization.style import (
    GUIDE,
    MAGNITUDE_UNIT,
    OUTLIER,
    TEST,
    TRAIN,
    check_save_path,
    label,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Against which column residuals are drawn: the first of these that the metadata hold.
_AGAINST = ("PWV_los", "TRANSPARENCY_GFA")
#: And by which the points are coloured.
_COLOURED_BY = ("MOONSEP", "MOONALT", "MOONFRAC")


@dataclass(frozen=True)
class _Part:
    """Observed and predicted magnitudes of one band, for training or for test rows."""

    name: str
    colour: str
    observed: np.ndarray
    predicted: np.ndarray

    @property
    def residual(self) -> np.ndarray:
        return self.predicted - self.observed

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean(self.residual**2)))

    @property
    def summary(self) -> str:
        residual = self.residual
        middle = np.median(residual)
        nmad = 1.4826 * np.median(np.abs(residual - middle))
        bias = round(float(residual.mean()), 3) + 0.0  # no -0.000
        return f"$n$ = {len(residual)}\nRMSE {self.rmse:.3f}\nbias {bias:+.3f}\nNMAD {nmad:.3f}"


def plot_broadband_band_panel(
    model: Any,
    X_train: np.ndarray,
    y_train: np.ndarray,
    X_test: np.ndarray,
    y_test: np.ndarray,
    band_idx: int,
    band_name: str,
    *,
    figsize: tuple[float, float] = (12, 10),
    save_path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw predictions and residuals of one band, training rows above test rows.

    Left, prediction against observation; right, the distribution of residuals. The guides lie at
    the test rows' RMSE in all four panels: that of the training rows flatters.

    Parameters
    ----------
    model
        Maps one input `(f,)` to magnitudes `(4,)`.
    X_train, X_test
        Inputs `(n, f)`, in the model's order.
    y_train, y_test
        Observed magnitudes `(n, 4)` in V, g, r, z.
    band_idx
        Column of the magnitudes: 0 V, 1 g, 2 r, 3 z.
    band_name
        What titles and axes call the band.
    figsize
        Inches.
    save_path
        PNG, SVG or PDF by suffix; `None` saves nothing.

    Returns
    -------
    matplotlib.figure.Figure
        Four axes, 2 x 2.

    Raises
    ------
    InputError
        When there is no such band, no row with finite numbers, or the suffix is unknown.
    """
    check_save_path(save_path)
    parts = [
        _part("Training", TRAIN, model, X_train, y_train, band_idx)[0],
        _part("Test", TEST, model, X_test, y_test, band_idx)[0],
    ]
    rmse = parts[1].rmse
    with new_figure(figsize) as figure:
        axes = figure.subplots(2, 2, sharex="col")
        for row, part in zip(axes, parts, strict=True):
            _draw_predictions(row[0], part, band_name, parts, rmse, f"±{rmse:.3f} mag (test RMSE)")
            _draw_histogram(row[1], part, parts, rmse, f"±{rmse:.3f} mag")
        _name_columns_once(axes)
        figure.suptitle(f"{band_name} band: prediction and residual")
        save_figure(figure, save_path)
    return figure


def plot_nn_outlier_analysis(
    model: Any,
    X_train: np.ndarray,
    y_train: np.ndarray,
    meta_train: Any,
    X_test: np.ndarray,
    y_test: np.ndarray,
    meta_test: Any,
    *,
    band_idx: int = 0,
    outlier_mag: float = 0.40,
    xlim: tuple[float, float] | None = None,
    figsize: tuple[float, float] = (28, 12),
    save_path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw six panels that show which exposures a model gets wrong in one band.

    Training rows above, test rows below. From the left: residual against the transparency (or
    the water vapour, where the metadata hold PWV_los), coloured by the Moon's separation;
    prediction against observation; the distribution of residuals. Exposures with a residual
    beyond `outlier_mag` are squares, and counted.

    Parameters
    ----------
    model
        Maps one input `(f,)` to magnitudes `(4,)`.
    X_train, X_test
        Inputs `(n, f)`, in the model's order.
    y_train, y_test
        Observed magnitudes `(n, 4)` in V, g, r, z.
    meta_train, meta_test
        Tables (or mappings of columns) with a row per exposure.
    band_idx
        Column of the magnitudes: 0 V, 1 g, 2 r, 3 z.
    outlier_mag
        Residuals beyond are outliers (mag).
    xlim
        Limits of the leftmost panels' x axis; by default all points.
    figsize
        Inches.
    save_path
        PNG, SVG or PDF by suffix; `None` saves nothing.

    Returns
    -------
    matplotlib.figure.Figure
        Six axes, 2 x 3 (and the colour bar's).

    Raises
    ------
    InputError
        When there is no such band, no row with finite numbers, no column to draw against, or
        the suffix is unknown.
    """
    check_save_path(save_path)
    if not outlier_mag > 0:
        raise InputError(f"outlier_mag is {outlier_mag}; a positive number of magnitudes is needed")
    against = _first_column(_AGAINST, meta_train, meta_test)
    if against is None:
        raise InputError(f"the metadata hold none of {', '.join(_AGAINST)} to draw against")
    colour_by = _first_column(_COLOURED_BY, meta_train, meta_test)
    train, used_train = _part("Training", TRAIN, model, X_train, y_train, band_idx)
    test, used_test = _part("Test", TEST, model, X_test, y_test, band_idx)
    parts = [train, test]
    x = [_column(meta_train, against, used_train), _column(meta_test, against, used_test)]
    colours = None
    if colour_by is not None:
        colours = [
            _column(meta_train, colour_by, used_train),
            _column(meta_test, colour_by, used_test),
        ]
    band = BANDS[band_idx]
    guide = f"±{outlier_mag:g} mag"
    with new_figure(figsize) as figure:
        axes = figure.subplots(2, 3, sharex="col")
        points = _draw_residuals(axes[:, 0], parts, x, colours, outlier_mag, guide)
        for row, part in zip(axes, parts, strict=True):
            _draw_predictions(row[1], part, band, parts, outlier_mag, guide, mark_outliers=True)
            _draw_histogram(row[2], part, parts, outlier_mag, guide, shade=True)
        axes[1, 0].set_xlabel(label(against))
        _name_columns_once(axes)
        if xlim is not None:
            axes[0, 0].set_xlim(*xlim)
        if points is not None and colour_by is not None:
            bar = figure.colorbar(points, ax=axes[:, 0], pad=0.015, aspect=40)
            bar.set_label(label(colour_by))
            bar.outline.set_visible(False)
        figure.suptitle(f"{band} band: exposures with a residual beyond {outlier_mag:g} mag")
        save_figure(figure, save_path)
    return figure


def _part(
    name: str, colour: str, model: Any, inputs: np.ndarray, targets: np.ndarray, band_idx: int
) -> tuple[_Part, np.ndarray]:
    """One band of one set of rows, and which rows had finite numbers."""
    observed = np.asarray(targets, dtype=float)
    if observed.ndim != 2 or not 0 <= band_idx < observed.shape[1]:
        raise InputError(f"band_idx is {band_idx}; the targets have the shape {observed.shape}")
    predicted = apply_model(model, np.asarray(inputs))
    if len(predicted) != len(observed):
        raise InputError(
            f"{name.lower()} rows: {len(predicted)} inputs and {len(observed)} targets"
        )
    observed, predicted = observed[:, band_idx], predicted[:, band_idx]
    used = np.isfinite(observed) & np.isfinite(predicted)
    if not used.any():
        raise InputError(f"{name.lower()} rows: none has a finite observation and prediction")
    return _Part(name, colour, observed[used], predicted[used]), used


def _first_column(names: Sequence[str], *tables: Any) -> str | None:
    return next((name for name in names if all(name in table for table in tables)), None)


def _column(table: Any, name: str, used: np.ndarray) -> np.ndarray:
    values = np.asarray(table[name], dtype=float)
    if len(values) != len(used):
        raise InputError(f"metadata column {name}: {len(values)} values for {len(used)} rows")
    return values[used]


def _draw_residuals(
    axes: Sequence[Axes],
    parts: Sequence[_Part],
    x: Sequence[np.ndarray],
    colours: Sequence[np.ndarray] | None,
    outlier_mag: float,
    guide: str,
) -> Any:
    """Draw residuals against `x`, both parts on the same scales; return the coloured points."""
    reach = _reach(parts, outlier_mag)
    everything = np.concatenate(colours) if colours is not None else np.zeros(1)
    everything = everything[np.isfinite(everything)]
    points = None
    for ax, part, abscissa, row in zip(axes, parts, x, (0, 1), strict=True):
        style: dict[str, Any] = {"color": part.colour}
        if colours is not None and len(everything):
            style = {"cmap": "viridis", "vmin": everything.min(), "vmax": everything.max()}
        outlying = np.abs(part.residual) > outlier_mag
        for chosen, marker in ((~outlying, _POINT), (outlying, _SQUARE)):
            shade = {"c": colours[row][chosen]} if "cmap" in style and colours is not None else {}
            drawn = ax.scatter(abscissa[chosen], part.residual[chosen], **style, **shade, **marker)
            points = drawn if "cmap" in style else points
        _guides(ax, outlier_mag, guide, horizontal=True)
        # Named by a proxy: the squares in the plot have a colour each.
        count = f"{outlying.sum()} of {len(outlying)} beyond"
        ax.scatter([], [], facecolor="none", **_SQUARE, label=count)
        ax.set(ylim=(-reach, reach), ylabel="Residual [mag]", title=f"{part.name}: residual")
        ax.legend(loc="upper left")
    return points


#: Marker styles of ordinary exposures and of outliers.
_POINT: dict[str, Any] = {"s": 28, "alpha": 0.7, "linewidths": 0}
_SQUARE: dict[str, Any] = {
    "s": 40,
    "marker": "s",
    "edgecolors": OUTLIER,
    "linewidths": 0.9,
}


def _draw_predictions(
    ax: Axes,
    part: _Part,
    band: str,
    parts: Sequence[_Part],
    half_width: float,
    guide: str,
    *,
    mark_outliers: bool = False,
) -> None:
    """Draw prediction against observation; all parts share their limits."""
    values = np.concatenate([np.concatenate([p.observed, p.predicted]) for p in parts])
    pad = max(0.04 * np.ptp(values), 0.1)
    limits = (values.min() - pad, values.max() + pad)
    outlying = (np.abs(part.residual) > half_width) & mark_outliers
    ordinary = {"color": part.colour, **_POINT, "alpha": 0.55}
    ax.scatter(part.observed[~outlying], part.predicted[~outlying], **ordinary)
    if mark_outliers:
        squares = {"facecolors": part.colour, **_SQUARE, "alpha": 0.8}
        ax.scatter(part.observed[outlying], part.predicted[outlying], **squares)
    ax.axline((limits[0], limits[0]), slope=1, color=OUTLIER, linewidth=1.2)
    for sign in (1, -1):
        ax.axline(
            (limits[0], limits[0] + sign * half_width),
            slope=1,
            color=GUIDE,
            linewidth=1.2,
            linestyle="--",
            label=guide if sign > 0 else None,
        )
    ax.set(
        xlim=limits,
        ylim=limits,
        xlabel=f"Observed {band} [{MAGNITUDE_UNIT}]",
        ylabel=f"Predicted {band} [{MAGNITUDE_UNIT}]",
        title=f"{part.name}: prediction",
    )
    ax.legend(loc="upper left")


def _draw_histogram(
    ax: Axes,
    part: _Part,
    parts: Sequence[_Part],
    half_width: float,
    guide: str,
    *,
    shade: bool = False,
) -> None:
    """Draw the distribution of residuals; all parts share their bins."""
    reach = _reach(parts, half_width)
    bins = np.linspace(-reach, reach, 61).tolist()
    ax.hist(part.residual, bins=bins, color=part.colour, alpha=0.85)
    _guides(ax, half_width, guide, horizontal=False)
    text = part.summary
    if shade:
        beyond = float(np.mean(np.abs(part.residual) > half_width))
        text += f"\nbeyond {half_width:g}: {100 * beyond:.1f} %"
        for low, high in ((-reach, -half_width), (half_width, reach)):
            ax.axvspan(low, high, color=GUIDE, alpha=0.12, linewidth=0)
    ax.text(0.98, 0.96, text, transform=ax.transAxes, ha="right", va="top", linespacing=1.4)
    ax.set(
        xlim=(-reach, reach),
        xlabel="Residual [mag] (prediction - observation)",
        ylabel="Exposures",
        title=f"{part.name}: residuals",
    )
    ax.legend(loc="upper left")


def _name_columns_once(axes: np.ndarray) -> None:
    """Panels of a column share their x axis: the lowest one names it."""
    for ax in axes[:-1].flat:
        ax.set_xlabel("")


def _guides(ax: Axes, half_width: float, guide: str, *, horizontal: bool) -> None:
    line = ax.axhline if horizontal else ax.axvline
    line(0.0, color=OUTLIER, linewidth=1.2)
    line(half_width, color=GUIDE, linewidth=1.2, linestyle="--", label=guide)
    line(-half_width, color=GUIDE, linewidth=1.2, linestyle="--")


def _reach(parts: Sequence[_Part], half_width: float) -> float:
    """How far a symmetric residual axis goes: no point is left outside."""
    largest = max(float(np.abs(part.residual).max()) for part in parts)
    return max(1.06 * largest, 2.0 * half_width, 1e-3)
