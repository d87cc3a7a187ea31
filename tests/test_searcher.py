"""The searcher, the study's file and the scheduler, one call at a time."""

from __future__ import annotations

import copy
import math
import pickle
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.optuna import OptunaSearch
from sqlalchemy.exc import OperationalError

from desisky_tune.errors import RunError, StorageError
from desisky_tune.search import study_storage
from desisky_tune.search.records import TrialRecord, finish
from desisky_tune.search.schedulers import FullScheduler, RungScheduler, make_scheduler
from desisky_tune.search.searcher import StudySearch
from desisky_tune.search.space import SearchSpec, default_configuration, spec_from_dict
from desisky_tune.search.study import rebuild_study
from desisky_tune.search.study_storage import StudyStorage, open_storage

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def a_spec(space: dict[str, Any] | None = None, **search: Any) -> SearchSpec:
    space = space or {
        "width": {"low": 16, "high": 256, "log": True},
        "depth": {"low": 1, "high": 6},
        "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
        "batch_size": {"choices": [16, 32, 64]},
    }
    options = {"trials": 5, "sampler": "random", "grace": 3, "reduction": 3, **search}
    return spec_from_dict({"space": space, "training": {"epochs": 27}, "search": options})


def a_report(epochs: int, objective: float) -> dict[str, Any]:
    return {
        "epochs": epochs,
        "objective": objective,
        "best_epoch": epochs - 1,
        "rmse/V": objective,
        "seconds": 0.1,
    }


def a_record(spec: SearchSpec, number: int, epochs: int = 27, **more: Any) -> TrialRecord:
    return finish(
        number=number,
        configuration=more.pop("configuration", default_configuration(spec)),
        result=a_report(epochs, more.pop("objective", 0.5)),
        max_epochs=27,
        **more,
    )


def states(search: StudySearch) -> list[str]:
    return [trial.state.name for trial in search.study.get_trials()]


@pytest.fixture
def spec() -> SearchSpec:
    return a_spec()


@pytest.fixture
def search(tmp_path: Path, spec: SearchSpec) -> StudySearch:
    return StudySearch(spec, tmp_path / "study.db")


def test_it_is_rays_optuna_search(search: StudySearch) -> None:
    assert isinstance(search, OptunaSearch)
    assert search.metric == "objective"
    assert search.mode == "min"
    assert search.set_search_properties("objective", "min", {})
    assert not search.set_search_properties("loss", "max", {})


def test_the_first_suggestion_is_the_documented_default(search: StudySearch) -> None:
    assert search.suggest("a") == {"trial": 0, **default_configuration()}
    [trial] = search.study.get_trials()
    assert trial.state.name == "RUNNING"
    names = ("width", "depth", "learning_rate", "batch_size")
    assert trial.params == {name: default_configuration()[name] for name in names}


def test_the_default_is_suggested_where_the_space_has_no_room_for_it(tmp_path: Path) -> None:
    space = {
        "width": {"low": 8, "high": 64},
        "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
        "batch_size": {"choices": [64, 128]},
        "depth": 2,
    }
    search = StudySearch(a_spec(space), tmp_path / "study.db")
    assert search.suggest("a") == {"trial": 0, **default_configuration()}
    search.on_trial_complete("a", a_report(27, 0.4))
    [trial] = search.study.get_trials()
    assert trial.params == {"width": 128, "learning_rate": 1e-4}
    assert trial.user_attrs["configuration"] == default_configuration()
    following = search.suggest("b")
    assert following["depth"] == 2
    assert following["width"] <= 64
    assert following["batch_size"] in (64, 128)


def test_suggestions_end_after_the_last_trial(search: StudySearch) -> None:
    numbers = [search.suggest(str(index))["trial"] for index in range(5)]
    assert numbers == [0, 1, 2, 3, 4]
    assert search.suggest("late") == Searcher.FINISHED


def test_a_complete_trial(search: StudySearch) -> None:
    search.suggest("a")
    search.on_trial_result("a", a_report(3, 0.9))
    search.on_trial_result("a", a_report(9, 0.7))
    search.on_trial_complete("a", a_report(27, 0.5))
    [trial] = search.study.get_trials()
    assert trial.state.name == "COMPLETE"
    assert trial.value == 0.5
    assert trial.intermediate_values == {3: 0.9, 9: 0.7, 27: 0.5}
    assert search.study.best_value == 0.5
    assert trial.user_attrs["rmse"] == {"V": 0.5}


def test_a_stopped_trial_is_pruned_with_the_report_that_stopped_it(search: StudySearch) -> None:
    search.suggest("a")
    search.on_trial_result("a", a_report(3, 0.9))
    search.on_trial_complete("a", a_report(9, 0.8))
    [trial] = search.study.get_trials()
    assert trial.state.name == "PRUNED"
    assert trial.value == 0.8
    assert trial.intermediate_values == {3: 0.9, 9: 0.8}


@pytest.mark.parametrize(
    ("result", "error", "reason"),
    [
        (a_report(9, math.nan), False, "the objective is nan after 9 epochs"),
        ({**a_report(9, math.nan), "reason": "ValueError: no"}, False, "ValueError: no"),
        (None, True, "the trial's process failed"),
        (None, False, "ended without a report"),
        ({}, False, "ended without a report"),
    ],
)
def test_a_trial_without_numbers_fails(
    search: StudySearch, result: dict[str, Any] | None, error: bool, reason: str
) -> None:
    search.suggest("a")
    search.on_trial_result("a", a_report(3, 0.9))
    search.on_trial_complete("a", result, error=error)
    [trial] = search.study.get_trials()
    assert trial.state.name == "FAIL"
    assert trial.values is None
    assert trial.intermediate_values == {3: 0.9}
    assert trial.user_attrs["reason"] == reason


def test_a_second_end_changes_nothing(search: StudySearch) -> None:
    search.suggest("a")
    search.on_trial_complete("a", a_report(27, 0.5))
    search.on_trial_complete("a", a_report(9, 0.1))
    search.on_trial_complete("a", error=True)
    assert states(search) == ["COMPLETE"]
    assert search.study.best_value == 0.5


def test_a_report_of_nan_is_kept_from_the_study(search: StudySearch) -> None:
    search.suggest("a")
    search.on_trial_result("a", a_report(3, math.nan))
    assert search.study.get_trials()[0].intermediate_values == {}


def test_it_pickles_and_goes_on(tmp_path: Path, search: StudySearch) -> None:
    """Ray pickles a searcher at the start, and saves it from time to time."""
    first = search.suggest("a")
    pickled = cloudpickle.dumps(search)
    search.save(str(tmp_path / "saved.pkl"))
    search.on_trial_complete("a", a_report(27, 0.5))
    search.close()
    assert states(cloudpickle.loads(pickled)) == ["COMPLETE"]

    restored = StudySearch(search.spec, search.path)
    restored.restore(str(tmp_path / "saved.pkl"))
    assert restored.suggest("b")["trial"] == first["trial"] + 1
    pickle.loads(pickle.dumps(search.spec))


STEPS = st.sampled_from(["suggest", "suggest", "report", "report", "end", "fail", "write"])


@given(steps=st.lists(STEPS, max_size=30), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_file_is_the_study_in_memory_whenever_it_is_written(
    steps: list[str], seed: int
) -> None:
    """Trials that end, fail, report and begin in any order, written now and then."""
    draw = random.Random(seed)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "study.db"
        search = StudySearch(a_spec(), path)
        running: dict[str, int] = {}
        for place, step in enumerate(steps):
            if step == "suggest" and search.suggest(str(place)) != Searcher.FINISHED:
                running[str(place)] = 0
            elif step == "write":
                search._store.flush()
                assert as_told(stored(path, search.spec)) == as_told(search.study)
            elif running:
                trial = draw.choice(sorted(running))
                running[trial] += 3
                report = a_report(min(running[trial], 27), draw.random())
                if step == "report":
                    search.on_trial_result(trial, report)
                else:
                    search.on_trial_complete(trial, report, error=step == "fail")
                    del running[trial]
        search.close()
        assert as_told(stored(path, search.spec)) == as_told(search.study)


def stored(path: Path, spec: SearchSpec) -> optuna.Study:
    return optuna.load_study(study_name=spec.name, storage=open_storage(path))


def as_told(study: optuna.Study) -> list[tuple[Any, ...]]:
    """What a study says of its trials."""
    return [
        (
            trial.number,
            trial.state,
            trial.values,
            trial.params,
            trial.distributions,
            trial.intermediate_values,
            trial.user_attrs,
            trial.system_attrs,
            trial.datetime_start,
            trial.datetime_complete,
        )
        for trial in study.get_trials()
    ]


def test_who_else_writes_to_the_file_is_noticed(tmp_path: Path, search: StudySearch) -> None:
    search.suggest("a")
    stored(tmp_path / "study.db", search.spec).add_trial(optuna.create_trial(value=1.0))
    search.on_trial_complete("a", a_report(27, 0.5))
    with pytest.raises(RunError, match="something else is writing to this study"):
        search.close()


def test_what_optuna_can_say_of_a_trial_is_read_back_from_the_file(tmp_path: Path) -> None:
    """Infinities, a NaN, attributes of both kinds, and the times to the microsecond."""
    storage = StudyStorage(tmp_path / "study.db")
    study = optuna.create_study(study_name="any", storage=storage, directions=["minimize"] * 2)
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.COMPLETE,
            values=[math.inf, -math.inf],
            params={"kind": "huber", "width": 32, "rate": 1e-3},
            distributions={
                "kind": optuna.distributions.CategoricalDistribution(["huber", "l2"]),
                "width": optuna.distributions.IntDistribution(16, 64, log=True),
                "rate": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True),
            },
            intermediate_values={1: math.nan, 3: math.inf, 9: -math.inf, 27: 0.5},
            user_attrs={"folds": [1, 2], "note": None},
            system_attrs={"fixed_params": {"width": 32}},
        )
    )
    study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.WAITING))
    study.ask()
    storage.close()
    for reader in (open_storage, StudyStorage):
        read = optuna.load_study(study_name="any", storage=reader(storage.path))
        assert repr(as_told(read)) == repr(as_told(study))  # by repr: a NaN is not itself


def test_a_file_holds_one_study(tmp_path: Path, search: StudySearch) -> None:
    with pytest.raises(StorageError, match="holds the study of another search"):
        optuna.create_study(study_name="another", storage=search._store)


def test_somebody_who_reads_the_file_holds_nothing_up_for_long(
    tmp_path: Path, search: StudySearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_storage, "PERIOD", 0.0)
    monkeypatch.setattr(study_storage, "_PATIENCE", 0.05)
    patient = StudySearch(search.spec, tmp_path / "patient.db")
    patient.suggest("a")
    with closing(sqlite3.connect(patient.path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM trials").fetchall()
        patient.keep()
        assert not stored(patient.path, search.spec).trials
        reader.rollback()
        patient.keep()
        assert as_told(stored(patient.path, search.spec)) == as_told(patient.study)
        patient.suggest("b")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM trials").fetchall()
        assert not patient.close()


KILLED_WHILE_WRITING = """
import os, sys
import optuna
from desisky_tune.search.study_storage import StudyStorage

storage = StudyStorage(sys.argv[1])
study = optuna.create_study(storage=storage, study_name="small")
for value in range(40):
    study.add_trial(optuna.create_trial(value=value, user_attrs={"long": "x" * 1000}))
storage.flush()
for trial in range(40):
    study.add_trial(optuna.create_trial(value=value, user_attrs={"long": "y" * 1000}))
connection = storage._file.engine.connect()
connection.begin()
storage._write(connection, storage._trials()[40:], storage._trials()[:40])
os._exit(0)
"""


def test_what_a_killed_writer_leaves_does_not_touch_the_study_written_anew(tmp_path: Path) -> None:
    """Its journal, which SQLite plays back into whatever lies beside it."""
    path = tmp_path / "study.db"
    subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)], check=True)
    assert Path(f"{path}-journal").stat().st_size
    spec = a_spec()
    records = [a_record(spec, number) for number in range(5)]
    rebuild_study(path, spec, records)
    trials = optuna.load_study(study_name=spec.name, storage=open_storage(path)).trials
    assert [trial.value for trial in trials] == [record.objective for record in records]
    with closing(sqlite3.connect(path)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_study_that_cannot_be_written_anew_is_storages_fault_and_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, path = a_spec(), tmp_path / "study.db"
    rebuild_study(path, spec, [a_record(spec, 0)])
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    monkeypatch.setattr(StudyStorage, "_write", full)
    with pytest.raises(StorageError, match=r"cannot write the study .*study.db: .*disk is full"):
        rebuild_study(path, spec, [a_record(spec, 0), a_record(spec, 1)])
    assert path.read_bytes() == before


def test_a_file_of_several_studies_is_refused(tmp_path: Path) -> None:
    several = open_storage(tmp_path / "study.db")
    for name in ("one", "other"):
        optuna.create_study(study_name=name, storage=several).add_trial(
            optuna.create_trial(value=1.0)
        )
    with pytest.raises(StorageError, match="holds more than the study of one search"):
        StudyStorage(tmp_path / "study.db")


def test_the_file_follows_the_study_while_it_runs(
    tmp_path: Path, search: StudySearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    search.suggest("a")
    monkeypatch.setattr(study_storage.time, "monotonic", lambda: now + 0.9 * study_storage.PERIOD)
    search.keep()
    assert not stored(search.path, search.spec).trials
    monkeypatch.setattr(study_storage.time, "monotonic", lambda: now + 1.1 * study_storage.PERIOD)
    search.keep()
    assert as_told(stored(search.path, search.spec)) == as_told(search.study)


def test_it_works_behind_rays_limiter(search: StudySearch) -> None:
    limiter = ConcurrencyLimiter(search, max_concurrent=2)
    assert limiter.suggest("a")["trial"] == 0
    assert limiter.suggest("b")["trial"] == 1
    assert limiter.suggest("c") is None
    limiter.on_trial_complete("a", a_report(27, 0.5))
    assert limiter.suggest("c")["trial"] == 2
    assert states(search) == ["COMPLETE", "RUNNING", "RUNNING"]


def test_a_path_may_hold_odd_characters(tmp_path: Path, spec: SearchSpec) -> None:
    folder = tmp_path / "a run? 100% #1"
    folder.mkdir()
    search = StudySearch(spec, folder / "study.db")
    search.suggest("a")
    search.close()
    assert [path.name for path in folder.iterdir()] == ["study.db"]


def test_what_is_no_study_is_said(tmp_path: Path, spec: SearchSpec) -> None:
    (tmp_path / "study.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(StorageError, match=r"cannot open the study .*study.db"):
        StudySearch(spec, tmp_path / "study.db")
    with pytest.raises(StorageError, match="cannot open the study"):
        open_storage(tmp_path / "missing" / "study.db")


# --- going on


def test_pending_trials_come_first_as_they_were(tmp_path: Path, spec: SearchSpec) -> None:
    records = [a_record(spec, 0), a_record(spec, 2)]
    pending = [(3, {**default_configuration(), "width": 50}), (1, default_configuration())]
    rebuild_study(tmp_path / "study.db", spec, records)
    search = StudySearch(spec, tmp_path / "study.db")
    search.prime(records, pending)
    assert states(search) == ["COMPLETE", "RUNNING", "COMPLETE", "RUNNING"]
    assert search.suggest("a") == {"trial": 1, **default_configuration()}
    assert search.suggest("b") == {"trial": 3, **default_configuration(), "width": 50}
    assert search.suggest("c")["trial"] == 4
    assert search.suggest("d") == Searcher.FINISHED
    for trial_id in "abc":
        search.on_trial_complete(trial_id, a_report(27, 0.4))
    assert states(search) == ["COMPLETE"] * 5


def test_a_run_that_ended_before_any_trial_did_begins_again(
    tmp_path: Path, spec: SearchSpec
) -> None:
    rebuild_study(tmp_path / "study.db", spec, [])
    search = StudySearch(spec, tmp_path / "study.db")
    search.prime([], [(0, default_configuration())])
    assert search.suggest("a")["trial"] == 0
    assert search.suggest("b")["trial"] == 1


def test_a_study_that_does_not_fit_the_ledger_is_refused(tmp_path: Path, spec: SearchSpec) -> None:
    rebuild_study(tmp_path / "study.db", spec, [a_record(spec, 0)])
    search = StudySearch(spec, tmp_path / "study.db")
    with pytest.raises(RunError, match="holds 1 finished trials, the ledger 2"):
        search.prime([a_record(spec, 0), a_record(spec, 1)])


def test_a_rebuilt_study_replaces_whatever_was_there(tmp_path: Path, spec: SearchSpec) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(b"the end of a database that a crash tore")
    records = [
        a_record(spec, 0, started=100.0, ended=160.5),
        a_record(spec, 1, epochs=3, rungs={3: 0.5}),
        a_record(spec, 2, reason="ValueError: no rows"),
    ]
    rebuild_study(path, spec, records)
    study = optuna.load_study(study_name=spec.name, storage=open_storage(path))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "FAIL"]
    assert [trial.value for trial in study.trials] == [0.5, 0.5, None]
    assert study.trials[0].duration is not None
    assert study.trials[0].duration.total_seconds() == 60.5
    assert study.trials[2].user_attrs["reason"] == "ValueError: no rows"
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


def test_a_study_keeps_every_digit(tmp_path: Path, spec: SearchSpec) -> None:
    objective, rate = 0.1 + 0.2, 1e-5 * (1 + 2**-50)
    configuration = {**default_configuration(), "learning_rate": rate}
    record = a_record(spec, 0, objective=objective, configuration=configuration)
    rebuild_study(tmp_path / "study.db", spec, [record])
    study = optuna.load_study(study_name=spec.name, storage=open_storage(tmp_path / "study.db"))
    assert study.trials[0].value == objective
    assert study.trials[0].params["learning_rate"] == rate


# --- the scheduler


class ATrial:
    def __init__(self, number: int) -> None:
        self.config = {"trial": number}
        self.trial_id = f"tune-{number}"


def test_schedulers_by_name() -> None:
    asha = make_scheduler(a_spec(scheduler="asha"))
    assert isinstance(asha, RungScheduler)
    assert isinstance(asha, ASHAScheduler)
    assert isinstance(make_scheduler(a_spec(scheduler="none")), FullScheduler)
    for scheduler in (asha, FullScheduler()):
        assert scheduler.set_search_properties("objective", "min")
        assert scheduler.set_search_properties(None, None)
    assert not asha.set_search_properties("objective", "max")


def test_the_cutoff_is_the_quantile_of_those_before() -> None:
    """Of 1, 2, 3, 4 the lower third ends, interpolated, at 2."""
    scheduler = RungScheduler([3, 9, 27], reduction=3)
    for number, objective in enumerate([4.0, 3.0, 2.0, 1.0], start=1):
        assert scheduler.decide(number, 3, objective) == CONTINUE
    assert copy.deepcopy(scheduler).decide(5, 3, 2.0) == CONTINUE
    assert copy.deepcopy(scheduler).decide(5, 3, 2.0001) == STOP
    assert scheduler.decide(6, 9, 100.0) == CONTINUE


def test_trial_0_is_never_stopped_but_counts() -> None:
    scheduler = RungScheduler([3, 9, 27], reduction=3)
    assert scheduler.decide(1, 3, 0.1) == CONTINUE
    assert scheduler.decide(0, 3, 9.0) == CONTINUE
    assert scheduler.decide(0, 9, 9.0) == CONTINUE
    assert scheduler.decide(2, 9, 9.5) == STOP
    assert scheduler.decide(0, 27, 9.0) == STOP
    assert RungScheduler([3, 9], reduction=3, spared=()).decide(0, 3, 1.0) == CONTINUE


def test_a_report_between_rungs_decides_nothing() -> None:
    scheduler = RungScheduler([3, 9, 27], reduction=3)
    scheduler.decide(1, 3, 0.1)
    assert scheduler.decide(2, 5, 9.0) == CONTINUE
    assert scheduler.decide(2, 9, 9.0) == CONTINUE
    assert scheduler.decide(3, 3, 0.1) == CONTINUE


def test_what_is_no_number_is_stopped_and_does_not_count() -> None:
    scheduler = RungScheduler([3, 27], reduction=3)
    assert scheduler.decide(1, 3, math.nan) == STOP
    assert scheduler.decide(2, 3, 5.0) == CONTINUE


def test_a_primed_scheduler_decides_as_the_one_that_saw_the_trials(spec: SearchSpec) -> None:
    seen = RungScheduler([3, 9, 27], reduction=3)
    records = []
    for number, (objective, epochs) in enumerate([(0.9, 27), (0.5, 9), (0.7, 3), (0.4, 27)]):
        rungs = {rung: objective for rung in (3, 9) if rung <= epochs}
        for rung in rungs:
            seen.decide(number, rung, objective)
        records.append(a_record(spec, number, epochs=epochs, objective=objective, rungs=rungs))
    primed = RungScheduler([3, 9, 27], reduction=3)
    primed.prime(records)
    for rung in (3, 9):
        for objective in (0.3, 0.45, 0.55, 0.65, 0.8):
            expected = copy.deepcopy(seen).decide(9, rung, objective)
            assert copy.deepcopy(primed).decide(9, rung, objective) == expected


def test_the_scheduler_speaks_with_tune(tmp_path: Path) -> None:
    scheduler = make_scheduler(a_spec())
    trials = [ATrial(number) for number in range(4)]
    actions = []
    for trial, objective in zip(trials, (0.5, 0.4, 0.9, 0.3), strict=True):
        scheduler.on_trial_add(None, trial)
        actions.append(scheduler.on_trial_result(None, trial, a_report(3, objective)))
    assert actions == [CONTINUE, CONTINUE, STOP, CONTINUE]
    assert scheduler.on_trial_result(None, trials[3], a_report(27, 0.1)) == STOP
    scheduler.on_trial_complete(None, trials[3], a_report(27, 0.1))
    scheduler.on_trial_remove(None, trials[2])
    assert "3: 4" in scheduler.debug_string()

    scheduler.save(str(tmp_path / "scheduler.pkl"))
    restored = make_scheduler(a_spec())
    restored.restore(str(tmp_path / "scheduler.pkl"))
    assert restored.on_trial_result(None, ATrial(7), a_report(3, 0.9)) == STOP
