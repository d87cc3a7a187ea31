"""Whole searches under a virtual clock: every sampler and scheduler through the same life."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from virtual_clock import FakeBackend, ProcessDiedError, VirtualSearch, floor_of

from desisky_tune.search.folder import RunFolder
from desisky_tune.search.records import Ledger, TrialRecord, best_record, record_to_json
from desisky_tune.search.space import SearchSpec, default_configuration, rungs, spec_from_dict
from desisky_tune.search.study import rebuild_study
from desisky_tune.search.study_storage import close_storage, open_storage

SAMPLERS = ("tpe", "gp", "cmaes", "random", "qmc")
SCHEDULERS = ("asha", "none")

SPACE = {
    "width": {"low": 16, "high": 512, "log": True},
    "depth": {"low": 1, "high": 6},
    "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
    "huber_delta": {"low": 0.01, "high": 2.0, "log": True},
    "batch_size": {"choices": [16, 32, 64]},
}


def a_spec(trials: int = 14, epochs: int = 90, **search: Any) -> SearchSpec:
    options = {"trials": trials, "grace": 10, "reduction": 3, "startup_trials": 5, **search}
    training = {"epochs": epochs}
    return spec_from_dict({"space": SPACE, "training": training, "search": options})


def study_trials(folder: Path, spec: SearchSpec) -> dict[int, optuna.trial.FrozenTrial]:
    storage = open_storage(RunFolder(folder).study)
    try:
        study = optuna.load_study(study_name=spec.name, storage=storage)
        return {trial.number: trial for trial in study.get_trials()}
    finally:
        close_storage(storage)


def told(trial: optuna.trial.FrozenTrial) -> tuple[Any, ...]:
    """What a study says of a trial, its dates and its reason apart."""
    notes = {key: value for key, value in trial.user_attrs.items() if key != "reason"}
    return (
        trial.number,
        trial.state,
        trial.values,
        trial.params,
        trial.distributions,
        trial.intermediate_values,
        notes,
    )


def measured(record: TrialRecord) -> tuple[Any, ...]:
    """What a record says of a trial, its dates apart."""
    return (
        record.number,
        record.state,
        record.configuration,
        record.objective,
        record.epochs,
        record.rungs,
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_life_of_a_search(tmp_path: Path, sampler: str, scheduler: str) -> None:
    spec = a_spec(sampler=sampler, scheduler=scheduler)
    backend = FakeBackend(
        nan_at={4: 15, 6: 0},
        raises_at={8: (30, ProcessDiedError("the process was killed"))},
    )
    search = VirtualSearch(spec, tmp_path, workers=3, backend=backend)
    records = search.run()

    assert [record.number for record in records] == list(range(14))
    assert {r.number: r.configuration for r in records} == search.suggested
    assert search.suggested[0] == default_configuration(spec)
    assert records[0].state == "COMPLETE"

    # Trials 4 and 8 may have been pruned at epoch 10, before they would have failed.
    assert records[6].state == "FAIL"
    assert "nan" in str(records[6].reason)
    assert records[6].objective is None
    assert records[4].state == "FAIL" or records[4].epochs == 10
    assert records[8].state == "FAIL" or records[8].epochs == 10
    for record in records:
        if record.state == "COMPLETE":
            assert record.epochs == 90
            assert record.objective == min(record.rungs.values())
        elif record.state == "PRUNED":
            assert scheduler == "asha"
            assert record.epochs in (10, 30)
    if scheduler == "none":
        assert [r.number for r in records if r.state == "FAIL"] == [4, 6, 8]
    else:
        assert any(record.state == "PRUNED" for record in records)

    kept = Ledger(tmp_path / "ledger.jsonl").records()
    assert sorted(map(record_to_json, kept)) == sorted(map(record_to_json, records))
    trials = study_trials(tmp_path, spec)
    assert sorted(trials) == list(range(14))
    for record in records:
        trial = trials[record.number]
        assert trial.state.name == record.state
        assert trial.intermediate_values == record.rungs
        assert trial.values == (None if record.objective is None else [record.objective])
        assert trial.user_attrs["configuration"] == record.configuration
        for name, value in trial.params.items():
            assert record.configuration[name] == value
    assert not any(trial.state == optuna.trial.TrialState.RUNNING for trial in trials.values())

    best = best_record(records)
    assert best is not None
    assert best.objective == min(r.objective for r in records if r.state == "COMPLETE")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_rebuilt_study_equals_the_one_that_was_written_trial_by_trial(
    tmp_path: Path, scheduler: str
) -> None:
    spec = a_spec(scheduler=scheduler)
    backend = FakeBackend(nan_at={3: 12}, raises_at={5: (10, ProcessDiedError("killed"))})
    records = VirtualSearch(spec, tmp_path, workers=3, backend=backend).run()
    before = study_trials(tmp_path, spec)

    (tmp_path / "study.db").unlink()
    rebuild_study(tmp_path / "study.db", spec, records)

    after = study_trials(tmp_path, spec)
    assert [told(t) for t in after.values()] == [told(t) for t in before.values()]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".db"] == ["study.db"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_of_one_worker_that_was_interrupted_ends_as_if_it_had_not_been(
    tmp_path: Path, sampler: str
) -> None:
    spec = a_spec(trials=12, sampler=sampler)
    whole = VirtualSearch(spec, tmp_path / "whole")
    expected = whole.run()

    moments = random.Random(sampler)
    for _ in range(3):
        VirtualSearch(spec, tmp_path / "cut").run(until=moments.uniform(0, whole.clock / 2))
    resumed = VirtualSearch(spec, tmp_path / "cut").run()

    assert [measured(r) for r in resumed] == [measured(r) for r in expected]


@pytest.mark.parametrize("seed", range(2))
def test_random_search_without_pruning_is_the_same_however_often_it_is_interrupted(
    tmp_path: Path, seed: int
) -> None:
    spec = a_spec(sampler="random", scheduler="none", seed=seed)
    whole = VirtualSearch(spec, tmp_path / "whole", workers=4)
    expected = whole.run()

    moments = random.Random(seed)
    for workers in (4, 3, 2):
        search = VirtualSearch(spec, tmp_path / "cut", workers=workers)
        search.run(until=moments.uniform(0, whole.clock / 2))
    resumed = VirtualSearch(spec, tmp_path / "cut", workers=4).run()

    assert [measured(r) for r in resumed] == [measured(r) for r in expected]
    trials = study_trials(tmp_path / "cut", spec)
    assert {trial.state.name for trial in trials.values()} == {"COMPLETE"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_search_hands_out_every_trial_once_and_forgets_none(
    tmp_path: Path, sampler: str
) -> None:
    spec = a_spec(sampler=sampler)
    length = VirtualSearch(spec, tmp_path / "whole", workers=3)
    length.run()

    cut = VirtualSearch(spec, tmp_path / "cut", workers=3)
    before = {record.number: record for record in cut.run(until=0.4 * length.clock)}
    assert 0 < len(before) < 14
    after = VirtualSearch(spec, tmp_path / "cut", workers=3)
    records = after.run()

    assert [record.number for record in records] == list(range(14))
    assert set(after.suggested) == set(range(14)) - set(before)
    under_way = {n: c for n, c in cut.suggested.items() if n not in before}
    assert under_way
    assert under_way.items() <= after.suggested.items()
    assert [records[number] for number in before] == list(before.values())


def test_a_trial_whose_process_died_is_tried_again_as_it_was(tmp_path: Path) -> None:
    spec = a_spec(trials=8, sampler="random", scheduler="none")
    expected = VirtualSearch(spec, tmp_path / "whole").run()

    mortal = FakeBackend(raises_at={3: (30, ProcessDiedError("killed"))})
    first = VirtualSearch(spec, tmp_path / "cut", workers=2, backend=mortal, max_deaths=1)
    assert [record.number for record in first.run()] == [0, 1, 2, 4, 5, 6, 7]
    second = VirtualSearch(spec, tmp_path / "cut", workers=2)
    records = second.run()

    assert list(second.suggested) == [3]
    assert [measured(r) for r in records] == [measured(r) for r in expected]


def test_a_ledger_with_a_gap_is_filled(tmp_path: Path) -> None:
    spec = a_spec(trials=8, sampler="random", scheduler="none")
    expected = VirtualSearch(spec, tmp_path / "whole").run()

    ledger = Ledger(tmp_path / "cut" / "ledger.jsonl")
    for record in expected[:6]:
        if record.number not in (2, 4):
            ledger.append(record)
    resumed = VirtualSearch(spec, tmp_path / "cut")
    records = resumed.run()

    assert list(resumed.suggested) == [2, 4, 6, 7]
    assert [measured(r) for r in records] == [measured(r) for r in expected]


def test_the_default_is_trained_in_full_where_everything_else_is_better(tmp_path: Path) -> None:
    def worst_is_default(configuration: Any, epoch: int) -> float:
        lag = 5.0 if configuration == default_configuration() else floor_of(configuration)
        return lag + math.exp(-epoch)

    spec = a_spec(trials=20)
    backend = FakeBackend(curve_of=worst_is_default)
    records = VirtualSearch(spec, tmp_path, workers=2, backend=backend).run()
    assert records[0].objective > max(r.objective for r in records[1:])
    assert records[0].state == "COMPLETE"
    assert sum(record.state == "PRUNED" for record in records) > 5


def test_the_default_can_be_left_out(tmp_path: Path) -> None:
    spec = a_spec(trials=4, default_first=False, scheduler="none")
    search = VirtualSearch(spec, tmp_path)
    search.run()
    assert default_configuration(spec) not in search.suggested.values()


def test_asha_stops_what_is_beyond_the_quantile_of_those_before(tmp_path: Path) -> None:
    spec = a_spec(trials=30, sampler="random", seed=3)
    search = VirtualSearch(spec, tmp_path, workers=4)
    search.run()

    def stands(before: list[float], objective: float) -> bool:
        """The rule by counting: linear interpolation between order statistics."""
        ordered = sorted(before)
        place = (len(ordered) - 1) / 3
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return objective <= ordered[low] + (place - low) * (ordered[high] - ordered[low])

    reached: dict[int, list[float]] = {epochs: [] for epochs in rungs(spec)}
    for number, epochs, objective, decision in search.decisions:
        before = reached[epochs]
        expected = number == 0 or not before or stands(before, objective)
        assert (decision == "CONTINUE") == expected
        before.append(objective)
    assert {decision for *_, decision in search.decisions} == {"CONTINUE", "STOP"}
    assert len(reached[10]) == 30
    assert 1 < len(reached[30]) < 25


def test_trials_side_by_side_end_out_of_order(tmp_path: Path) -> None:
    spec = a_spec(trials=10, sampler="random", scheduler="none")
    VirtualSearch(spec, tmp_path, workers=4).run()
    ended = [record.number for record in Ledger(tmp_path / "ledger.jsonl").records()]
    assert sorted(ended) == list(range(10))
    assert ended != list(range(10))


def test_neighbours_in_flight_differ(tmp_path: Path) -> None:
    spec = a_spec(trials=16, sampler="tpe", scheduler="none")
    search = VirtualSearch(spec, tmp_path, workers=8)
    search.run()
    rates = [configuration["learning_rate"] for configuration in search.suggested.values()]
    assert len(set(rates)) == 16
