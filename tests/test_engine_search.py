"""The engine under real Ray: the same numbers as alone, whatever is killed meanwhile."""

from __future__ import annotations

import functools
import ipaddress
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_listening import listening, sockets_of

from desisky_tune.search.backend import Assignment, Progress
from desisky_tune.search.engine import Work
from desisky_tune.search.engine_client import EngineBackend
from desisky_tune.search.engines import EnginePlan, RunningEngines, running_engines
from desisky_tune.search.events import EnginesReported, Event, TrialFinished, TrialReported
from desisky_tune.search.folds import search_arrays
from desisky_tune.search.local import LocalBackend
from desisky_tune.search.origin import open_run
from desisky_tune.search.run import SearchResult, run_search
from desisky_tune.search.sections import TrainingSpec
from desisky_tune.search.space import load_spec

TRIALS = 6
SPEC = load_spec(
    "quick",
    overrides=(
        f"search.trials={TRIALS}",
        "training.epochs=9",
        "search.grace=3",
        "search.sampler=random",
        "search.scheduler=none",
        "search.default_first=false",
        "evaluation.finalists=0",
        "resources.workers=2",
        "space.width={choices: [8, 16]}",
        "space.depth={low: 1, high: 2}",
    ),
)


def processes(name: str) -> list[psutil.Process]:
    """The processes of this test session's Ray that run an actor of this name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith(f"ray::{name}"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


class Witness:
    """Looks at the processes of a search after its first report."""

    def __init__(self) -> None:
        self.libraries: list[str] = []
        self.addresses: set[str] = set()
        self.figures: list[EnginesReported] = []
        self.reports: list[TrialReported] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, EnginesReported):
            self.figures.append(event)
        if isinstance(event, TrialReported):
            self.reports.append(event)
            if len(self.reports) == 1:
                self.look()

    def look(self) -> None:
        trials = processes("SearchTri")
        assert trials
        self.libraries = [Path(f"/proc/{p.pid}/maps").read_text() for p in trials]
        everything = listening()
        for process in [*trials, *processes("Engine"), *processes("Dispatch")]:
            for inode in sockets_of(process.pid) & set(everything):
                self.addresses.add(everything[inode][0])


@pytest.fixture(scope="module")
def witness() -> Witness:
    return Witness()


@pytest.fixture(scope="module")
def undisturbed(
    ray_instance: Any, tmp_path_factory: pytest.TempPathFactory, witness: Witness
) -> SearchResult:
    runs = tmp_path_factory.mktemp("runs")
    return run_search(SPEC, runs=runs, name="undisturbed", on_event=witness)


def test_the_numbers_are_those_of_a_training_alone(
    undisturbed: SearchResult, tmp_path: Path
) -> None:
    run = open_run(undisturbed.run_dir)
    alone = LocalBackend(search_arrays(run), run.spec.training, tmp_path)
    assert [record.number for record in undisturbed.records] == list(range(TRIALS))
    for record in undisturbed.records:
        progress = alone.advance(Assignment(record.number, record.configuration, record.seed), 9)
        assert record.objective == progress.objective
        assert record.curve == progress.curve


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_light_trials_have_no_jax_and_all_listen_on_loopback(
    undisturbed: SearchResult, witness: Witness
) -> None:
    assert witness.libraries
    assert not any("jaxlib" in libraries for libraries in witness.libraries)
    assert witness.addresses
    assert all(ipaddress.ip_address(each).is_loopback for each in witness.addresses)


def test_a_trial_reports_once_per_rung(undisturbed: SearchResult, witness: Witness) -> None:
    told = sorted((report.trial, report.epochs) for report in witness.reports)
    assert told == [(number, epochs) for number in range(TRIALS) for epochs in (3, 9)]


def test_what_the_engines_did_is_in_the_runs_description(undisturbed: SearchResult) -> None:
    (session,) = open_run(undisturbed.run_dir).folder.read_search()["sessions"]
    (figures,) = session["engines"]
    assert figures["trials"] == TRIALS
    # Two slots, and two trials that wait: no more processes, however many trials.
    assert figures["processes"] == {"engines": 1, "trials": 4, "dispatcher": 1}
    together = figures["all"]
    assert together["slots"] == 2
    assert sum(together["shares"].values()) == pytest.approx(1, abs=1e-3)
    spent = sum(together[name] for name in ("compiling", "training", "keeping", "waiting"))
    assert spent == pytest.approx(together["seconds"], abs=0.01)
    assert 0 < together["training"] < 2 * session["seconds"]


def test_a_killed_engine_costs_no_trial_and_changes_no_number(
    undisturbed: SearchResult, tmp_path: Path
) -> None:
    killed: list[int] = []
    ended: list[int] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, TrialFinished):
            ended.append(event.record.number)
        if isinstance(event, TrialReported) and len(ended) >= 1 and not killed:
            (victim,) = processes("Engine")
            killed.append(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)

    result = run_search(SPEC, runs=tmp_path, name="killed", on_event=kill_once)
    assert killed
    assert sorted(ended) == list(range(TRIALS))
    for one, other in zip(result.records, undisturbed.records, strict=True):
        assert one.configuration == other.configuration
        assert one.objective == other.objective
        assert one.curve == other.curve
    (session,) = open_run(result.run_dir).folder.read_search()["sessions"]
    assert session["engines"][0]["processes"]["engines"] == 2


# ---------------------------------------------------------- one engine, without a search


class Deadly:
    """A backend whose trial 1 ends the process, and whose trial 2 raises."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        if trial.number == 1:
            os._exit(1)
        if trial.number == 2:
            raise MemoryError("4 GiB were asked for\nand more")
        return Progress(epochs, 1 / epochs, epochs - 1, {}, 0.0, 0.0, 0.0)

    def release(self, trial: Assignment) -> None:
        (self.notes / str(trial.number)).touch()


@pytest.fixture
def engines(
    ray_instance: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningEngines]:
    """An engine with two slots and a deadly backend."""
    import ray.cloudpickle

    from desisky_tune.search import engines as module

    # The class travels whole: a worker knows nothing of this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    deadly = functools.partial(module.Engine, backend=Deadly(tmp_path))

    class DeadlyEngine(module.Engine):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, backend=deadly.keywords["backend"])

    monkeypatch.setattr(module, "Engine", DeadlyEngine)
    plan = EnginePlan("cpu-0", "cpu", 2, 2, cpus=1.0, gpus=0, node=None)
    work = Work("run", TrainingSpec(), tmp_path, {})
    with running_engines(ray_instance, [plan], work, None, 1) as running:  # type: ignore[arg-type]
        yield running
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_trial_that_kills_its_engine_fails_alone_with_the_reason(
    engines: RunningEngines, ray_instance: Any, tmp_path: Path
) -> None:
    def assignment(number: int) -> Assignment:
        return Assignment(number, {"width": 8}, seed=0)

    good, fatal, broken = (EngineBackend(engines.dispatcher, max_deaths=1) for _ in range(3))
    assert good.advance(assignment(0), 3).epochs == 3
    failed = fatal.advance(assignment(1), 3)
    assert failed.failed
    # Once beside others, and twice alone: one more than it may.
    assert "engine's process died 2 times while it trained this trial alone" in str(failed.reason)
    raised = broken.advance(assignment(2), 3)
    assert raised.reason == "MemoryError: 4 GiB were asked for"
    # The engine that was started again does not know trial 0: it registers, and goes on.
    assert good.advance(assignment(0), 9).epochs == 9
    for number in range(3):
        ray_instance.get(engines.dispatcher.ended.remote(number))
    ray_instance.get(engines.dispatcher.drain.remote())
    assert (tmp_path / "0").exists()
    assert ray_instance.get(engines.dispatcher.processes.remote())["engines"] == 4
