"""A deterministic search: whatever finishes first, the same is suggested and stopped."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.utils.util import flatten_dict
from virtual_clock import FakeBackend, FakeTrial

from desisky_tune.errors import SpaceError
from desisky_tune.search.backend import Assignment, Backend
from desisky_tune.search.engines import EnginePlan, with_room_for_all
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.folds import search_arrays
from desisky_tune.search.leaderboard import leaderboard
from desisky_tune.search.local import LocalBackend
from desisky_tune.search.ordering import (
    OrderedScheduler,
    OrderedSearch,
    Ordering,
    fixed_in_flight,
)
from desisky_tune.search.origin import open_run
from desisky_tune.search.recorder import Recorder
from desisky_tune.search.records import Ledger, TrialRecord
from desisky_tune.search.run import run_search
from desisky_tune.search.schedulers import make_scheduler
from desisky_tune.search.searcher import StudySearch
from desisky_tune.search.space import SearchSpec, load_spec, rungs, spec_from_dict
from desisky_tune.search.study import rebuild_study
from desisky_tune.search.verdicts import GO, REST, STOP, Verdict, Verdicts

Durations = Callable[[int, int], float]

SPACE = {
    "width": {"low": 16, "high": 512, "log": True},
    "depth": {"low": 1, "high": 6},
    "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
    "huber_delta": {"low": 0.01, "high": 2.0, "log": True},
    "batch_size": {"choices": [16, 32, 64]},
}


def a_spec(trials: int = 12, **search: Any) -> SearchSpec:
    options = {"trials": trials, "grace": 10, "startup_trials": 4, "deterministic": True, **search}
    return spec_from_dict({"space": SPACE, "training": {"epochs": 90}, "search": options})


class RacingSearch:
    """A search of trials side by side that take as long as `durations` says.

    It stands where Ray Tune's controller and the dispatcher stand: reports arrive by the
    durations, and a trial goes on from a rung when its verdict has come.
    """

    def __init__(
        self,
        spec: SearchSpec,
        folder: Path,
        durations: Durations,
        workers: int = 4,
        backend: Backend | None = None,
    ) -> None:
        self.spec, self.folder, self.durations = spec, RunFolder(folder), durations
        folder.mkdir(parents=True, exist_ok=True)
        self.folder.search_json.touch()
        self.workers = workers
        # Some end early: between two rungs, and at one.
        fake = FakeBackend(nan_at={4: 15, 6: 0}, ends_at={2: 22, 5: 10, 8: 30})
        self.backend: Backend = backend or fake
        self.clock = 0.0
        self.trained: list[int] = []
        self._queue: list[tuple[float, int, FakeTrial]] = []
        self._waiting: dict[int, FakeTrial] = {}
        self._verdicts: dict[tuple[int, int], Verdict] = {}
        self._live = 0

    def run(self, until: float = math.inf) -> list[TrialRecord]:
        """Search until all have ended or the clock passes `until`; go on from a ledger."""
        spec, known = self.spec, Ledger(self.folder.ledger).records()
        rebuild_study(self.folder.study, spec, ())
        inner = StudySearch(spec, self.folder.study, workers=self.workers)
        started = self.folder.read_started()
        ordering = Ordering(inner, make_scheduler(spec), self.workers, known, started)
        ordering.judged_by(self._judge)
        self.searcher = OrderedSearch(ordering, inner)
        self.scheduler = OrderedScheduler(ordering)
        self.recorder = Recorder(
            self.folder, known, total=spec.search.trials, max_epochs=spec.training.epochs,
            max_deaths=0, deaths=Counter(), seed=0, emit=lambda event: None,
        )  # fmt: skip
        try:
            self._hand_out()
            while self._queue:
                self.clock, _, trial = heapq.heappop(self._queue)
                if self.clock > until:
                    break
                self._report(trial)
                self._obey_verdicts()
                self._hand_out()
            else:
                assert not self._waiting, "trials wait for ever"
        finally:
            self.searcher.close()
        return self.recorder.records

    def _judge(self, number: int, epochs: int, verdict: Verdict) -> None:
        self._verdicts[number, epochs] = verdict

    def _hand_out(self) -> None:
        while self._live < self.workers:
            config = self.searcher.suggest(f"tune-{len(self.trained)}")
            if config is None or config == Searcher.FINISHED:
                return
            trial = FakeTrial(f"tune-{len(self.trained)}", dict(config))
            self.trained.append(config["trial"])
            self._live += 1
            self.recorder.on_trial_start(0, [], trial)
            self._schedule(trial)

    def _schedule(self, trial: FakeTrial) -> None:
        target = next(rung for rung in rungs(self.spec) if rung > trial.epochs)
        spent = self.durations(trial.config["trial"], target)
        heapq.heappush(self._queue, (self.clock + spent, trial.config["trial"], trial))

    def _report(self, trial: FakeTrial) -> None:
        number = trial.config["trial"]
        configuration = {name: value for name, value in trial.config.items() if name != "trial"}
        target = next(rung for rung in rungs(self.spec) if rung > trial.epochs)
        progress = self.backend.advance(Assignment(number, configuration, 0), target)
        trial.epochs, trial.last_result = progress.epochs, progress.as_result(rungs(self.spec))
        if progress.ends_at(self.spec.training.epochs):
            self._complete(trial)
            return
        flat = flatten_dict(trial.last_result)
        assert self.scheduler.on_trial_result(None, trial, flat) == TrialScheduler.CONTINUE
        self._waiting[number] = trial

    def _complete(self, trial: FakeTrial) -> None:
        self._live -= 1
        self.searcher.on_trial_complete(trial.trial_id, flatten_dict(trial.last_result))
        self.recorder.on_trial_complete(0, [], trial)

    def _obey_verdicts(self) -> None:
        for number, trial in list(self._waiting.items()):
            verdict = self._verdicts.get((number, trial.epochs))
            if verdict is not None:
                del self._waiting[number]
                self._schedule(trial) if verdict == GO else self._complete(trial)


def board(records: list[TrialRecord]) -> list[tuple[Any, ...]]:
    """The leaderboard, times apart."""
    table = leaderboard(records).drop(columns="seconds")
    return [tuple(map(str, row)) for row in table.itertuples(index=False)]


def raced(spec: SearchSpec, durations: Durations, *cuts: float) -> list[TrialRecord]:
    """The records of a search that was interrupted at each of the cuts."""
    with TemporaryDirectory() as folder:
        for until in cuts:
            RacingSearch(spec, Path(folder), durations).run(until)
        return RacingSearch(spec, Path(folder), durations).run()


def drawn_durations(seconds: list[float]) -> Durations:
    return lambda number, rung: seconds[(7 * number + rung) % len(seconds)]


@pytest.fixture(scope="module")
def expected() -> list[tuple[Any, ...]]:
    """The leaderboard where all rungs last as long."""
    return board(raced(a_spec(), lambda number, rung: 1.0))


SECONDS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=40)


@settings(max_examples=5, deadline=None)
@given(seconds=SECONDS)
def test_the_leaderboard_is_the_same_for_any_durations(
    expected: list[tuple[Any, ...]], seconds: list[float]
) -> None:
    assert board(raced(a_spec(), drawn_durations(seconds))) == expected


@settings(max_examples=3, deadline=None)
@given(seconds=SECONDS, cuts=st.lists(st.floats(0, 2000), min_size=1, max_size=3))
def test_it_is_the_same_however_often_the_search_is_interrupted(
    expected: list[tuple[Any, ...]], seconds: list[float], cuts: list[float]
) -> None:
    assert board(raced(a_spec(), drawn_durations(seconds), *cuts)) == expected


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("tpe", "none"), ("gp", "asha"), ("cmaes", "asha"), ("random", "asha"), ("qmc", "asha")],
)
def test_every_sampler_and_scheduler_repeats_itself(sampler: str, scheduler: str) -> None:
    spec = a_spec(9, sampler=sampler, scheduler=scheduler)
    boards = [
        board(raced(spec, durations))
        for durations in (
            lambda number, rung: 1.0,
            lambda number, rung: 500.0 / (1 + 7 * number % 5),
        )
    ]
    assert boards[0] == boards[1]
    states = Counter(row[2] for row in boards[0])
    assert states["FAIL"] >= 1
    assert (states["PRUNED"] > 0) == (scheduler == "asha")


def test_without_it_the_durations_do_decide(tmp_path: Path) -> None:
    """The property would hold of anything if the decisions did not depend on their order."""
    from virtual_clock import VirtualSearch

    boards = []
    for workers in (2, 5):
        spec = a_spec(deterministic=False)
        folder = tmp_path / str(workers)
        boards.append(board(VirtualSearch(spec, folder, workers=workers).run()))
    assert boards[0] != boards[1]


def test_what_a_ledger_knows_is_not_trained_again(tmp_path: Path) -> None:
    spec = a_spec()
    whole = RacingSearch(spec, tmp_path / "whole", lambda number, rung: 1.0)
    whole.run()
    cut = RacingSearch(spec, tmp_path / "cut", lambda number, rung: 1.0)
    done = {record.number for record in cut.run(until=whole.clock / 2)}
    again = RacingSearch(spec, tmp_path / "cut", lambda number, rung: 1.0)
    again.run()
    assert 0 < len(done) < 12
    assert not done & set(again.trained)


# --- verdicts and places -------------------------------------------------------------------------


def test_a_trial_waits_until_its_verdict_is_given() -> None:
    async def life() -> list[Verdict]:
        desk = Verdicts()
        asked = [asyncio.ensure_future(desk.verdict(n, epochs)) for n, epochs in ((1, 3), (2, 3))]
        await asyncio.sleep(0)
        await desk.judge(1, 1, GO)
        await asyncio.sleep(0)
        assert not any(each.done() for each in asked)
        await desk.judge(1, 3, GO)
        await desk.judge(2, 1, STOP)
        later = [desk.verdict(1, 1), desk.verdict(2, 9)]
        waiting = asyncio.ensure_future(desk.verdict(1, 9))
        await asyncio.sleep(0)
        await desk.rest()
        return [*await asyncio.gather(*asked, *later), await waiting]

    assert asyncio.run(life()) == [GO, STOP, GO, STOP, REST]


def test_each_engine_has_room_for_all_trials_in_flight() -> None:
    plans = [EnginePlan(name, "cpu", 2, 2, 1.96, 0, None) for name in ("a", "b")]
    assert [plan.room for plan in with_room_for_all(plans, 8)] == [8, 8]
    assert [plan.cpus for plan in with_room_for_all(plans, 8)] == [1.96, 1.96]
    # Taken up on a smaller machine: the light trials need their share of its CPUs.
    (small,) = with_room_for_all(plans[:1], 8)
    assert small.room == 8
    assert small.cpus == pytest.approx(1.96 - 0.01 * 4)


def test_on_gpus_the_slots_must_be_given() -> None:
    with pytest.raises(SpaceError, match=r"resources.slots = 'auto'.*goes by the clock"):
        load_spec("quick", ["search.deterministic=true", "resources.gpus_per_trial=1"])
    load_spec(
        "quick",
        ["search.deterministic=true", "resources.gpus_per_trial=1", "resources.slots=8"],
    )


# --- a real one ----------------------------------------------------------------------------------


def test_a_real_search_is_the_same_as_one_on_another_clock(
    ray_instance: Any, tmp_path: Path
) -> None:
    """Ray's own timing against reports in the opposite order; the trainings are real in both."""
    spec = load_spec(
        "quick",
        [
            "search.deterministic=true",
            "search.trials=8",
            "search.grace=2",
            "search.startup_trials=3",
            "training.epochs=8",
            "space.width={choices: [8, 64]}",
            "space.depth={low: 1, high: 2}",
            "evaluation.finalists=0",
            "resources.workers=2",
        ],
    )
    real = run_search(spec, runs=tmp_path, name="real")
    run = open_run(real.run_dir)
    in_flight = fixed_in_flight(run, 1)
    assert in_flight > 1
    backend = LocalBackend(search_arrays(run), spec.training, tmp_path / "weights")
    # Who was handed out last reports first.
    other = RacingSearch(
        spec, tmp_path / "other", lambda number, target: 1 / (1 + number), in_flight, backend
    )
    records = sorted(other.run(), key=lambda record: record.number)
    assert board(records) == board(real.records)
    assert [record.curve for record in records] == [record.curve for record in real.records]
    assert {record.state for record in records} == {"COMPLETE", "PRUNED"}
