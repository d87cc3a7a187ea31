"""Figures of a winner on its validation rows, the classical model beside it.

A residual is prediction minus observation: positive where the model takes the sky for too
dark. Magnitudes are AB mag per square arcsecond.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, NIGHT
from desisky_tune.visualization.panels import INK, panel, rasterized
from desisky_tune.visualization.style import BAND_COLOURS, GUIDE, TRAIN, label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAGNITUDE = "AB mag arcsec⁻²"

#: Nights beyond which their names no longer fit under an axis.
_MOST_NAMED_NIGHTS = 24

#: What the models of an evaluation are called, in the order in which they are drawn.
MODELS: Mapping[str, str] = {
    "winner": "winner",
    "alone": "winner's configuration alone",
    "default": "documented default",
    "ensemble": "ensemble",
    "classical": "classical model",
    "constant": "constant",
    "trees": "boosted trees",
}


@dataclass(frozen=True)
class Predictions:
    """Observed and predicted magnitudes of the same rows.

    Attributes
    ----------
    frame
        The exposures.
    observed, winner, classical
        Magnitudes V, g, r, z, (n, 4).
    v_derived
        True where V was derived from g and r, not observed.
    """

    frame: pd.DataFrame
    observed: np.ndarray
    winner: np.ndarray
    classical: np.ndarray
    v_derived: bool

    @property
    def eclipsed(self) -> np.ndarray:
        """Which rows were taken while a part of the Moon was in the umbra, (n,)."""
        if "ECLIPSE_FRAC" not in self.frame:
            return np.zeros(len(self.frame), dtype=bool)
        return self.frame["ECLIPSE_FRAC"].to_numpy(dtype=float) > 0

    def band_name(self, band: str) -> str:
        """Return what a band is called: a derived V is called so."""
        return band_name(band, self.v_derived)


def band_name(band: str, v_derived: bool) -> str:
    """Return what a band is called: a derived V is called so."""
    return "V (derived)" if band == "V" and v_derived else band


def plot_comparison(
    figures: Mapping[str, Mapping[str, Any]],
    v_derived: bool,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Figure:
    """Draw the RMSE by band of each model on validation (full) and test rows (hollow).

    Parameters
    ----------
    figures
        Of an evaluation: model -> part -> band -> RMSE (mag).
    v_derived
        True where V was derived from g and r.
    intervals
        Model -> band -> ends (mag) on the validation rows, drawn as bars.
    """
    shown = [(name, title) for name, title in MODELS.items() if name in figures]
    named = (BAND_COLOURS[band] for band in ("g", "V", "r"))
    colours = (INK, TRAIN, *named, GUIDE, BAND_COLOURS["z"])
    by_model = dict(zip(MODELS, colours, strict=True))
    offsets = np.linspace(-0.27, 0.27, len(shown))
    with panel(3.6) as figure:
        axes = figure.subplots()
        for (name, title), offset in zip(shown, offsets, strict=True):
            colour = by_model[name]
            styles: tuple[tuple[str, dict[str, Any]], ...] = (
                ("validation", {"color": colour, "label": title}),
                ("test", {"color": "none", "markeredgecolor": colour}),
            )
            for part, style in styles:
                values = [figures[name][part][band] for band in BANDS]
                axes.plot(np.arange(len(BANDS)) + offset, values, "o", markersize=6, **style)
            for place, band in enumerate(BANDS):
                if band in (intervals or {}).get(name, {}):
                    axes.plot(
                        [place + offset] * 2, (intervals or {})[name][band], color=colour,
                        linewidth=1, zorder=1.5,
                    )  # fmt: skip
        axes.plot([], [], "o", color="none", markeredgecolor=INK, label="test rows: hollow")
        axes.set_xticks(range(len(BANDS)), [band_name(band, v_derived) for band in BANDS])
        axes.set(ylabel="RMSE [mag]", xlabel="Band")
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        _legend_above(axes, 2)
    return figure


def plot_predictions(data: Predictions, band: str) -> Figure:
    """Draw prediction against observation in one band; eclipsed rows are diamonds."""
    index = BANDS.index(band)
    observed, winner, classical = (
        each[:, index] for each in (data.observed, data.winner, data.classical)
    )
    eclipsed = data.eclipsed
    name = data.band_name(band)
    with panel(4.2) as figure:
        axes = figure.subplots()
        quick = rasterized(len(observed))
        # A classical prediction that is far off would squeeze everything else into a corner.
        values = np.concatenate([observed, winner])
        pad = max(0.06 * np.ptp(values), 0.1)
        limits = (values.min() - pad, values.max() + pad)
        outside = int(((classical < limits[0]) | (classical > limits[1])).sum())
        beside = f"classical model ({outside} outside)" if outside else "classical model"
        axes.scatter(
            observed, classical, s=16, facecolors="none", edgecolors=GUIDE, linewidths=0.8,
            label=beside, rasterized=quick,
        )  # fmt: skip
        axes.scatter(
            observed[~eclipsed], winner[~eclipsed], s=16, color=BAND_COLOURS[band], alpha=0.8,
            linewidths=0, label="winner", rasterized=quick,
        )  # fmt: skip
        if eclipsed.any():
            axes.scatter(
                observed[eclipsed], winner[eclipsed], s=30, marker="D", color=INK,
                linewidths=0, label="winner, Moon eclipsed",
            )  # fmt: skip
        axes.axline((limits[0], limits[0]), slope=1, color=INK, linewidth=1)
        axes.set(
            xlim=limits,
            ylim=limits,
            aspect="equal",
            xlabel=f"Observed {name} [{MAGNITUDE}]",
            ylabel=f"Predicted {name} [{MAGNITUDE}]",
        )
        _legend_above(axes, 3 if not eclipsed.any() else 2)
    return figure


def plot_residuals_against(data: Predictions, feature: str) -> Figure:
    """Draw the residuals of each band against one feature.

    Classical residuals beyond the winner's range are triangles at the edge; the winner's
    of eclipsed rows are diamonds.
    """
    values, eclipsed = data.frame[feature].to_numpy(dtype=float), data.eclipsed

    def draw(axes: Axes, band: str, winner: np.ndarray, classical: np.ndarray) -> None:
        quick = rasterized(len(values))
        low, high = axes.get_ylim()
        inside = (classical > low) & (classical < high)
        for far, edge, marker in ((classical >= high, high, "^"), (classical <= low, low, "v")):
            axes.plot(
                values[far], np.full(far.sum(), 0.96 * edge), marker, color=GUIDE, markersize=4
            )
        axes.scatter(
            values[inside], classical[inside], s=9, facecolors="none", edgecolors=GUIDE,
            linewidths=0.6, rasterized=quick,
        )  # fmt: skip
        axes.scatter(
            values, winner, s=9, color=BAND_COLOURS[band], alpha=0.85, linewidths=0,
            rasterized=quick,
        )  # fmt: skip
        axes.scatter(values[eclipsed], winner[eclipsed], s=22, marker="D", color=INK, linewidths=0)

    return _four_bands(data, draw, label(feature))


def plot_residuals_by_night(data: Predictions) -> Figure:
    """Draw each night's median residual in each band with its 16-84 % range."""
    nights = data.frame[NIGHT].to_numpy()
    names = sorted(set(nights.tolist()))
    groups = [np.flatnonzero(nights == night) for night in names]
    places = np.arange(len(names))
    with panel(6.4) as figure:
        rows = figure.subplots(len(BANDS), 1, sharex=True)
        for index, (axes, band) in enumerate(zip(rows, BANDS, strict=True)):
            for predicted, colour, offset in (
                (data.classical, GUIDE, 0.16),
                (data.winner, BAND_COLOURS[band], -0.16),
            ):
                residual = predicted[:, index] - data.observed[:, index]
                low, middle, high = np.array(
                    [np.percentile(residual[group], [16, 50, 84]) for group in groups]
                ).T
                axes.errorbar(
                    places + offset, middle, yerr=[middle - low, high - middle], fmt="o",
                    markersize=4, color=colour, linewidth=1,
                )  # fmt: skip
            axes.axhline(0, color=INK, linewidth=0.9)
            axes.set_title(data.band_name(band), pad=2)
        few = len(names) <= _MOST_NAMED_NIGHTS
        step = 1 if few else -(-len(names) // _MOST_NAMED_NIGHTS)
        rows[-1].set_xticks(places[::step], [_date(night) for night in names[::step]], rotation=90)
        rows[-1].set_xlabel("Night")
        figure.supylabel("Residual [mag]", fontsize=9, color=INK)
    return figure


def plot_distributions(data: Predictions) -> Figure:
    """Draw the distribution of magnitudes in each band: observed, winner, classical."""
    with panel(4.4) as figure:
        grid = figure.subplots(2, 2)
        for index, (axes, band) in enumerate(zip(grid.flat, BANDS, strict=True)):
            series = [each[:, index] for each in (data.observed, data.winner, data.classical)]
            _histograms(axes, series, BAND_COLOURS[band])
            axes.set_xlabel(f"{data.band_name(band)} [{MAGNITUDE}]")
        for axes in grid[:, 0]:
            axes.set_ylabel("Exposures")
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def plot_colours(data: Predictions) -> Figure:
    """Draw the colours g-r and r-z: one against the other, and their distributions."""
    places = [BANDS.index(band) for band in ("g", "r", "z")]

    def colours(magnitudes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        g, r, z = magnitudes[:, places].T
        return g - r, r - z

    observed, winner, classical = map(colours, (data.observed, data.winner, data.classical))
    quick = rasterized(len(data.observed))
    with panel(6.0) as figure:
        grid = figure.subplot_mosaic([["both", "both"], ["gr", "rz"]], height_ratios=[1.7, 1])
        above = grid["both"]
        for values, style in (
            (classical, {"facecolors": "none", "edgecolors": GUIDE, "label": "classical model"}),
            (observed, {"color": INK, "linewidths": 0, "label": "observed"}),
            (winner, {"color": BAND_COLOURS["r"], "linewidths": 0, "label": "winner"}),
        ):
            above.scatter(*values, s=14, alpha=0.85, rasterized=quick, **style)
        limits = [_limits(observed[axis], winner[axis]) for axis in (0, 1)]
        above.set(xlim=limits[0], ylim=limits[1], xlabel="g - r [mag]", ylabel="r - z [mag]")
        _legend_above(above, 3)
        for index, name in enumerate(("gr", "rz")):
            axes = grid[name]
            series = [each[index] for each in (observed, winner, classical)]
            _histograms(axes, series, BAND_COLOURS["r"])
            axes.set(xlabel=("g - r [mag]", "r - z [mag]")[index])
        grid["gr"].set_ylabel("Exposures")
    return figure


def _four_bands(
    data: Predictions,
    draw: Callable[[Axes, str, np.ndarray, np.ndarray], None],
    xlabel: str,
) -> Figure:
    """Draw the residuals of the four bands in four axes with one scale."""
    winner, classical = data.winner - data.observed, data.classical - data.observed
    # Set by the winner: a classical prediction that is far off would flatten the rest.
    reach = 1.15 * max(np.abs(winner).max(), np.percentile(np.abs(classical), 90), 0.05)
    with panel(3.9) as figure:
        grid = figure.subplots(2, 2, sharex=True, sharey=True)
        for index, (axes, band) in enumerate(zip(grid.flat, BANDS, strict=True)):
            axes.set_ylim(-reach, reach)
            draw(axes, band, winner[:, index], classical[:, index])
            axes.axhline(0, color=INK, linewidth=0.9)
            axes.set_title(data.band_name(band), pad=2)
        figure.supxlabel(xlabel, fontsize=9, color=INK)
        figure.supylabel("Residual [mag]", fontsize=9, color=INK)
    return figure


def _histograms(axes: Axes, series: Sequence[np.ndarray], colour: str) -> None:
    observed, winner, classical = series
    bins = np.histogram_bin_edges(observed, bins="auto")
    low, high = _limits(observed, winner)
    count = int(np.clip((high - low) / max(bins[1] - bins[0], 1e-3), 8, 40))
    edges = np.linspace(low, high, count + 1)
    axes.hist(observed, bins=edges.tolist(), color=GUIDE, alpha=0.45, label="observed")
    for predicted, line, style, title in (
        (winner, colour, "-", "winner"),
        (classical, INK, ":", "classical model"),
    ):
        axes.hist(
            predicted, bins=edges.tolist(), histtype="step", color=line, linestyle=style,
            linewidth=1.4, label=title,
        )  # fmt: skip


def _limits(*series: np.ndarray) -> tuple[float, float]:
    """Return the limits of an axis that shows all of these."""
    values = np.concatenate(series)
    pad = max(0.05 * float(np.ptp(values)), 0.05)
    return float(values.min()) - pad, float(values.max()) + pad


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2,
        columnspacing=1.0, handletextpad=0.3,
    )  # fmt: skip


def _date(night: int) -> str:
    text = str(int(night))
    return f"{text[:4]}-{text[4:6]}-{text[6:]}" if len(text) == 8 else text
