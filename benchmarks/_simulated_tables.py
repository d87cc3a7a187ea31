"""The tables of `simulated_selection.py`, made of its lines: one for each draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from _selecting import mean_interval, t_interval

from desisky_tune.data.columns import BANDS

#: What the truth is asked about, in the order of the table.
LABELS: Mapping[str, str] = {
    "ensemble": "ensemble of the best finalists' members, with the classical model's voice",
    "committee": "committee with the classical model's voice; what is exported",
    "networks": "committee without it: one training a fold, of the best finalists in turn",
    "winner": "finalists' winner, fitted to all rows with 5 seeds",
    "default": "documented default, fitted to all rows with 5 seeds",
    "default_mean": "documented default, the mean of one training a fold",
    "oracle_fit": "oracle's configuration, fitted to all rows with 5 seeds",
    "oracle": "oracle: best trial on the truth",
    "winner_trial": "finalists' winner, its trial of the search",
    "single": "best single validation score",
    "default_trial": "documented default, its trial of the search",
    "middle": "the middle trial: no choice at all",
}
#: Of all rows, and so compared with the oracle's configuration fitted to all rows, too.
FITTED = ("ensemble", "committee", "networks", "winner", "default", "default_mean")

#: How a promise is called, what promised, what came of it, and the same of the documented
#: default, which nobody chose.
PROMISES: Sequence[tuple[str, str, str, tuple[str, str] | None]] = (
    (
        "best single validation score, its trial",
        "single",
        "single",
        ("default_trial", "default_trial"),
    ),
    (
        "committee, as exported",
        "committee",
        "committee",
        ("default_folds", "default_mean"),
    ),
    (
        "committee without the classical model's voice",
        "networks",
        "networks",
        ("default_folds", "default_mean"),
    ),
    (
        "finalists' winner, fitted to all rows with 5 seeds",
        "winner_folds",
        "winner",
        ("default_folds", "default"),
    ),
    (
        "finalists' winner, its trainings on folds",
        "winner_folds",
        "winner_folds",
        ("default_folds", "default_folds"),
    ),
    ("documented default, its trial", "default_trial", "default_trial", None),
    ("documented default, fitted to all rows with 5 seeds", "default_folds", "default", None),
    ("documented default, its trainings on folds", "default_folds", "default_folds", None),
)


def report(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    if not lines:
        return "no draw is complete yet"
    parts: tuple[Callable[..., str], ...] = (regret_table, optimism_table, coverage_table)
    return "\n\n".join([head(lines, settings), *(part(lines) for part in parts)])


def head(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Return what the tables were made of."""
    from desisky_tune.data.simulated_table import CONSTANTS_NOTE

    rows = {
        name: f"{min(line['rows'][name] for line in lines)}-"
        f"{max(line['rows'][name] for line in lines)}"
        for name in lines[0]["rows"]
    }
    noise = np.array([line["noise"] for line in lines]).mean(axis=0)
    spent = sum(line["seconds"] for line in lines)
    by_name = ", ".join(f"{band} {value:.3f}" for band, value in zip(BANDS, noise, strict=True))
    return (
        f"{len(lines)} draws of {rows['exposures']} exposures of {rows['nights']} nights "
        f"({rows['validation']} of {rows['validation_nights']} nights to choose on); truth: "
        f"{rows['truth']} exposures of {rows['truth_nights']} nights of another season. "
        f"{settings['trials']} trials, {settings['finalists']} finalists on {settings['folds']} "
        f"folds x {settings['seeds']} seeds, {settings['epochs']} epochs; {spent:.0f} s of "
        f"processes. Noise (mag): {by_name}, mean {noise.mean():.3f}. Note: {CONSTANTS_NOTE}."
    )


def regret_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """RMSE on the truth, and regret against the oracle's pick."""
    rows = [
        "RMSE on the truth (mag, mean of V g r z, ± standard deviation over the draws), and "
        "regret: minus that of the oracle's trial, and minus that of the oracle's "
        "configuration fitted to all rows, paired; in brackets 95 % t intervals over the draws:",
        "",
        "| | truth | regret | regret, fitted to all rows |",
        "|---|---|---|---|",
    ]
    for name, label in LABELS.items():
        on_truth = means(lines, name)
        cells = [f"{on_truth.mean():.4f} ± {spread_of(on_truth)}"]
        cells += [regret(lines, name, "oracle")]
        cells += [regret(lines, name, "oracle_fit") if name in FITTED else ""]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def regret(lines: Sequence[Mapping[str, Any]], name: str, oracle: str) -> str:
    """Return a model's regret as text; nothing for the oracle itself."""
    if name == oracle:
        return ""
    values = differences(lines, name, oracle)
    return f"{values.mean():+.4f} [{t_interval(values)}]"


def spread_of(values: np.ndarray) -> str:
    """Return a standard deviation as text."""
    return f"{values.std(ddof=1):.4f}" if len(values) > 1 else "-"


def optimism(lines: Sequence[Mapping[str, Any]], promise: str, model: str) -> np.ndarray:
    """Return what came minus what was promised, the mean of the bands, by draw."""
    return means(lines, model) - promises(lines, promise)


def promises(lines: Sequence[Mapping[str, Any]], promise: str) -> np.ndarray:
    """Return what was promised, the mean of the bands, by draw."""
    return np.array([np.mean(line["promised"][promise]) for line in lines])


def optimism_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """What came minus what the selection promised."""
    rows = [
        "Optimism (mag, mean of V g r z): RMSE on the truth minus the RMSE that was promised. "
        "That of the documented default, which was not chosen, is the luck of the nights; beyond "
        "it, paired by draw, is what choosing did. A single configuration's promise is that of "
        "single trainings; what 5 seeds together would have promised is lower, and their optimism "
        "larger than shown. 95 % t intervals over the draws:",
        "",
        "| | promised | came | optimism | over draws | beyond the default's | over draws |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, promise, model, reference in PROMISES:
        gap = optimism(lines, promise, model)
        cells = [f"{promises(lines, promise).mean():.4f}", f"{means(lines, model).mean():.4f}"]
        cells += [f"{gap.mean():+.4f}", t_interval(gap)]
        if reference is None:
            cells += ["", ""]
        else:
            beyond = gap - optimism(lines, *reference)
            cells += [f"{beyond.mean():+.4f}", t_interval(beyond)]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def coverage_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """How often the ensemble's 90 % interval holds the truth."""
    rows = [
        "Coverage (%) of the ensemble's 90 % interval on the truth, with 95 % t intervals over "
        "the draws, and the least and the most of a draw; half the interval's width (mag); what "
        "`coverage_90` said of it on the folds; beside it an interval that is calibrated as if "
        "every exposure were a night of its own:",
        "",
        "| | covered | over draws | least and most | half width | said on the folds "
        "| by exposures: covered | over draws | half width |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    every = (*((band, [place]) for place, band in enumerate(BANDS)), ("all", [*range(len(BANDS))]))
    for label, columns in every:

        def by_draw(name: str, chosen: list[int] = columns) -> np.ndarray:
            return np.array([line[name] for line in lines])[:, chosen].mean(axis=1)

        inside, other = 100 * by_draw("covered"), 100 * by_draw("covered_by_rows")
        rows.append(
            f"| {label} | {share(inside)} | {inside.min():.1f} to {inside.max():.1f} | "
            f"{by_draw('half_width').mean():.3f} | {100 * by_draw('stated').mean():.1f} | "
            f"{share(other)} | {by_draw('half_width_by_rows').mean():.3f} |"
        )
    return "\n".join(rows)


def share(values: np.ndarray) -> str:
    """Return a mean (%) and its 95 % t interval as two cells."""
    low, high = mean_interval(values)
    return f"{values.mean():.1f} | {low:.1f} to {high:.1f}"


def differences(lines: Sequence[Mapping[str, Any]], one: str, other: str) -> np.ndarray:
    """Return one model's RMSE on the truth minus another's, the mean of the bands, by draw."""
    return means(lines, one) - means(lines, other)


def means(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Return a model's RMSE on the truth, the mean of the bands, by draw."""
    return np.array([np.mean(line["models"][name]) for line in lines])
