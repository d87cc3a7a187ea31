"""The leaderboard: the trials of a search, the best first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from desisky_tune.data.columns import BANDS
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.hyperparameters import HYPERPARAMETERS, OPTIONAL, in_full, switched_on
from desisky_tune.search.pareto import pareto_front
from desisky_tune.search.records import Ledger, TrialRecord

#: Bands that were observed; V is derived from g and r where a source has none.
OBSERVED_BANDS: tuple[str, ...] = ("g", "r", "z")

#: Columns of a leaderboard, in order.
COLUMNS: tuple[str, ...] = (
    "rank",
    "trial",
    "state",
    "objective",
    *BANDS,
    "mean_grz",
    "width",
    "depth",
    "learning_rate",
    "huber_delta",
    "batch_size",
    *OPTIONAL,
    "parameters",
    "pareto",
    "epochs",
    "best_epoch",
    "seconds",
    "reason",
)

_ORDER = {"COMPLETE": 0, "PRUNED": 1, "FAIL": 2}
_WHOLE = (
    "width", "depth", "batch_size", "early_stopping", "parameters", "epochs", "best_epoch",
)  # fmt: skip
_REAL = (
    "learning_rate", "huber_delta", "warmup", "final_rate", "weight_decay", "gradient_clip",
    "seconds",
)  # fmt: skip
#: What a table on a terminal calls the optional hyperparameters.
_TITLES = dict(
    zip(OPTIONAL, ("schedule", "warmup", "final", "decay", "clip", "patience"), strict=True)
)


def leaderboard(run: str | Path | Iterable[TrialRecord]) -> pd.DataFrame:
    """Rank the trials of a search.

    Parameters
    ----------
    run
        A run's folder, or records.

    Returns
    -------
    DataFrame
        One row per trial with `COLUMNS`: the complete ones by objective (lowest RMSE on
        the validation rows first; a tie goes to fewer parameters, then the lower number),
        then the pruned ones likewise, then the failed ones with their reasons. RMSE in
        mag; ``mean_grz`` is the mean of g, r and z alone; ``pareto`` is true of a complete
        trial that no other beats in RMSE and weights; epochs count from 0.

    Raises
    ------
    RunError
        When there is no run, or its ledger is damaged.
    """
    if isinstance(run, str | Path):
        records = Ledger(RunFolder.open(run).ledger).records()
    else:
        records = list(run)
    ordered = sorted(records, key=_place)
    front = {record.number for record in pareto_front(records)}
    rows = [
        {**_row(rank, record), "pareto": record.number in front}
        for rank, record in enumerate(ordered, start=1)
    ]
    board = pd.DataFrame(rows, columns=list(COLUMNS))
    kinds = {
        **dict.fromkeys(("rank", "trial", *_WHOLE), "Int64"),
        **dict.fromkeys(("objective", *BANDS, "mean_grz", *_REAL), "float64"),
        **dict.fromkeys(("state", "schedule", "reason"), "object"),
        "pareto": "boolean",
    }
    return board.astype(kinds)


#: Columns of the finalists' board, in order.
FINALIST_COLUMNS: tuple[str, ...] = (
    "rank",
    "trial",
    "objective",
    "standard_error",
    "difference",
    "difference_error",
    "tied",
    *BANDS,
    "width",
    "depth",
    "learning_rate",
    "huber_delta",
    "batch_size",
    *OPTIONAL,
    "parameters",
    "best_epoch",
    "seed_spread",
)


def finalists_board(run: str | Path) -> pd.DataFrame | None:
    """Return the finalists of a run, the winner first; None where none were ranked.

    Returns
    -------
    DataFrame
        `FINALIST_COLUMNS`. RMSE in mag, over the training and validation rows, each
        predicted by trainings on the other folds: ``objective`` the mean of the bands and
        seeds, ``standard_error`` over nights, ``difference`` to the lowest and its error
        over the same nights, ``tied`` where it lies within that error, ``seed_spread`` the
        standard deviation over the seeds. ``trial`` is the search's (missing for a
        documented default that the search did not try).
    """
    path = RunFolder.open(run).evaluation
    ranked = json.loads(path.read_text()).get("finalists") if path.exists() else None
    if ranked is None:
        return None
    rows = [{**each, **in_full(each["configuration"]), **each["rmse"]} for each in ranked]
    board = pd.DataFrame(rows, columns=list(FINALIST_COLUMNS))
    return board.astype({"trial": "Int64", "seed_spread": "float64"})


def finalist_rows(board: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return a finalists' board as text for a table on a terminal.

    Optional hyperparameters are shown where they are on in some row.
    """
    shown = switched_on(_values(board))
    header = ["#", "trial", "RMSE", "± nights", "to best", "±", *BANDS, "width", "depth", "lr",
              "delta", "batch", *(_TITLES[name] for name in shown), "parameters", "best",
              "± seeds"]  # fmt: skip
    forms = ("d", "d", ".4f", ".4f", ".4f", ".4f", *[".4f"] * len(BANDS), "d", "d", ".3g", ".3g",
             "d", *(_form(name) for name in shown), ",d", "d", ".4f")  # fmt: skip
    hidden = {"tied", *OPTIONAL} - set(shown)
    names = [name for name in FINALIST_COLUMNS if name not in hidden]
    rows = [
        [_text(row[name], form) for name, form in zip(names, forms, strict=True)]
        for row in _values(board)
    ]
    return header, rows


def to_json(board: pd.DataFrame) -> str:
    """Return a leaderboard as a JSON list of objects; what is not known is null."""
    return json.dumps(_values(board), indent=1, allow_nan=False) + "\n"


def to_csv(board: pd.DataFrame) -> str:
    """Return a leaderboard as CSV, every float in full; what is not known is empty."""
    return str(board.to_csv(index=False))


def to_rows(board: pd.DataFrame, limit: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Return a leaderboard as text for a table on a terminal.

    Parameters
    ----------
    board
        From `leaderboard`.
    limit
        Rows to give; None for all.

    Returns
    -------
    header, rows
        RMSE with four digits, ``-`` for what is not known, the reason of a failed trial
        in place of its state. Optional hyperparameters where they are on in some row.
    """
    shown = switched_on(_values(board))
    header = ["#", "trial", "state", "RMSE", *BANDS, "g r z", "width", "depth", "lr", "delta",
              "batch", *(_TITLES[name] for name in shown), "parameters", "front", "epochs",
              "best", "s"]  # fmt: skip
    rows = []
    for row in _values(board if limit is None else board.head(limit)):
        state = row["state"].lower()
        rows.append(
            [
                str(row["rank"]),
                str(row["trial"]),
                f"{state}: {row['reason']}" if row["reason"] else state,
                *(_text(row[name], ".4f") for name in ("objective", *BANDS, "mean_grz")),
                *(_text(row[name], "d") for name in ("width", "depth")),
                *(_text(row[name], ".3g") for name in ("learning_rate", "huber_delta")),
                _text(row["batch_size"], "d"),
                *(_text(row[name], _form(name)) for name in shown),
                _text(row["parameters"], ",d"),
                "*" if row["pareto"] else "",
                *(_text(row[name], "d") for name in ("epochs", "best_epoch")),
                _text(row["seconds"], ".1f"),
            ]
        )
    return header, rows


def _place(record: TrialRecord) -> tuple[int, float, int, int]:
    objective = math.inf if record.objective is None else record.objective
    return _ORDER[record.state], objective, record.parameters, record.number


def _row(rank: int, record: TrialRecord) -> dict[str, Any]:
    rmse, configuration = record.rmse or {}, in_full(record.configuration)
    observed = [rmse[band] for band in OBSERVED_BANDS if band in rmse]
    return {
        "rank": rank,
        "trial": record.number,
        "state": record.state,
        "objective": record.objective,
        **{band: rmse.get(band) for band in BANDS},
        "mean_grz": sum(observed) / len(observed) if len(observed) == len(OBSERVED_BANDS) else None,
        **{name: configuration.get(name) for name in HYPERPARAMETERS},
        "parameters": record.parameters,
        "epochs": record.epochs,
        "best_epoch": record.best_epoch,
        "seconds": record.seconds,
        "reason": record.reason,
    }


def _values(board: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values, None where there is none."""
    rows: list[dict[str, Any]] = []
    for row in board.astype(object).itertuples(index=False):
        values = zip(board.columns, row, strict=True)
        rows.append({name: None if pd.isna(value) else _plain(value) for name, value in values})
    return rows


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _form(name: str) -> str:
    kind = HYPERPARAMETERS[name]
    return "s" if kind.words else "d" if kind.whole else ".3g"


def _text(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
