"""Whole searches on real Ray: every trial once, the winner measured as it was written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from sqlalchemy.exc import OperationalError

from desisky_tune.data.columns import BANDS, FEATURES, TARGETS
from desisky_tune.data.features import load_features
from desisky_tune.data.splits import make_split
from desisky_tune.errors import InputError, RunError, SearchError
from desisky_tune.search import run, study_storage
from desisky_tune.search.events import Event, Note, TrialFinished, TrialReported
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.origin import SearchRun, write_run
from desisky_tune.search.records import Ledger
from desisky_tune.search.run import SearchResult, resume_search, run_search
from desisky_tune.search.searcher import StudySearch
from desisky_tune.search.space import load_spec
from desisky_tune.search.study import rebuild_study

#: One trial at a time where nothing asks for more: each process takes a second to start.
ALONE = ("resources.workers=1",)

SMALL = (
    "search.trials=5",
    "training.epochs=9",
    "search.grace=3",
    "search.reduction=3",
    "resources.workers=2",
    "evaluation.finalists=0",
    "space.width={choices: [8, 16, 128]}",
    "space.depth={low: 1, high: 2}",
)


def small(*overrides: str) -> Any:
    return load_spec("quick", overrides=(*SMALL, *overrides))


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def result(
    ray_instance: Any, tmp_path_factory: pytest.TempPathFactory, events: list[Event]
) -> SearchResult:
    runs = tmp_path_factory.mktemp("runs")
    return run_search(small(), runs=runs, name="small", on_event=events.append)


def test_every_trial_is_recorded_once(result: SearchResult, events: list[Event]) -> None:
    assert [record.number for record in result.records] == [0, 1, 2, 3, 4]
    assert {record.state for record in result.records} <= {"COMPLETE", "PRUNED"}
    told = [event.record.number for event in events if isinstance(event, TrialFinished)]
    assert sorted(told) == [0, 1, 2, 3, 4]


def test_the_first_trial_is_the_documented_default_in_full(result: SearchResult) -> None:
    first = result.records[0]
    assert first.state == "COMPLETE"
    expected = {
        "width": 128,
        "depth": 5,
        "learning_rate": 1e-4,
        "huber_delta": 0.25,
        "batch_size": 32,
    }
    assert first.configuration == expected


def test_trials_report_at_their_rungs(result: SearchResult, events: list[Event]) -> None:
    reports = [event for event in events if isinstance(event, TrialReported)]
    assert {event.epochs for event in reports} == {3, 9}
    for record in result.records:
        assert record.epochs == (9 if record.state == "COMPLETE" else 3)
        assert all(len(series) == record.epochs for series in record.curve.values())
        assert set(record.curve) == {"train_loss", "test_loss", *BANDS}


def test_the_objective_is_the_lowest_mean_of_the_band_rmse(result: SearchResult) -> None:
    for record in result.records:
        mean = np.mean([record.curve[band] for band in BANDS], axis=0)
        assert record.objective == pytest.approx(mean.min(), rel=1e-6)
        assert mean[record.best_epoch] == pytest.approx(mean.min(), rel=1e-6)


def test_study_and_ledger_agree(result: SearchResult) -> None:
    storage = f"sqlite:///{result.run_dir / 'study.db'}"
    study = optuna.load_study(study_name=None, storage=storage)
    trials = {trial.number: trial for trial in study.trials}
    assert sorted(trials) == [record.number for record in result.records]
    for record in result.records:
        assert trials[record.number].state.name == record.state
        assert trials[record.number].intermediate_values == record.rungs
        if record.state == "COMPLETE":
            assert trials[record.number].value == record.objective


def test_tables_hold_one_row_per_trial_and_per_epoch(result: SearchResult) -> None:
    trials = pd.read_parquet(result.run_dir / "trials.parquet")
    curves = pd.read_parquet(result.run_dir / "curves.parquet")
    assert len(trials) == 5
    assert len(curves) == sum(record.epochs for record in result.records)


def test_split_is_by_night_and_recorded_by_exposure(result: SearchResult) -> None:
    split = json.loads((result.run_dir / "search.json").read_text())["split"]
    parts = [set(split[part]) for part in ("train", "validation", "test")]
    frame = pd.read_parquet(result.run_dir / "features.parquet")
    assert set.union(*parts) == set(frame["EXPID"])
    assert sum(map(len, parts)) == len(frame)
    night = frame.set_index("EXPID")["NIGHT"]
    nights = [set(night.loc[sorted(part)]) for part in parts]
    assert sum(map(len, nights)) == len(set.union(*nights))


def test_reported_figures_are_those_of_the_file(result: SearchResult) -> None:
    import equinox as eqx
    import jax

    with open(result.checkpoint, "rb") as stream:
        header = json.loads(stream.readline())
        arch = header["arch"]
        like = eqx.nn.MLP(**arch, key=jax.random.PRNGKey(0))
        model = eqx.tree_deserialise_leaves(stream, like)
    assert header["features"] == list(FEATURES)
    frame = pd.read_parquet(result.run_dir / "features.parquet").set_index("EXPID")
    split = json.loads((result.run_dir / "search.json").read_text())["split"]
    for part in ("validation", "test"):
        rows = frame.loc[split[part]]
        inputs = rows[list(FEATURES)].to_numpy(np.float32)
        residual = np.asarray(jax.vmap(model)(inputs)) - rows[list(TARGETS)].to_numpy()
        expected = np.sqrt(np.mean(residual.astype(float) ** 2, axis=0))
        figures = result.evaluation["figures"]["winner"][part]
        np.testing.assert_allclose([figures[band] for band in BANDS], expected, atol=2e-5)
        assert figures["mean"] == pytest.approx(expected.mean(), abs=2e-5)
        assert figures["mean_grz"] == pytest.approx(expected[1:].mean(), abs=2e-5)
    assert result.winner.objective == pytest.approx(
        result.evaluation["figures"]["winner"]["validation"]["mean"], abs=1e-3
    )


def test_evaluation_names_the_baselines(result: SearchResult) -> None:
    expected = {"winner", "default", "classical", "constant"}
    assert set(result.evaluation["figures"]) - {"trees"} == expected
    frame = pd.read_parquet(result.run_dir / "features.parquet").set_index("EXPID")
    split = json.loads((result.run_dir / "search.json").read_text())["split"]
    mean = frame.loc[split["train"], list(TARGETS)].mean()
    scatter = np.sqrt(((frame.loc[split["test"], list(TARGETS)] - mean) ** 2).mean())
    figures = result.evaluation["figures"]["constant"]["test"]
    np.testing.assert_allclose([figures[band] for band in BANDS], scatter, rtol=1e-6)


def test_a_finished_run_resumes_to_itself(result: SearchResult) -> None:
    before = (result.run_dir / "ledger.jsonl").read_bytes()
    again = resume_search(result.run_dir)
    assert (result.run_dir / "ledger.jsonl").read_bytes() == before
    assert again.evaluation == result.evaluation
    assert again.winner == result.winner


def test_a_driver_killed_after_its_last_trial_leaves_no_study_behind_the_ledger(
    result: SearchResult, tmp_path: Path
) -> None:
    """The study's file is written behind the search; a kill may find it a trial short."""
    copy = tmp_path / "small"
    shutil.copytree(result.run_dir, copy)
    folder = RunFolder(copy)
    rebuild_study(folder.study, small(), result.records[:3])
    content = folder.read_search()
    folder.write_search({k: v for k, v in content.items() if k not in ("schema", "result")})
    folder.evaluation.unlink()
    resumed = resume_search(copy)
    assert resumed.records == result.records
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder.study}")
    assert [trial.number for trial in study.trials] == [0, 1, 2, 3, 4]
    assert [trial.value for trial in study.trials] == [each.objective for each in result.records]


def test_the_studys_file_follows_while_trials_run(
    ray_instance: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_storage, "PERIOD", 0.0)
    held: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, TrialFinished):
            with closing(sqlite3.connect(tmp_path / "followed" / "study.db")) as study:
                ((count,),) = study.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'")
                held.append(count)

    run_search(
        small("search.scheduler=none", *ALONE), runs=tmp_path, name="followed", on_event=look
    )
    # A trial is written at the end of the step in which it was told.
    assert held == [0, 1, 2, 3, 4]


def test_a_study_that_could_not_be_written_at_the_end_is_written_anew(
    ray_instance: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(storage: study_storage.StudyStorage) -> None:
        if storage.path.name == "study.db":
            raise OperationalError("INSERT", {}, Exception("database is locked"))
        flush(storage)

    flush = study_storage.StudyStorage.flush
    monkeypatch.setattr(study_storage.StudyStorage, "flush", locked)
    ended = run_search(small(*ALONE), runs=tmp_path, name="locked")
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/locked/study.db")
    assert [trial.value for trial in study.trials] == [each.objective for each in ended.records]


def test_what_the_end_needs_is_imported_while_trials_run(
    result: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One library for each finished trial; one that is not installed is none the less over."""
    imported: list[str] = []

    def take(name: str) -> None:
        imported.append(name)
        if name == "missing":
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(run, "AT_THE_END", ("first", "missing", "last"))
    monkeypatch.setattr(run.importlib, "import_module", take)
    told: list[object] = []
    sink = run._importing(told.append)
    finished = TrialFinished(result.records[0], 1, 9, None)
    given = [Note("begins"), *[finished] * 5]
    for event in given:
        sink(event)
    assert told == given
    assert imported == ["first", "missing", "last"]


def test_a_taken_name_is_refused(result: SearchResult, ray_instance: Any) -> None:
    with pytest.raises(RunError, match="small exists"):
        run_search(small(), runs=result.run_dir.parent, name="small")


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "x" * 101])
def test_a_run_cannot_leave_its_folder(name: str, tmp_path: Path, ray_instance: Any) -> None:
    with pytest.raises(RunError, match="run name"):
        run_search(small(), runs=tmp_path / "runs", name=name)
    assert not (tmp_path / "runs").exists()


#: With a learning rate of 10, sixteen layers overflow float32 in the first epoch.
DEEP = ("space.width=64", "space.depth=16", "space.batch_size=16")


def test_a_diverging_trial_is_a_failure_with_a_reason(ray_instance: Any, tmp_path: Path) -> None:
    spec = small(*ALONE, *DEEP, "space.learning_rate={choices: [1.0e-3, 10]}", "search.trials=6")
    result = run_search(spec, runs=tmp_path, name="nan")
    failed = [r for r in result.records if r.configuration["learning_rate"] == 10]
    assert failed
    for record in failed:
        assert record.state == "FAIL"
        assert record.objective is None
        assert record.reason
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{result.run_dir / 'study.db'}")
    for record in result.records:
        assert study.trials[record.number].state.name == record.state


def test_a_search_in_which_nothing_completes_fails(ray_instance: Any, tmp_path: Path) -> None:
    spec = small(*ALONE, *DEEP, "space.learning_rate=10", "search.default_first=false")
    with pytest.raises(SearchError, match="all 5 trials that ended failed"):
        run_search(spec, runs=tmp_path, name="all-nan")
    assert not (tmp_path / "all-nan" / "best").exists()
    records = Ledger(tmp_path / "all-nan" / "ledger.jsonl").records()
    assert [record.state for record in records] == ["FAIL"] * 5


def test_a_driver_killed_before_its_first_trial_began_loses_none(
    ray_instance: Any, tmp_path: Path
) -> None:
    spec = small(*ALONE, "search.trials=2")
    table = load_features()
    split = make_split(table.frame)
    folder = RunFolder.create(tmp_path, "early", exact=True)
    write_run(SearchRun(folder, spec, table, split))
    searcher = StudySearch(spec, folder.study)
    assert searcher.suggest("tune-1")["trial"] == 0
    searcher.close()
    result = resume_search(folder.path)
    assert [record.number for record in result.records] == [0, 1]
    assert result.records[0].configuration["width"] == 128


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("[MOONSEP, MOONALTITUDE]", "MOONALTITUDE"),
        ("[MOONSEP, SEEING_ETC]", "SEEING_ETC is no"),
    ],
)
def test_features_that_cannot_be_learnt_from_are_refused_at_once(
    features: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_search(small(f"data.features={features}"), runs=tmp_path, name="own")
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_machine_has_is_refused(ray_instance: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="a trial asks for 1 CPU and 64 GPU"):
        run_search(small("resources.gpus_per_trial=64"), runs=tmp_path, name="gpus")
    # Its name is still to be had.
    assert list(tmp_path.iterdir()) == []


RANDOM = ("search.sampler=random", "search.scheduler=none", "search.trials=6")


def test_a_killed_trial_process_loses_nothing(ray_instance: Any, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, TrialFinished) and not killed:
            victims = trial_processes()
            assert victims
            os.kill(victims[0], signal.SIGKILL)
            killed.append(victims[0])

    spec = small(*RANDOM, "search.default_first=false")
    result = run_search(spec, runs=tmp_path, name="shot", on_event=kill_once)
    assert killed
    assert [record.number for record in result.records] == list(range(6))
    assert {record.state for record in result.records} == {"COMPLETE"}
    # Only the documented default is called so.
    assert set(result.evaluation["figures"]) - {"trees"} == {"winner", "classical", "constant"}


def trial_processes() -> list[int]:
    """Process ids of the trials of this test session's Ray."""
    import psutil

    mine = psutil.Process().children(recursive=True)
    return sorted(p.pid for p in mine if p.name().startswith("ray::SearchTria"))
