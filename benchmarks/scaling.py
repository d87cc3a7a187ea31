"""The control path alone: nodes simulated on this machine, each with an engine that only sleeps.

    python benchmarks/scaling.py                            # 1, 2, 4, 8 nodes; 500, 2000 trials
    python benchmarks/scaling.py --nodes 1 2 --trials 40    # in small

Each node is a Ray node of its own (`ray.cluster_utils`), its engine has `--slots` slots, and a
trial sleeps `--seconds` in all, over its rungs. Everything else is as in a search: light trials,
dispatcher, ledger, study, early stopping off. The efficiency is the time that the sleeping
would take with every slot always busy, over the wall time from the first trial on. All nodes
share this machine's cores, so that what it shows is a lower bound.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import describe

from desisky_tune.data.columns import BANDS
from desisky_tune.search.backend import CURVE_SERIES, Assignment, Progress
from desisky_tune.search.events import Event, TrialReported

HEADER = (
    "| nodes | slots | trials | sleeping, ideal (s) | wall (s) | efficiency | trials/s | "
    "start (s) | run folder, kB a trial |\n|---|---|---|---|---|---|---|---|---|"
)


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
    print(describe(["ray", "optuna"]))
    print(HEADER)
    for nodes in options.nodes:
        for trials in options.trials:
            print(measure(nodes, trials, options), flush=True)


def arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--trials", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--slots", type=int, default=4, help="of each engine")
    parser.add_argument("--seconds", type=float, default=4.0, help="that a trial sleeps")
    parser.add_argument("--epochs", type=int, default=225, help="rungs at 25, 75, 225")
    return parser.parse_args()


def measure(nodes: int, trials: int, options: argparse.Namespace) -> str:
    """Run one search; return its row."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": options.slots, "num_gpus": 0, "object_store_memory": 100 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        with tempfile.TemporaryDirectory(prefix="desisky-tune-scaling-") as runs:
            start, wall, size = search(cluster.address, Path(runs), trials, options)
    finally:
        cluster.shutdown()
    ideal = trials * options.seconds / (nodes * options.slots)
    return (
        f"| {nodes} | {nodes * options.slots} | {trials} | {ideal:.1f} | {wall:.1f} | "
        f"{100 * ideal / wall:.0f} % | {trials / wall:.1f} | {start:.1f} | "
        f"{size / 1e3 / trials:.1f} |"
    )


def search(
    address: str, runs: Path, trials: int, options: argparse.Namespace
) -> tuple[float, float, int]:
    """Return the time until trials ran, that until they were done (s), and bytes on disk."""
    from desisky_tune.data.features import load_features
    from desisky_tune.data.splits import make_split
    from desisky_tune.ray_session import ray_session
    from desisky_tune.search.folder import RunFolder
    from desisky_tune.search.origin import SearchRun, write_run
    from desisky_tune.search.records import Ledger
    from desisky_tune.search.space import load_spec

    spec = load_spec(
        "quick",
        overrides=(
            f"search.trials={trials}",
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
    began = first = 0.0

    def tell(event: Event) -> None:
        nonlocal first
        if isinstance(event, TrialReported) and not first:
            # The start of the engines was over when the first rung began.
            first = time.monotonic() - options.seconds * event.epochs / options.epochs

    with ray_session(address=address) as ray:
        from desisky_tune.search import engines
        from desisky_tune.search.session import run_trials

        engines.Engine = sleeping(options)  # type: ignore[misc]
        began = time.monotonic()
        run_trials(run, ray, tell, local=False)
        ended = time.monotonic()
    done = len(Ledger(run.folder.ledger).records())
    assert done == trials, f"{done} of {trials} trials have a record"
    size = sum(path.stat().st_size for path in run.folder.path.rglob("*") if path.is_file())
    return first - began, ended - first, size


def sleeping(options: argparse.Namespace) -> Any:
    """Return an engine whose training is a sleep."""
    from desisky_tune.search.engine import Device, Engine, Work

    class Sleeping(Engine):
        def __init__(
            self, name: str, device: Device, slots: int, work: Work, arrays: Any, dispatcher: Any
        ) -> None:
            backend = SleepingBackend(options.seconds, options.epochs)
            super().__init__(name, device, slots, work, arrays, dispatcher, backend)

    return Sleeping


if __name__ == "__main__":
    main()
