"""The control path alone: nodes simulated on this machine, each with an engine that only sleeps.

    python benchmarks/scaling.py                            # 1, 2, 4, 8 nodes; 500, 2000 trials
    python benchmarks/scaling.py --nodes 1 2 --trials 40    # in small
    python benchmarks/scaling.py --nodes 8 --profile        # and what the driver's time goes into

Each node is a Ray node of its own (`ray.cluster_utils`), and its engine has `--slots` slots. A
trial sleeps as long, over its rungs, as makes all slots together finish `--rate` trials a second:
twice the nodes, twice the time, the same work for the driver. So each row asks the same of the
control path, and the rows differ by what more nodes cost it; a rate that it cannot keep shows its
ceiling in the column of trials/s. Everything else is as in a search: light trials, dispatcher,
ledger, study, early stopping off. For each number of nodes there is one search of as many trials
as the last of `--trials`; each row is a stretch of it, so that the rows of one search show what
its growing state costs.

The efficiency is the time that the sleeping takes with every slot always busy, over the time that
it took. All nodes share this machine's cores: on a cluster engines and trials have their own, and
the driver, the dispatcher and Ray's control store (GCS) alone are shared. So the CPU time of each
kind of process is given too; what the shared ones take bounds a cluster.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from _machine import describe

from desisky_tune.data.columns import BANDS
from desisky_tune.ray_session import LOOPBACK_ENVIRONMENT
from desisky_tune.search.backend import CURVE_SERIES, Assignment, Progress
from desisky_tune.search.events import Event, TrialFinished, TrialReported

#: Trials between two looks at the processes.
LOOK_EVERY = 20

#: Whose CPU time is told apart, by how the titles of their processes begin.
KINDS = {
    "ray::Dispatcher": "dispatcher",
    "ray::SearchTrial": "trials",
    "ray::Sleeping": "engines",
    "gcs_server": "GCS",
    "raylet": "raylets",
}
COLUMNS = ("driver", "dispatcher", "GCS", "trials", "engines", "raylets", "others")

HEADER = (
    "| nodes | slots | a trial (s) | trials | ideal (s) | time (s) | efficiency | trials/s | "
    f"CPU a trial (ms): {' | '.join(COLUMNS)} | start (s) | state, kB a trial |\n"
    f"|{'---|' * (len(COLUMNS) + 10)}"
)


@dataclass(frozen=True)
class Mark:
    """Where a search stood: trials done, the time (s), kind and CPU time (s) by process."""

    trials: int
    at: float
    cpu: dict[int, tuple[str, float]]

    def spent_since(self, before: Mark) -> Counter[str]:
        """Return the CPU time since then by kind (s), a process being of the kind it is now."""
        spent = Counter[str]()
        for process, (kind, seconds) in self.cpu.items():
            spent[kind] += seconds - before.cpu.get(process, ("", 0.0))[1]
        return spent


class SleepingBackend:
    """Takes its time and learns nothing.

    Parameters
    ----------
    seconds
        Of a trial in all.
    epochs
        Of a trial in all.
    """

    def __init__(self, seconds: float, epochs: int) -> None:
        self._pace = seconds / epochs
        self._reached: dict[int, int] = {}

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        """Sleep as long as these epochs take."""
        before = self._reached.get(trial.number, 0)
        time.sleep(self._pace * (epochs - before))
        self._reached[trial.number] = epochs
        falling = [1.0 + 1.0 / (1 + epoch) for epoch in range(epochs)]
        return Progress(
            epochs=epochs,
            objective=falling[-1],
            best_epoch=epochs - 1,
            rmse=dict.fromkeys(BANDS, falling[-1]),
            train_loss=falling[-1],
            test_loss=falling[-1],
            seconds=self._pace * epochs,
            curve=dict.fromkeys(CURVE_SERIES, falling),
            objectives=falling,
        )

    def release(self, trial: Assignment) -> None:
        """Forget a trial."""
        self._reached.pop(trial.number, None)


def main() -> None:
    """Measure and print a Markdown table."""
    options = arguments()
    for name, value in LOOPBACK_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    print(describe(["ray", "optuna"]))
    print(HEADER)
    for nodes in options.nodes:
        print(measure(nodes, options), flush=True)


def arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--trials", type=int, nargs="+", default=[500, 2000], help="ascending")
    parser.add_argument("--slots", type=int, default=4, help="of each engine")
    parser.add_argument("--rate", type=float, default=8.0, help="trials/s that slots could do")
    parser.add_argument("--epochs", type=int, default=225, help="rungs at 25, 75, 225")
    parser.add_argument("--profile", action="store_true", help="the driver's functions, too")
    return parser.parse_args()


def measure(nodes: int, options: argparse.Namespace) -> str:
    """Run one search; return its rows."""
    from ray.cluster_utils import Cluster

    slots = nodes * options.slots
    seconds = slots / options.rate
    node = {"num_cpus": options.slots, "num_gpus": 0, "object_store_memory": 100 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        with tempfile.TemporaryDirectory(prefix="desisky-tune-scaling-") as runs:
            start, marks, size = search(cluster.address, Path(runs), seconds, options)
    finally:
        cluster.shutdown()
    rows = []
    for before, after in pairwise(marks):
        trials, wall = after.trials - before.trials, after.at - before.at
        ideal = trials / options.rate
        spent = after.spent_since(before)
        cpu = " | ".join(f"{1e3 * spent[kind] / trials:.0f}" for kind in COLUMNS)
        rows.append(
            f"| {nodes} | {slots} | {seconds:g} | {before.trials + 1} to {after.trials} | "
            f"{ideal:.1f} | {wall:.1f} | {100 * ideal / wall:.0f} % | {trials / wall:.1f} | "
            f"{cpu} | {start:.1f} | {size / 1e3 / marks[-1].trials:.1f} |"
        )
    return "\n".join(rows)


def search(
    address: str, runs: Path, seconds: float, options: argparse.Namespace
) -> tuple[float, list[Mark], int]:
    """Return the time until trials ran (s), where the search stood, and bytes on disk."""
    from desisky_tune.data.features import load_features
    from desisky_tune.data.splits import make_split
    from desisky_tune.ray_session import ray_session
    from desisky_tune.search.folder import RunFolder
    from desisky_tune.search.origin import SearchRun, write_run
    from desisky_tune.search.records import Ledger
    from desisky_tune.search.space import load_spec

    total = options.trials[-1]
    spec = load_spec(
        "quick",
        overrides=(
            f"search.trials={total}",
            f"training.epochs={options.epochs}",
            "search.sampler=random",
            "search.scheduler=none",
        ),
    )
    table = load_features()
    run = SearchRun(
        RunFolder.create(runs, "scaling", exact=True), spec, table, make_split(table.frame)
    )
    write_run(run)
    before = size_of(run.folder.path)
    marks: list[Mark] = []
    times = CpuTimes()

    def tell(event: Event) -> None:
        if isinstance(event, TrialReported) and not marks:
            # The start of the engines was over when the first rung began.
            began = time.monotonic() - seconds * event.epochs / options.epochs
            marks.append(Mark(0, began, times.look()))
        elif isinstance(event, TrialFinished):
            if event.done in options.trials:
                marks.append(Mark(event.done, time.monotonic(), times.look()))
            elif event.done % LOOK_EVERY == 0:
                times.look()

    profile = cProfile.Profile()
    with ray_session(address=address) as ray:
        from desisky_tune.search import engines
        from desisky_tune.search.session import run_stage
        from desisky_tune.search.stages import SearchStage

        engines.Engine = sleeping(seconds, options.epochs)  # type: ignore[misc]
        called = time.monotonic()
        if options.profile:
            profile.enable()
        run_stage(run, SearchStage(run), ray, tell, local=False)
        profile.disable()
    if options.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
    done = len(Ledger(run.folder.ledger).records())
    assert done == total, f"{done} of {total} trials have a record"
    return marks[0].at - called, marks, size_of(run.folder.path) - before


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class CpuTimes:
    """CPU time of this process and of those it started, by kind."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, float]] = {}

    def look(self) -> dict[int, tuple[str, float]]:
        """Return kind and time of each process (s); those that have ended as seen last."""
        self._seen[os.getpid()] = "driver", time.process_time()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(process.cmdline()) or process.name()
                kind = next((k for begins, k in KINDS.items() if is_named(title, begins)), "others")
                if kind == "others" and process.pid in self._seen:
                    # A title that Ray sets for the moment.
                    kind, _ = self._seen[process.pid]
                times = process.cpu_times()
                self._seen[process.pid] = kind, times.user + times.system
        return dict(self._seen)


def is_named(title: str, begins: str) -> bool:
    """Whether a process's title, or the program in it, begins so."""
    return Path(title.split(" ")[0]).name.startswith(begins) or title.startswith(begins)


def sleeping(seconds: float, epochs: int) -> Any:
    """Return an engine whose training is a sleep."""
    from desisky_tune.search.engine import Device, Engine

    class Sleeping(Engine):
        def __init__(
            self,
            name: str,
            device: Device,
            slots: int,
            run: str,
            dispatcher: str | None,
            environment: Mapping[str, str] | None = None,
        ) -> None:
            backend = SleepingBackend(seconds, epochs)
            super().__init__(name, device, slots, run, dispatcher, environment, backend)

    return Sleeping


if __name__ == "__main__":
    main()
