"""Storage that fails: for a while, and for good. A folder that a file stands in for is refused
even to root."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from searches import RANDOM, assert_nothing_lost, assert_the_same, spec_of

from desisky_tune.errors import RESUME_ME, StorageError, StorageLostError
from desisky_tune.search import patience
from desisky_tune.search.events import Event, Note, TrialReported
from desisky_tune.search.patience import check_storage, patiently
from desisky_tune.search.records import TrialRecord
from desisky_tune.search.run import resume_search, run_search


class Outage:
    """Takes a run's folder away at a report, and brings it back after a time, if one is given."""

    def __init__(self, run: Path, at: int, seconds: float | None = None) -> None:
        self.run, self.at, self.seconds = run, at, seconds
        self.away = run.with_name("away")
        self.notes: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)
        if isinstance(event, TrialReported):
            self.at -= 1
            if self.at == 0:
                self.begin()

    def begin(self) -> None:
        self.run.rename(self.away)
        self.run.touch()
        if self.seconds is not None:
            threading.Timer(self.seconds, self.end).start()

    def end(self) -> None:
        self.run.unlink()
        self.away.rename(self.run)


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
    assert sum("trying again for up to 1 s" in note for note in for_good.notes) >= 1
    for_good.end()
    assert not (run / "evaluation.json").exists()

    # Where an engine writes and not the driver, it waits without a word.
    for_a_while = Outage(run, at=moment.randrange(2, 5), seconds=moment.uniform(1.0, 3.0))
    resume_search(run, on_event=for_a_while)
    assert for_a_while.at <= 0
    assert_the_same(assert_nothing_lost(run, spec_of(RANDOM)), undisturbed)


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


def test_pauses_grow_and_the_outage_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    action, told = Failing(clock, until=100.0), []
    assert patiently(action, tell=told.append) == "written"
    pauses = [b - a for a, b in zip(action.tried, action.tried[1:], strict=False)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.25, 30.0)
    first, last = told
    assert first == "storage fails: no space left; trying again for up to 600 s"
    assert last.startswith("storage is back after 1")


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
