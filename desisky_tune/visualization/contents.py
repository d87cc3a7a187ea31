"""What the page of a report says in words and tables, from a run's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, EXPOSURE_ID, NIGHT
from desisky_tune.search.hyperparameters import in_full
from desisky_tune.search.leaderboard import finalist_rows, finalists_board, leaderboard
from desisky_tune.search.space import resolved_dict, rungs
from desisky_tune.training.metrics import band_metrics
from desisky_tune.visualization.search import HYPERPARAMETERS
from desisky_tune.visualization.style import NAMES, UNITS

if TYPE_CHECKING:
    from desisky_tune.search.loaded import LoadedRun
    from desisky_tune.search.records import TrialRecord
    from desisky_tune.visualization.winner import Predictions

#: Rows of the table of all trials; the command `leaderboard --all` lists any number.
MOST_ROWS = 300
#: Units of the finalists' board, by heading; the others have none.
FINALIST_UNITS = {
    **dict.fromkeys(("RMSE", "± nights", "to best", "±", *BANDS, "delta", "± seeds"), "mag"),
    **{"width": "units", "depth": "layers", "batch": "rows", "best": "epoch"},
}
#: Eclipsed exposures that are listed one by one.
MOST_ECLIPSED = 20


def board(run: LoadedRun) -> list[dict[str, Any]]:
    """Return the rows of the leaderboard, best first; what is not known is None."""
    table = leaderboard(run.records).head(MOST_ROWS).astype(object)
    return [
        {str(key): None if value != value or value is None else value for key, value in row.items()}
        for row in table.where(table.notna(), None).to_dict("records")
    ]


def finalists(run: LoadedRun, v_derived: bool) -> dict[str, Any] | None:
    """Return headings and rows of the finalists' board, the winner first; None without one."""
    ranked = finalists_board(run.path)
    if ranked is None:
        return None
    headings, rows = finalist_rows(ranked)
    units = [FINALIST_UNITS.get(name) for name in headings]
    if v_derived:
        headings[headings.index("V")] = "V (derived)"
    return {"headings": list(zip(headings, units, strict=True)), "rows": rows}


def facts(run: LoadedRun) -> dict[str, Any]:
    """What was searched, on which data and split."""
    assert run.evaluation is not None
    data, split = run.search["data"], run.search["split"]
    return {
        "created": str(run.search.get("created", "")).replace("T", " ").replace("+00:00", " UTC"),
        "source": data.get("source"),
        "file": Path(str(data.get("path", ""))).name,
        "subset": data.get("subset"),
        "eclipse": data.get("eclipse"),
        "rows_read": data.get("rows_read"),
        "removed": {k: v for k, v in (data.get("removed") or {}).items() if v},
        "fingerprint": str(data.get("fingerprint", ""))[:16],
        "features": [
            (name, NAMES.get(name, name), UNITS.get(name)) for name in run.spec.data.features
        ],
        "split_by": split["by"],
        "split_seed": split["seed"],
        "parts": [
            (part, run.evaluation["rows"][part], run.evaluation["nights"][part])
            for part in ("train", "validation", "test")
        ],
        "versions": run.search.get("versions", {}),
        "pretrain": run.evaluation.get("pretrain"),
        "committee": run.evaluation.get("final_fit", {}).get("committee"),
    }


def space(run: LoadedRun) -> list[tuple[str, str, Any]]:
    """Each hyperparameter: its name, what was searched, the winner's value."""
    assert run.winner is not None
    rows = []
    for name, entry in resolved_dict(run.spec)["space"].items():
        if not isinstance(entry, Mapping):
            text = f"{_value(entry)} (fixed)"
        elif "choices" in entry:
            text = ", ".join(map(_value, entry["choices"]))
        else:
            text = f"{entry['low']:g} to {entry['high']:g}"
            text += ", logarithmic" if entry.get("log") else ""
        if isinstance(entry, Mapping) and "when" in entry:
            text += f" when {entry['when']}, else {_value(entry['otherwise'])}"
        title = HYPERPARAMETERS.get(name, name)
        rows.append((title, text, in_full(run.winner.configuration)[name]))
    return rows


def _value(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def rung_counts(run: LoadedRun) -> list[dict[str, int]]:
    """How many trials reached each rung, and how many were stopped there."""
    pruned = [record for record in run.records if record.state == "PRUNED"]
    return [
        {
            "epochs": at,
            "reached": sum(record.epochs >= at for record in run.records),
            "stopped": sum(record.epochs == at for record in pruned),
        }
        for at in rungs(run.spec)
    ]


def eclipse(data: Predictions, run: LoadedRun) -> dict[str, Any]:
    """The eclipsed validation rows apart from the others."""
    eclipsed = data.eclipsed
    result: dict[str, Any] = {
        "rows": int(eclipsed.sum()),
        "computed": run.search["data"].get("eclipse") != "none",
        "parts": {},
        "exposures": [],
    }
    if not eclipsed.any():
        return result
    for title, chosen in (("eclipsed", eclipsed), ("not eclipsed", ~eclipsed)):
        if chosen.any():
            result["parts"][title] = {
                name: band_metrics(predicted[chosen], data.observed[chosen])
                for name, predicted in (("winner", data.winner), ("classical", data.classical))
            }
    frame = data.frame
    for row in np.flatnonzero(eclipsed)[:MOST_ECLIPSED]:
        result["exposures"].append(
            {
                "expid": int(frame[EXPOSURE_ID].iloc[row]),
                "night": int(frame[NIGHT].iloc[row]),
                "fraction": float(frame["ECLIPSE_FRAC"].iloc[row]),
                "residuals": {
                    "winner": (data.winner[row] - data.observed[row]).tolist(),
                    "classical": (data.classical[row] - data.observed[row]).tolist(),
                },
            }
        )
    return result


def cost(run: LoadedRun) -> dict[str, Any]:
    """Return trials, epochs and seconds by state, and how busy the devices were."""
    records = run.records
    sessions = list(run.search.get("sessions", []))
    seconds = sorted(record.seconds for record in records)
    side_by_side, under_way = occupation(records)
    return {
        "states": [
            (
                state,
                sum(record.state == state for record in records),
                sum(record.epochs for record in records if record.state == state),
                sum(record.seconds for record in records if record.state == state),
            )
            for state in ("COMPLETE", "PRUNED", "FAIL")
        ],
        "trials": len(records),
        "planned": run.spec.search.trials,
        "epochs": sum(record.epochs for record in records),
        "full_epochs": len(records) * run.spec.training.epochs,
        "seconds": sum(seconds),
        "median_seconds": float(np.median(seconds)) if seconds else 0.0,
        "sessions": max(len(sessions), len(list((run.path / "tune").glob("session-*")))),
        "wall": sum(float(session["seconds"]) for session in sessions),
        "cpus": run.spec.resources.cpus_per_trial,
        "gpus": run.spec.resources.gpus_per_trial,
        "side_by_side": side_by_side,
        "under_way": under_way,
        "device_share": sum(seconds) / (under_way * side_by_side) if under_way else None,
    }


def occupation(records: Sequence[TrialRecord]) -> tuple[int, float]:
    """Return how many trials were under way at a time, and how long any was.

    Returns
    -------
    most
        The largest number of trials under way at one moment.
    seconds
        Length of the union of the trials' times: pauses between sessions do not count.
    """
    # At one moment an end comes before a start: a place that is taken over is one place.
    moments = sorted(
        moment
        for record in records
        if record.ended > record.started
        for moment in ((record.started, 1), (record.ended, -1))
    )
    most, now, began, seconds = 0, 0, 0.0, 0.0
    for at, change in moments:
        if now == 0:
            began = at
        now += change
        most = max(most, now)
        if now == 0:
            seconds += at - began
    return most, seconds
