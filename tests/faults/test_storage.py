"""Storage that fails: for a while, and for good. A folder that a file stands in for is refused
even to root."""

from __future__ import annotations

import asyncio
import math
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from searches import RANDOM, assert_nothing_lost, assert_the_same, spec_of
from virtual_clock import VirtualSearch

from desisky_tune.data.features import load_features
from desisky_tune.data.splits import make_split
from desisky_tune.errors import (
    RESUME_ME,
    DispatcherError,
    EngineError,
    MissingFileError,
    RunError,
    StorageError,
    StorageLostError,
)
from desisky_tune.search import patience
from desisky_tune.search.backend import Assignment
from desisky_tune.search.dispatch import Dispatcher
from desisky_tune.search.events import Event, StorageChanged, TrialFinished, TrialReported
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.folds import search_arrays
from desisky_tune.search.local import LocalBackend, state_path
from desisky_tune.search.origin import SearchRun, checkpoint_header, write_run
from desisky_tune.search.outages import LATE, Outages, through_outages
from desisky_tune.search.patience import check_storage, patiently
from desisky_tune.search.recorder import ERRORS_IN_A_ROW, Recorder
from desisky_tune.search.records import Ledger, TrialRecord
from desisky_tune.search.restarts import FRUITLESS_RESTARTS, Restarts
from desisky_tune.search.run import resume_search, run_search
from desisky_tune.search.stopping import StopRequest
from desisky_tune.search.storage import RunMirror
from desisky_tune.search.trial_files import TrialFiles


class Outage:
    """Takes a folder away at a report, and brings it back when that is told."""

    def __init__(self, run: Path, at: int, *, until_told: bool = False) -> None:
        self.run, self.at, self.until_told = run, at, until_told
        self.away = run.with_name("away")
        self.told: list[StorageChanged] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, StorageChanged):
            self.told.append(event)
            if self.until_told and event.failing:
                self.end()
        if isinstance(event, TrialReported):
            self.at -= 1
            if self.at == 0:
                self.begin()

    def begin(self) -> None:
        self.run.rename(self.away)
        self.run.touch()

    def end(self) -> None:
        self.run.unlink()
        self.away.rename(self.run)


def test_an_outage_that_the_engine_alone_meets_is_told_once(
    ray_instance: Any, tmp_path: Path, undisturbed: list[TrialRecord]
) -> None:
    # The driver's own files can be written all the while: it has this from the engine.
    outage = Outage(tmp_path / "cut" / "trials", at=2, until_told=True)
    run = run_search(spec_of(RANDOM), runs=tmp_path, name="cut", on_event=outage).run_dir
    begun, over = outage.told
    assert begun.failing
    assert f"cannot write {run / 'trials'}" in begun.text
    assert not over.failing
    assert_the_same(assert_nothing_lost(run, spec_of(RANDOM)), undisturbed)
    (session,) = RunFolder.open(run).read_search()["sessions"]
    (engines,) = session["engines"]
    assert engines["storage"]["outages"] == 1
    assert 0 < engines["storage"]["seconds"] < session["seconds"]


def test_a_search_waits_for_storage_and_ends_only_when_it_does_not_come_back(
    long_form: None,
    ray_instance: Any,
    tmp_path: Path,
    undisturbed: list[TrialRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moment = random.Random(11)
    run = tmp_path / "cut"
    for_good = Outage(run, at=moment.randrange(2, 5))
    with monkeypatch.context() as patch:
        patch.setattr(patience, "PATIENCE_SECONDS", 1.0)
        with pytest.raises(StorageLostError, match="desisky-tune resume") as lost:
            run_search(spec_of(RANDOM), runs=tmp_path, name="cut", on_event=for_good)
    assert lost.value.exit_code == RESUME_ME
    (begun,) = for_good.told
    assert "trying again for up to 1 s" in begun.text
    for_good.end()
    assert not (run / "evaluation.json").exists()

    for_a_while = Outage(run, at=moment.randrange(2, 5), until_told=True)
    resume_search(run, on_event=for_a_while)
    assert [event.failing for event in for_a_while.told] == [True, False]
    assert_the_same(assert_nothing_lost(run, spec_of(RANDOM)), undisturbed)


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (
            "ray::train()\ndesisky_tune.errors.StorageError: cannot write 3.state: no space",
            StorageError,
        ),
        ("ray::train()\nOSError: [Errno 5] Input/output error", StorageError),
        ("ray::train()\ndesisky_tune.errors.DispatcherError: it is gone", DispatcherError),
        ("The actor died unexpectedly before finishing this task.", None),
    ],
)
def test_a_trial_that_the_machine_failed_is_not_tried_at_once_again(
    tmp_path: Path, said: str, fault: type[Exception] | None
) -> None:
    error_file = tmp_path / "error.txt"
    error_file.write_text(f"Failure # 1 (occurred at 2021-05-04)\n{said}\n")
    trial = SimpleNamespace(config={"trial": 3, "width": 8}, error_file=str(error_file))
    deaths: Counter[int] = Counter()
    recorder = Recorder(
        RunFolder(tmp_path), [], total=8, max_epochs=9, max_deaths=2, deaths=deaths, seed=0,
        emit=[].append,
    )  # fmt: skip
    recorder.on_trial_recover(0, [], trial)
    assert recorder.has_to_end() == (fault is not None)
    assert recorder.broken is None if fault is None else isinstance(recorder.broken, fault)
    # It is none of the trial's own deaths, of which it has few.
    assert deaths[3] == (1 if fault is None else 0)


def test_a_trial_that_ends_beside_anothers_fault_is_recorded_and_told(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text("{}")
    said: list[Event] = []
    recorder = recorder_of(tmp_path, said)
    recorder.broken = StorageError("cannot write 3.state: no space")
    recorder.on_trial_complete(0, [], trial_with(4, reason="ValueError: no"))
    assert [event.record.number for event in said if isinstance(event, TrialFinished)] == [4]
    assert [record.number for record in recorder.records] == [4]


@pytest.mark.parametrize(
    ("result", "ends"), [({"reason": "ValueError: no"}, True), ({"objective": math.nan}, False)]
)
def test_trials_that_raise_one_after_another_end_a_search_that_had_good_ones(
    tmp_path: Path, result: dict[str, Any], ends: bool
) -> None:
    (tmp_path / "search.json").write_text("{}")
    recorder = recorder_of(tmp_path, [])
    recorder.on_trial_complete(0, [], trial_with(0, objective=0.5))
    for number in range(1, ERRORS_IN_A_ROW):
        recorder.on_trial_complete(0, [], trial_with(number, **result))
    assert not recorder.has_to_end()
    recorder.on_trial_complete(0, [], trial_with(ERRORS_IN_A_ROW, **result))
    assert recorder.has_to_end() == ends
    assert [record.state for record in recorder.records][1:] == ["FAIL"] * ERRORS_IN_A_ROW


def recorder_of(folder: Path, said: list[Event]) -> Recorder:
    return Recorder(
        RunFolder(folder), [], total=99, max_epochs=9, max_deaths=2, deaths=Counter(), seed=0,
        emit=said.append,
    )  # fmt: skip


def trial_with(number: int, objective: float = math.nan, reason: str | None = None) -> Any:
    """A trial of Ray Tune that has come to its end."""
    result = {
        "epochs": 9,
        "objective": objective,
        "reason": reason,
        "rmse": {"V": 0.5, "g": 0.5, "r": 0.5, "z": 0.5},
        "best_epoch": 3,
        "train_loss": 0.1,
        "test_loss": 0.1,
        "seconds": 1.0,
    }
    config = {"trial": number, "width": 8, "depth": 1}
    return SimpleNamespace(config=config, last_result=result)


@pytest.mark.parametrize("nodes_come", [False, True])
def test_a_search_without_engines_waits_for_nodes_where_they_come(
    tmp_path: Path, nodes_come: bool
) -> None:
    said: list[Event] = []
    restarts = Restarts(
        RunFolder(tmp_path), said.append, StopRequest(), Outages(said.append), nodes_come=nodes_come
    )
    fault = EngineError("no engine is left to train on")
    for _ in range(FRUITLESS_RESTARTS if nodes_come else 0):
        restarts.after(fault)
    assert len(said) == (FRUITLESS_RESTARTS if nodes_come else 0)
    with pytest.raises(EngineError, match=r"no engine is left.*desisky-tune resume"):
        restarts.after(fault)


def test_progress_of_finalists_is_progress(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "finalists.jsonl")
    recorder = recorder_of(tmp_path, [])
    (tmp_path / "search.json").write_text("{}")
    recorder.on_trial_complete(0, [], trial_with(0, objective=0.5))
    (record,) = recorder.records
    restarts = Restarts(
        RunFolder(tmp_path), [].append, StopRequest(), Outages([].append), ledger=ledger.path
    )
    for number in range(3 * FRUITLESS_RESTARTS):
        ledger.append(replace(record, number=number))
        restarts.after(DispatcherError("gone"))


@pytest.mark.parametrize(
    "last",
    [
        "sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) readonly database",
        "optuna.exceptions.StorageInternalError: An exception is raised during the commit.",
        "desisky_tune.errors.StorageError: cannot write 3.state: no space",
    ],
)
def test_what_storage_raised_inside_ray_tune_is_known_when_it_is_back(
    tmp_path: Path, last: str
) -> None:
    """Ray Tune raises the text of a traceback in place of what its callbacks raise."""
    (tmp_path / "search.json").write_text("{}")
    said: list[Event] = []
    restarts = Restarts(RunFolder(tmp_path), said.append, StopRequest(), Outages(said.append))
    restarts.after(RuntimeError(f"Traceback (most recent call last):\n  File x\n{last}"))
    assert len(said) == 1
    with pytest.raises(RuntimeError, match="a bug"):
        restarts.after(RuntimeError("a bug"))


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(patience.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(patience.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Failing:
    """An action that storage refuses until a time."""

    def __init__(self, clock: Clock, until: float) -> None:
        self.clock, self.until = clock, until
        self.tried: list[float] = []

    def __call__(self) -> str:
        self.tried.append(self.clock.now)
        if self.clock.now < self.until:
            raise StorageError("no space left")
        return "written"


class Watch:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def failed(self, why: str) -> None:
        self.heard.append(why)

    def worked(self) -> None:
        self.heard.append("worked")


def test_pauses_grow_and_each_attempt_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    action, watch = Failing(clock, until=100.0), Watch()
    assert patiently(action, watch=watch) == "written"
    pauses = [b - a for a, b in zip(action.tried, action.tried[1:], strict=False)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.25, 30.0)
    assert watch.heard == ["no space left"] * (len(action.tried) - 1) + ["worked"]


def test_where_nothing_failed_nothing_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    patiently(Failing(Clock(monkeypatch), until=0.0), watch=watch)
    assert watch.heard == []


class Driver:
    """A driver at a time, and what it was told of storage."""

    def __init__(self) -> None:
        self.now = 0.0
        self.told: list[str] = []
        self.outages = Outages(self.see, clock=lambda: self.now)

    def see(self, event: Event) -> None:
        assert isinstance(event, StorageChanged)
        self.told.append(event.text)


def test_an_outage_is_told_once_whoever_meets_it() -> None:
    driver = Driver()
    driver.outages.heard([(3600.0, "disk full"), (3600.5, "disk full")])
    driver.now = 3605.0
    driver.outages.failed("No such file")
    driver.now = 3640.0
    driver.outages.worked()
    # Engines that tried in vain before that, and had their next pause still before them.
    driver.outages.heard([(3630.0, "disk full"), (3640.0 + LATE / 2, "disk full"), (3661.0, None)])
    assert driver.told == [
        "storage fails since 01:00:00 UTC: disk full; trying again for up to 600 s, trials train "
        "on to their rungs",
        "storage is back after 40 s",
    ]
    assert driver.outages.taken() == (1, 40.0)
    assert driver.outages.taken() == (0, 0.0)


def test_the_next_outage_is_another_one() -> None:
    driver = Driver()
    for at in (100.0, 200.0):
        driver.outages.heard([(at, "disk full"), (at + 5.0, None)])
    assert len(driver.told) == 4
    assert driver.outages.taken() == (2, 10.0)


def test_the_dispatcher_hands_on_what_engines_met_once() -> None:
    async def scene() -> None:
        made = Dispatcher(expected=1)
        await made.tried_storage("cpu-0", "disk full")
        await made.tried_storage("cpu-0", None)
        _, _, attempts = await made.news()
        assert [why for _, why in attempts] == ["disk full", None]
        (began, _), (ended, _) = attempts
        assert began <= ended
        assert (await made.news())[2] == []

    asyncio.run(scene())


def test_patience_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(StorageError, match="no space left"):
        patiently(Failing(clock, until=1e9), limit=45.0)
    assert clock.now == pytest.approx(45.0)


def test_a_search_that_is_to_end_waits_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(StorageError):
        patiently(Failing(clock, until=1e9), give_up=lambda: clock.now >= 3.0)
    assert clock.now == pytest.approx(3.0, abs=0.5)


def test_what_is_no_fault_of_storage_is_raised_at_once() -> None:
    tried = []

    def broken() -> None:
        tried.append(1)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        patiently(broken)
    assert tried == [1]


def test_an_empty_mount_point_is_not_the_runs_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"search\.json is gone"):
        check_storage(tmp_path / "search.json")
    (tmp_path / "search.json").write_text("{}")
    check_storage(tmp_path / "search.json")
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


def a_state(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"state")


def test_a_node_without_the_runs_folder_writes_nothing_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, watch = Clock(monkeypatch), Watch()
    trials, three = tmp_path / "runs" / "deep" / "trials", Assignment(3, {}, seed=0)
    files = TrialFiles(trials, watch=watch, of_run=True)
    for write in (files.write_state, files.write_member):
        with pytest.raises(StorageError, match=r"deep/search\.json is not there on .* nodes share"):
            write(three, three.trainings[0], a_state)
    with pytest.raises(StorageError):
        files.write_weights(three, a_state)
    with pytest.raises(StorageError):
        # It is not begun from nothing either.
        files.read_state(three, three.trainings[0], lambda path: ("state", {}))
    assert list(tmp_path.iterdir()) == []

    def mounted() -> None:
        trials.parent.mkdir(parents=True)
        (trials.parent / "search.json").write_text("{}")

    watch.failed = lambda why: mounted()  # type: ignore[method-assign]
    waited = clock.now
    files.write_state(three, three.trainings[0], a_state)
    assert clock.now == waited + 0.25
    assert state_path(trials, 3).read_bytes() == b"state"


def test_that_storage_works_again_is_told_also_after_a_trial_had_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    watch, three = Watch(), Assignment(3, {}, seed=0)
    files = TrialFiles(tmp_path / "trials", watch=watch)
    (tmp_path / "trials").write_text("stands in for the folder")
    with pytest.raises(FileExistsError):
        files.write_state(three, three.trainings[0], a_state)
    assert set(watch.heard) == {watch.heard[0]} - {"worked"}
    (tmp_path / "trials").unlink()
    for _ in range(2):
        files.write_state(three, three.trainings[0], a_state)
    assert watch.heard.count("worked") == 1
    assert watch.heard[-1] == "worked"


def test_on_a_url_a_node_has_its_own_folder(tmp_path: Path) -> None:
    mirror = RunMirror(f"file://{tmp_path}/bucket/deep", tmp_path / "copy")
    three = Assignment(3, {}, seed=0)
    files = TrialFiles(tmp_path / "copy" / "trials", mirror, of_run=True)
    (tmp_path / "copy").mkdir()
    files.write_state(three, three.trainings[0], a_state)
    assert mirror.places() == ["trials/00003.state"]


def test_a_url_that_cannot_be_written_is_waited_for_though_its_copy_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    mirror = RunMirror(f"file://{tmp_path}/bucket/deep", tmp_path / "copy")
    folder = RunFolder(tmp_path / "copy", mirror)
    folder.write_search({})
    outage = Outage(tmp_path / "bucket" / "deep", at=0)
    said: list[Event] = []
    told = Outages(said.append, clock=lambda: clock.now)
    restarts = Restarts(folder, said.append, StopRequest(), told)
    outage.begin()
    with pytest.raises(StorageLostError, match=r"desisky-tune resume file://.*/bucket/deep"):
        restarts.after(StorageError("a record cannot be written"))
    assert clock.now == pytest.approx(patience.PATIENCE_SECONDS)
    (begun,) = said
    assert isinstance(begun, StorageChanged)
    assert begun.failing

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if outage.away.exists():
            outage.end()

    monkeypatch.setattr(patience.time, "sleep", sleep)
    restarts.after(StorageError("a record cannot be written"))
    assert [each.failing for each in said if isinstance(each, StorageChanged)] == [True, False]


def a_run(tmp_path: Path) -> RunFolder:
    (tmp_path / "search.json").write_text("{}")
    return RunFolder(tmp_path)


def test_beside_the_sessions_storage_is_waited_for_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    said: list[Event] = []
    action = Failing(clock, until=100.0)
    assert through_outages(a_run(tmp_path), action, said.append) == "written"
    assert [each.failing for each in said if isinstance(each, StorageChanged)] == [True, False]
    with pytest.raises(StorageLostError, match=rf"no space left.*desisky-tune resume {tmp_path}"):
        through_outages(a_run(tmp_path), Failing(clock, until=1e9), said.append)
    assert clock.now == pytest.approx(action.tried[-1] + patience.PATIENCE_SECONDS)


def test_an_empty_mount_point_is_not_concluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    with pytest.raises(StorageLostError, match=r"search\.json is gone"):
        through_outages(RunFolder(tmp_path), lambda: pytest.fail("was done"), [].append)


def test_a_file_that_is_missing_from_a_whole_run_is_not_waited_for(tmp_path: Path) -> None:
    tried = []

    def read() -> None:
        tried.append(1)
        raise MissingFileError("cannot read 00003.eqx")

    with pytest.raises(RunError, match=r"cannot read 00003\.eqx"):
        through_outages(a_run(tmp_path), read, [].append)
    assert tried == [1]


def test_a_file_that_is_missing_with_its_run_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    search_json = a_run(tmp_path).search_json

    def read() -> str:
        if not said:
            search_json.unlink()
            raise MissingFileError("cannot read 00003.eqx")
        return "read"

    said: list[Event] = []

    def back(event: Event) -> None:
        said.append(event)
        a_run(tmp_path)

    assert through_outages(RunFolder(tmp_path), read, back) == "read"
    assert len(said) == 2


@pytest.fixture(scope="module")
def at_its_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose driver was killed when its last trial had its record."""
    spec = spec_of((*RANDOM, "search.trials=2", "training.epochs=30", "search.grace=10"))
    table = load_features()
    split = make_split(
        table.frame, spec.split.by, fractions=spec.split.fractions, seed=spec.split.seed
    )
    folder = RunFolder.create(tmp_path_factory.mktemp("runs"), "deep", exact=True)
    run = SearchRun(folder, spec, table, split)
    write_run(run)
    backend = LocalBackend(
        search_arrays(run), spec.training, folder.trials, checkpoint_header(run), of_run=True
    )
    VirtualSearch(spec, folder.path, backend=backend).run()
    return folder.path


class Blocked:
    """A folder that stands in for a file, until somebody is told that it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[bool] = []
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)
        (path / "in the way").touch()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StorageChanged):
            self.told.append(event.failing)
            if event.failing:
                shutil.rmtree(self.path)


@pytest.mark.parametrize("name", ["study.db", "trials.parquet", "best/deep.eqx", "evaluation.json"])
def test_storage_that_fails_after_the_last_trial_is_waited_for(
    at_its_end: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "deep"
    shutil.copytree(at_its_end, run)
    blocked = Blocked(run / name)
    if name == "trials.parquet":
        with monkeypatch.context() as patch:
            patch.setattr(patience, "PATIENCE_SECONDS", 0.0)
            with pytest.raises(StorageLostError, match=f"desisky-tune resume {run}") as lost:
                resume_search(run)
        assert lost.value.exit_code == RESUME_ME
    result = resume_search(run, on_event=blocked)
    assert blocked.told == [True, False]
    content = RunFolder.open(run).read_search()
    assert len(content["sessions"]) == 1
    assert content["result"]["winner"] == result.winner.number

    undisturbed = tmp_path / "whole" / "deep"
    shutil.copytree(at_its_end, undisturbed)
    assert resume_search(undisturbed).evaluation == result.evaluation
