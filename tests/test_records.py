"""Records, the one function that decides a state, the ledger, and the tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.data.columns import BANDS
from desisky_tune.errors import RunError, StorageError
from desisky_tune.search.backend import CURVE_SERIES, Progress
from desisky_tune.search.records import (
    Ledger,
    TrialRecord,
    best_record,
    finish,
    parameter_count,
    record_from_json,
    record_to_json,
    write_tables,
)
from desisky_tune.search.tables import CURVES_SCHEMA, TRIALS_SCHEMA

CONFIGURATION = {
    "width": 128,
    "depth": 5,
    "learning_rate": 1e-4,
    "huber_delta": 0.25,
    "batch_size": 32,
}


def a_result(epochs: int = 9, objective: float = 0.3, **changes: Any) -> dict[str, Any]:
    progress = Progress(
        epochs=epochs,
        objective=objective,
        best_epoch=epochs - 2,
        rmse=dict(zip(BANDS, (0.2, 0.4, 0.35, 0.25), strict=True)),
        train_loss=0.1,
        test_loss=0.2,
        seconds=1.5,
        curve={name: [0.5 / (epoch + 1) for epoch in range(epochs)] for name in CURVE_SERIES},
    )
    return {**progress.as_result(), **changes}


def a_record(number: int = 0, result: Mapping[str, Any] | None = None, **more: Any) -> TrialRecord:
    return finish(
        number=number,
        configuration=more.pop("configuration", CONFIGURATION),
        result=a_result() if result is None else result,
        max_epochs=9,
        **more,
    )


# --- states


def test_a_trial_that_reached_the_last_epoch_is_complete() -> None:
    record = a_record(3, seed=7, started=10.0, ended=12.5, rungs={3: 0.4})
    assert record.state == "COMPLETE"
    assert record.objective == 0.3
    assert record.reason is None
    assert record.best_epoch == 7
    assert record.rungs == {3: 0.4, 9: 0.3}
    assert record.rmse == {"V": 0.2, "g": 0.4, "r": 0.35, "z": 0.25}
    assert (record.seed, record.started, record.ended, record.seconds) == (7, 10.0, 12.5, 1.5)
    assert set(record.curve) == set(CURVE_SERIES)


def test_a_trial_that_was_stopped_before_is_pruned_with_its_value() -> None:
    record = a_record(result=a_result(epochs=3, objective=0.5))
    assert record.state == "PRUNED"
    assert record.objective == 0.5
    assert record.rungs == {3: 0.5}


@pytest.mark.parametrize("objective", [math.nan, math.inf, -math.inf])
def test_an_objective_that_is_no_number_fails_whatever_the_epochs(objective: float) -> None:
    record = a_record(result=a_result(objective=objective), rungs={3: 0.4, 5: math.nan})
    assert record.state == "FAIL"
    assert record.objective is None
    assert record.rmse is None
    assert record.best_epoch is None
    assert record.reason == f"the objective is {objective} after 9 epochs"
    assert record.rungs == {3: 0.4}


def test_a_band_that_is_no_number_fails() -> None:
    rmse = {"V": 0.2, "g": math.nan, "r": 0.3, "z": math.inf}
    record = a_record(result=a_result(rmse=rmse))
    assert record.state == "FAIL"
    assert record.reason == "the RMSE in g, z is not finite after 9 epochs"


@pytest.mark.parametrize(
    ("result", "reason", "expected"),
    [
        (a_result(reason="ValueError: no rows"), None, "ValueError: no rows"),
        (a_result(), "the process was killed", "the process was killed"),
        ({}, None, "ended without a report"),
        ({}, "the process was killed", "the process was killed"),
    ],
)
def test_a_reason_fails(result: dict[str, Any], reason: str | None, expected: str) -> None:
    record = a_record(result=result, reason=reason)
    assert record.state == "FAIL"
    assert record.reason == expected


def test_a_flattened_result_says_the_same() -> None:
    """Ray hands its searcher dictionaries as ``rmse/V``."""
    flat: dict[str, Any] = {}
    for key, value in a_result().items():
        if isinstance(value, dict):
            flat |= {f"{key}/{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    assert a_record(result=flat) == a_record()


# --- choosing


def test_the_lowest_complete_objective_leads() -> None:
    records = [
        a_record(0, a_result(objective=0.4)),
        a_record(1, a_result(objective=0.3)),
        a_record(2, a_result(epochs=3, objective=0.1)),
        a_record(3, a_result(objective=math.nan)),
    ]
    assert best_record(records) is records[1]
    assert best_record(records[2:]) is None
    assert best_record([]) is None


def test_a_tie_goes_to_the_smaller_model_then_to_the_earlier_trial() -> None:
    small = {**CONFIGURATION, "width": 64}
    records = [a_record(0), a_record(5, configuration=small), a_record(4, configuration=small)]
    assert best_record(records) is records[2]


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (16, 1), (128, 5), (33, 2)])
def test_parameters_are_those_of_the_model(width: int, depth: int) -> None:
    model = eqx.nn.MLP(6, 4, width, depth, key=jax.random.key(0))
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    counted = sum(leaf.size for leaf in leaves)
    assert parameter_count({"width": width, "depth": depth}) == counted


# --- JSON


floats = st.floats(allow_nan=False)


@settings(max_examples=30, deadline=None)
@given(
    objective=st.floats(1e-12, 1e12),
    rungs=st.dictionaries(st.integers(1, 9999), st.floats(1e-12, 1e12), max_size=4),
    curve=st.lists(floats, max_size=5),
    reason=st.none() | st.text(max_size=20),
)
def test_a_record_comes_back_bit_for_bit(
    objective: float, rungs: dict[int, float], curve: list[float], reason: str | None
) -> None:
    record = replace(
        a_record(), objective=objective, rungs=rungs, curve={"V": curve}, reason=reason
    )
    line = record_to_json(record)
    assert "\n" not in line
    assert record_from_json(line) == record


def test_what_is_no_number_comes_back_too() -> None:
    curve = {"V": [1.0, math.nan, math.inf, -math.inf]}
    record = replace(a_record(), curve=curve)
    line = record_to_json(record)
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = record_from_json(line).curve["V"]
    assert back[0] == 1.0
    assert math.isnan(back[1])
    assert back[2:] == [math.inf, -math.inf]


# --- the ledger


def test_a_ledger_keeps_records_in_the_order_of_their_end(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    assert ledger.records() == []
    records = [a_record(2), a_record(0), a_record(1, a_result(epochs=3))]
    assert [ledger.append(record) for record in records] == [True, True, True]
    assert ledger.records() == records
    assert Ledger(ledger.path).records() == records
    assert ledger.torn is None
    assert len(ledger.path.read_text().splitlines()) == 3


def test_a_disk_that_is_full_for_a_while_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(a_record(0))

    def half_a_line(where: Path, line: str) -> None:
        with open(where, "ab") as stream:
            stream.write(line[: len(line) // 2].encode())
        raise StorageError("no space left")

    with monkeypatch.context() as full:
        full.setattr("desisky_tune.search.records.append_line", half_a_line)
        with pytest.raises(StorageError):
            ledger.append(a_record(1))
    assert ledger.append(a_record(1))
    assert [record.number for record in Ledger(path).records()] == [0, 1]


def test_a_number_counts_once_and_the_first_wins(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    first, second = a_record(1), a_record(1, a_result(objective=0.1))
    assert ledger.append(first)
    assert not ledger.append(second)
    assert not Ledger(ledger.path).append(second)
    assert ledger.records() == [first]

    with open(ledger.path, "a") as stream:
        stream.write(record_to_json(second) + "\n")
    assert Ledger(ledger.path).records() == [first]


@pytest.mark.parametrize(
    "rest", [b'{"number": 1, "sta', b"\0\0\0\0", b'{"number": 1, "state"\n', b"\xff\xfe"]
)
def test_a_last_line_that_was_cut_off_does_not_count_and_goes(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(a_record(0))
    with open(path, "ab") as stream:
        stream.write(rest)

    ledger = Ledger(path)
    assert ledger.records() == [a_record(0)]
    assert f"{path}: the last line was cut off ({len(rest)} bytes)" in str(ledger.torn)
    ledger.append(a_record(1))
    assert ledger.records() == [a_record(0), a_record(1)]
    assert ledger.torn is None


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_every_prefix_of_a_ledger_can_be_read(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for number in range(3):
        ledger.append(a_record(number))
    os.truncate(path, path.stat().st_size - cut)
    assert [record.number for record in Ledger(path).records()] == [0, 1]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("rubbish", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"number": 1}', "missing state"),
        (record_to_json(a_record(1)).replace("COMPLETE", "RUNNING"), "state 'RUNNING'"),
    ],
)
def test_a_damaged_line_within_is_named(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text("\n".join([record_to_json(a_record(0)), line, record_to_json(a_record(2)), ""]))
    with pytest.raises(RunError, match=r"ledger.jsonl, line 2: not the record of a trial") as error:
        Ledger(path).records()
    assert what in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(RunError, match="line 2"):
        Ledger(path).append(a_record(3))


# --- tables


def test_tables_hold_a_row_per_trial_and_per_epoch(tmp_path: Path) -> None:
    records = [
        a_record(1, a_result(epochs=3, objective=0.5)),
        a_record(0),
        a_record(2, {}, reason="killed"),
    ]
    trials, curves = write_tables(records, tmp_path)
    frame = pd.read_parquet(trials)
    assert list(frame["trial"]) == [0, 1, 2]
    assert list(frame["state"]) == ["COMPLETE", "PRUNED", "FAIL"]
    assert list(frame["objective"])[:2] == [0.3, 0.5]
    assert math.isnan(frame["objective"][2])
    assert frame["reason"][2] == "killed"
    assert frame["rmse_g"][0] == 0.4
    curve = pd.read_parquet(curves)
    assert list(curve["trial"]) == [0] * 9 + [1] * 3
    assert list(curve["epoch"]) == [*range(9), *range(3)]
    assert list(curve["V"][:9]) == a_record(0).curve["V"]


@pytest.mark.parametrize("records", [[], [a_record(0)], [a_record(2, {}, reason="killed")]])
def test_columns_do_not_depend_on_the_rows(tmp_path: Path, records: list[TrialRecord]) -> None:
    trials, curves = write_tables(records, tmp_path)
    assert pq.read_schema(trials).equals(TRIALS_SCHEMA)
    assert pq.read_schema(curves).equals(CURVES_SCHEMA)
    assert pq.read_metadata(trials).num_rows == len(records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.parquet", "trials.parquet"]
