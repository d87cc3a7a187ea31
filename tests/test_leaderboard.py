"""The leaderboard: its order, and its three forms."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from desisky_tune.errors import RunError
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.leaderboard import COLUMNS, leaderboard, to_csv, to_json, to_rows
from desisky_tune.search.records import Ledger, TrialRecord, finish


def a_record(number: int, objective: float, epochs: int = 9, **more: Any) -> TrialRecord:
    configuration = {
        "width": more.pop("width", 64),
        "depth": 2,
        "learning_rate": 1 / 3000,
        "huber_delta": 0.25,
        "batch_size": 32,
    }
    rmse = {"V": objective - 0.1, "g": objective + 0.3, "r": objective, "z": objective - 0.2}
    result = {
        "epochs": epochs,
        "objective": objective,
        "best_epoch": 2,
        "rmse": rmse,
        "seconds": 1.25,
    }
    return finish(number=number, configuration=configuration, result=result, max_epochs=9, **more)


@pytest.fixture
def records() -> list[TrialRecord]:
    return [
        a_record(0, 0.5),
        a_record(1, 0.2, epochs=3),
        a_record(2, 0.4, reason="ValueError: no rows, none at all"),
        a_record(3, 0.3),
        a_record(4, 0.1, epochs=3),
        a_record(5, 0.3, width=32),
    ]


def test_complete_trials_lead_then_pruned_then_failed(records: list[TrialRecord]) -> None:
    board = leaderboard(records)
    assert tuple(board.columns) == COLUMNS
    assert list(board["rank"]) == [1, 2, 3, 4, 5, 6]
    assert list(board["trial"]) == [5, 3, 0, 4, 1, 2]
    states = ["COMPLETE"] * 3 + ["PRUNED"] * 2 + ["FAIL"]
    assert list(board["state"]) == states


def test_observed_bands_are_averaged_without_v(records: list[TrialRecord]) -> None:
    board = leaderboard(records).set_index("trial")
    row = board.loc[0]
    assert row["mean_grz"] == pytest.approx((0.8 + 0.5 + 0.3) / 3)
    assert (row["V"], row["width"], row["epochs"], row["best_epoch"]) == (0.4, 64, 9, 2)


def test_a_failed_trial_has_a_reason_and_no_figures(records: list[TrialRecord]) -> None:
    row = leaderboard(records).iloc[-1]
    assert row["reason"] == "ValueError: no rows, none at all"
    assert row[["objective", "V", "mean_grz", "best_epoch"]].isna().all()
    assert row["epochs"] == 9


def test_a_run_folder_is_ranked_like_its_records(
    tmp_path: Path, records: list[TrialRecord]
) -> None:
    folder = RunFolder.create(tmp_path, "small", exact=True)
    folder.write_search({"name": "small"})
    for record in records:
        Ledger(folder.ledger).append(record)
    assert leaderboard(folder.path).equals(leaderboard(records))
    assert leaderboard(str(folder.path)).equals(leaderboard(records))


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run of desisky-tune"):
        leaderboard(tmp_path)


def test_no_trial_is_an_empty_board() -> None:
    board = leaderboard([])
    assert len(board) == 0
    assert tuple(board.columns) == COLUMNS
    assert json.loads(to_json(board)) == []
    assert to_rows(board)[1] == []
    assert to_csv(board).splitlines() == [",".join(COLUMNS)]


def test_json_keeps_every_digit_and_says_null(records: list[TrialRecord]) -> None:
    rows = json.loads(to_json(leaderboard(records)), parse_constant=pytest.fail)
    assert [row["trial"] for row in rows] == [5, 3, 0, 4, 1, 2]
    assert rows[0]["learning_rate"] == 1 / 3000
    assert rows[0]["reason"] is None
    assert rows[-1]["objective"] is None
    assert isinstance(rows[0]["width"], int)


def test_csv_keeps_every_digit(records: list[TrialRecord]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(leaderboard(records)))))
    assert [int(row["trial"]) for row in rows] == [5, 3, 0, 4, 1, 2]
    assert float(rows[0]["learning_rate"]) == 1 / 3000
    assert rows[-1]["objective"] == ""
    assert rows[-1]["reason"] == "ValueError: no rows, none at all"


def test_rows_for_a_terminal(records: list[TrialRecord]) -> None:
    header, rows = to_rows(leaderboard(records))
    assert all(len(row) == len(header) for row in rows)
    first = dict(zip(header, rows[0], strict=True))
    assert first["trial"] == "5"
    assert first["RMSE"] == "0.3000"
    assert first["state"] == "complete"
    assert first["parameters"] == f"{6 * 32 + 32 + 32 * 32 + 32 + 32 * 4 + 4:,}"
    last = dict(zip(header, rows[-1], strict=True))
    assert last["state"] == "fail: ValueError: no rows, none at all"
    assert last["RMSE"] == "-"
    assert len(to_rows(leaderboard(records), limit=2)[1]) == 2
