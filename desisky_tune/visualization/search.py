"""Figures of a search: how it went, what mattered, how the best trials learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from desisky_tune.data.columns import BANDS
from desisky_tune.search.hyperparameters import in_full
from desisky_tune.search.pareto import pareto_front
from desisky_tune.visualization.panels import INK, panel
from desisky_tune.visualization.style import BAND_COLOURS, GUIDE, TRAIN
from desisky_tune.visualization.winner import band_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from desisky_tune.search.importance import Importance
    from desisky_tune.search.records import TrialRecord

#: What axes call the hyperparameters.
HYPERPARAMETERS: Mapping[str, str] = {
    "width": "Hidden width [units]",
    "depth": "Depth [hidden layers]",
    "learning_rate": "Learning rate",
    "huber_delta": "Huber delta [mag]",
    "batch_size": "Batch size [rows]",
    "schedule": "Schedule of the rate",
    "warmup": "Warm-up [share of the steps]",
    "final_rate": "Final rate [share of the highest]",
    "weight_decay": "Weight decay",
    "gradient_clip": "Longest gradient (0: any)",
    "early_stopping": "Patience [epochs] (0: none)",
}
RMSE = "Validation RMSE [mag]"

#: Objectives that span more than this factor are drawn on a logarithmic axis.
_LOGARITHMIC_BEYOND = 2.0
#: Colours of the best trials' curves, the winner first.
_CURVES = (INK, "#0072b2", "#d55e00", "#009e73", "#882255")

Space = Mapping[str, Any]


def plot_history(records: Sequence[TrialRecord]) -> Figure:
    """Draw the objective of each trial by number, and the best complete one so far."""
    with panel() as figure:
        axes = figure.subplots()
        _trials(axes, records, [record.number for record in records])
        numbers, best = [], []
        lowest = np.inf
        for record in sorted(records, key=lambda each: each.number):
            if record.state == "COMPLETE" and record.objective is not None:
                lowest = min(lowest, record.objective)
            if np.isfinite(lowest):
                numbers.append(record.number)
                best.append(lowest)
        axes.step(numbers, best, where="post", color=BAND_COLOURS["r"], label="best so far")
        axes.set(xlabel="Trial", ylabel=RMSE)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _scale(axes, [r.objective for r in records if r.objective is not None])
        _legend_above(axes)
    return figure


def plot_parallel_coordinates(records: Sequence[TrialRecord], space: Space) -> Figure:
    """Draw each complete trial as a line through its hyperparameters and its objective.

    The axes lie above one another, the largest value to the right. The winner is bold, the
    best quarter coloured.

    Parameters
    ----------
    records
        The trials.
    space
        Entries of the space file by name.
    """
    complete = [record for record in records if record.state == "COMPLETE"]
    names = _searched(space)
    objectives = np.array([float(record.objective or np.nan) for record in complete])
    rows = [
        _unit([in_full(record.configuration)[name] for record in complete], space[name])
        for name in names
    ]
    rows.append(_unit(objectives, {}))
    places = np.array([row[0] for row in rows])
    order = np.argsort(-objectives, kind="stable")
    leading = set(order[-max(len(order) // 4, 1) :].tolist())
    with panel(0.62 * len(rows) + 0.4) as figure:
        axes = figure.subplots()
        levels = np.arange(len(rows))[::-1]
        for index in order:
            best = index == order[-1]
            colour = INK if best else BAND_COLOURS["r"] if index in leading else GUIDE
            axes.plot(
                places[:, index],
                levels,
                color=colour,
                linewidth=2.2 if best else 0.9,
                alpha=1.0 if best else 0.8,
            )
        backed: Any = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.0}}
        titles = [*(HYPERPARAMETERS.get(name, name) for name in names), RMSE]
        for level, title, (_, low, high) in zip(levels, titles, rows, strict=True):
            axes.text(0.5, level + 0.1, title, ha="center", va="bottom", fontsize=8.5, **backed)
            axes.plot([0, 1], [level, level], color=GUIDE, linewidth=0.8, zorder=0)
            axes.text(-0.03, level, _plain(low), ha="right", va="center", fontsize=8)
            axes.text(1.03, level, _plain(high), ha="left", va="center", fontsize=8)
        axes.set(xlim=(-0.17, 1.17), ylim=(-0.3, len(rows) - 0.45))
        axes.axis("off")
    return figure


def plot_importance(importances: Sequence[Importance]) -> Figure:
    """Draw the importance of each hyperparameter with its 16-84 % range."""
    with panel(0.42 * len(importances) + 0.9) as figure:
        axes = figure.subplots()
        ordered = list(reversed(importances))
        values = np.array([each.value for each in ordered])
        spread = np.array(
            [
                [max(each.value - each.low, 0.0) for each in ordered],
                [max(each.high - each.value, 0.0) for each in ordered],
            ]
        )
        labels = [HYPERPARAMETERS.get(each.name, each.name).split(" [")[0] for each in ordered]
        axes.barh(labels, values, xerr=spread, color=TRAIN, ecolor=INK, capsize=3, height=0.6)
        axes.set(xlabel="Importance (PED-ANOVA, sum 1)", xlim=(0, 1))
        axes.grid(axis="y", visible=False)
    return figure


def plot_slice(records: Sequence[TrialRecord], name: str, space: Space) -> Figure:
    """Draw the objective of each trial against one hyperparameter."""
    with panel(2.8) as figure:
        axes = figure.subplots()
        values = [in_full(record.configuration)[name] for record in records]
        choices = space[name].get("choices")
        if choices:
            places = _stops(choices, values)
            values = [float(places.index(value)) for value in values]
            axes.set_xticks(range(len(places)), [_plain(place) for place in places])
        elif space[name].get("log"):
            axes.set_xscale("log")
            if min(values, default=1) <= 0:
                values = _off_aside(values, space[name])
                below = axes.get_xaxis_transform()
                axes.text(
                    min(values), -0.04, "off", transform=below, ha="center", va="top", fontsize=8
                )
            low, high = min(space[name]["low"], *values), max(space[name]["high"], *values)
            axes.set_xlim(low / (high / low) ** 0.04, high * (high / low) ** 0.04)
            axes.xaxis.set_major_locator(
                LogLocator(subs=(1.0,) if high > 50 * low else (1.0, 2.0, 5.0))
            )
            axes.xaxis.set_minor_formatter(NullFormatter())
            _plain_log(axes.xaxis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=name in ("width", "depth")))
        _trials(axes, records, values)
        axes.set(xlabel=HYPERPARAMETERS.get(name, name), ylabel=RMSE)
        _scale(axes, [r.objective for r in records if r.objective is not None])
        _legend_above(axes)
    return figure


def plot_best_curves(records: Sequence[TrialRecord]) -> Figure:
    """Draw the validation RMSE (mean of the bands) by epoch of the best trials, best first."""
    with panel() as figure:
        axes = figure.subplots()
        shown: list[float] = []
        for colour, record in reversed(list(zip(_CURVES, records, strict=False))):
            bands = [record.curve.get(band, []) for band in BANDS]
            mean = np.mean(np.array(bands, dtype=float), axis=0)
            axes.plot(np.arange(1, len(mean) + 1), mean, color=colour, linewidth=0.7)
            best = record.best_epoch or 0
            axes.plot([best + 1], [mean[best]], "o", color=colour, label=f"trial {record.number}")
            shown += mean[np.isfinite(mean)].tolist()
        axes.set(xlabel="Epochs trained", ylabel=RMSE)
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
        _scale(axes, shown)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], title="best epoch of")
    return figure


def plot_winner_curves(winner: TrialRecord, loss: str, v_derived: bool) -> Figure:
    """Draw the winner's losses, and its RMSE by band, by epoch; `loss` names the loss."""
    with panel(4.4) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        epochs = np.arange(1, winner.epochs + 1)
        for name, title, colour in (
            ("train_loss", "training", TRAIN),
            ("test_loss", "validation", INK),
        ):
            series = winner.curve.get(name, [])
            above.plot(epochs[: len(series)], series, color=colour, linewidth=1.0, label=title)
        above.set(ylabel=f"{loss} loss [mag²]", yscale="log")
        above.legend()
        for band in BANDS:
            series = winner.curve.get(band, [])
            below.plot(
                epochs[: len(series)],
                series,
                color=BAND_COLOURS[band],
                linewidth=1.0,
                label=band_name(band, v_derived),
            )
        for axes in (above, below):
            axes.axvline((winner.best_epoch or 0) + 1, color=GUIDE, linestyle="--", linewidth=1)
        below.set(xlabel="Epochs trained", ylabel=RMSE, xscale="log")
        _plain_log(below.xaxis)
        _scale(below, [v for band in BANDS for v in winner.curve.get(band, [])])
        below.legend(ncols=2)
    return figure


def plot_rungs(records: Sequence[TrialRecord]) -> Figure:
    """Draw each trial's best RMSE so far at the rungs it reached; a cross where it was pruned."""
    with panel() as figure:
        axes = figure.subplots()
        shown: list[float] = []
        for record in records:
            if not record.rungs:
                continue
            epochs, values = list(record.rungs), list(record.rungs.values())
            complete = record.state == "COMPLETE"
            axes.plot(
                epochs,
                values,
                color=BAND_COLOURS["g"] if complete else GUIDE,
                linewidth=0.9,
                marker=".",
                markersize=4,
                zorder=3 if complete else 2,
            )
            if record.state == "PRUNED":
                axes.plot(epochs[-1:], values[-1:], "x", color=BAND_COLOURS["r"], zorder=4)
            shown += values
        axes.plot([], [], color=BAND_COLOURS["g"], marker=".", label="complete")
        axes.plot([], [], color=GUIDE, marker=".", label="pruned")
        axes.plot([], [], "x", color=BAND_COLOURS["r"], label="stopped here")
        axes.set(xlabel="Epochs trained", ylabel="Best RMSE so far [mag]", xscale="log")
        ticks = sorted({epochs for record in records for epochs in record.rungs})
        if len(ticks) <= 8:
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        _scale(axes, shown)
        _legend_above(axes)
    return figure


def plot_pareto(records: Sequence[TrialRecord]) -> Figure:
    """Draw the RMSE of the complete trials against their number of weights, and the front."""
    complete = [each for each in records if each.state == "COMPLETE"]
    front = pareto_front(records)
    with panel() as figure:
        axes = figure.subplots()
        _trials(axes, complete, [record.parameters for record in complete])
        axes.step(
            [record.parameters for record in front],
            [float(record.objective or np.nan) for record in front],
            where="post", marker="o", markersize=7, markerfacecolor="none",
            color=BAND_COLOURS["r"], label="Pareto front",
        )  # fmt: skip
        axes.set(xlabel="Weights and biases", ylabel=RMSE, xscale="log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        if max(r.parameters for r in complete) < 20 * min(r.parameters for r in complete):
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        _scale(axes, [r.objective for r in complete if r.objective is not None])
        _legend_above(axes)
    return figure


def searched_names(space: Space) -> list[str]:
    """Return the hyperparameters of a space that are searched, in its order."""
    return _searched(space)


def _searched(space: Space) -> list[str]:
    return [name for name, entry in space.items() if isinstance(entry, Mapping)]


def _trials(axes: Axes, records: Sequence[TrialRecord], places: Sequence[float]) -> None:
    """Draw a point per trial: full where complete, hollow where pruned, a tick where failed."""
    styles: dict[str, dict[str, Any]] = {
        "PRUNED": {"facecolors": "none", "edgecolors": GUIDE, "label": "pruned (best so far)"},
        "COMPLETE": {"color": BAND_COLOURS["g"], "label": "complete"},
    }
    for state, style in styles.items():
        chosen = [
            (place, record.objective)
            for place, record in zip(places, records, strict=True)
            if record.state == state and record.objective is not None
        ]
        if chosen:
            x, y = zip(*chosen, strict=True)
            axes.scatter(x, y, s=22, **style)
    failed = [
        place for place, record in zip(places, records, strict=True) if record.state == "FAIL"
    ]
    if failed:
        axes.plot(
            failed,
            np.full(len(failed), 0.98),
            "x",
            color=BAND_COLOURS["r"],
            transform=axes.get_xaxis_transform(),
            label="failed",
        )


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Draw values that span a wide range on a logarithmic axis, with plain numbers."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if len(finite) and finite.min() > 0 and finite.max() > _LOGARITHMIC_BEYOND * finite.min():
        axes.set_yscale("log")
        wide = finite.max() > 30 * finite.min()
        subs = (1.0,) if wide else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_log(axis: Any) -> None:
    axis.set_major_formatter("{x:g}")


def _legend_above(axes: Axes) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2, columnspacing=1.0,
        handletextpad=0.4,
    )  # fmt: skip


def _stops(choices: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Return the places of a list of choices: numbers in rising order, words as they stand."""
    found = dict.fromkeys([*choices, *values])
    words = any(isinstance(each, str) for each in found)
    return list(found) if words else sorted(found)


def _off_aside(values: Sequence[float], entry: Mapping[str, Any]) -> list[float]:
    """Put a 0, which means off, a little to the left of a logarithmic range."""
    aside = float(entry["low"]) * (float(entry["low"]) / float(entry["high"])) ** 0.1
    return [float(value) if value > 0 else aside for value in values]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _unit(values: Any, entry: Mapping[str, Any]) -> tuple[np.ndarray, Any, Any]:
    """Place values between 0 and 1 on an axis of the space; return its ends too."""
    choices = entry.get("choices")
    if choices:
        stops = _stops(choices, list(values))
        places = np.array([stops.index(value) for value in values]) / max(len(stops) - 1, 1)
        return places, stops[0], stops[-1]
    if entry.get("log") and min(values, default=1) <= 0:
        values = _off_aside(values, entry)
        places, _, high = _unit(values, entry)
        return places, "off", high
    numbers = np.asarray(values, dtype=float)
    low = min(float(entry.get("low", numbers.min())), float(numbers.min()))
    high = max(float(entry.get("high", numbers.max())), float(numbers.max()))
    if high <= low:
        return np.full(len(numbers), 0.5), low, high
    if entry.get("log"):
        return np.log(numbers / low) / np.log(high / low), low, high
    return (numbers - low) / (high - low), low, high
