"""Seconds of a search against its trials and against its rows.

    python benchmarks/search_cost.py [--trials 16 64 256 1024] [--rows 2000 20000 200000 2000000]

Against trials: training is trivial (one epoch of a model of 8 units, random search, no
pruning, 200 rows), so that what is left is the search itself: Ray Tune, the sampler, the study,
the ledger, the trials' files. Against rows: two trials of one epoch of 64 units at batch 1024 on
one table of exposures, the shipped ones repeated with other numbers and nights.

Each search runs in a process of its own, beside a Ray that runs already when the clock starts;
its parts are timed by its events: *rows* until the table stands and is split, *trials* until the
last one has ended, *winner* until the search has. *Driver* is the processor time of the process
that searches, its threads and imports included, from a Ray that runs to the end. *Waiting* is the
share of the engine's time in which a slot had no trial, *keeping* that in which it wrote states:
large where the search itself is the limit. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _machine import describe

TRIVIAL = (
    "space.width=8",
    "space.depth=1",
    "space.batch_size=256",
    "training.epochs=1",
    "search.sampler=random",
    "search.scheduler=none",
    "search.default_first=false",
    "evaluation.finalists=0",
)
ON_MANY_ROWS = (*TRIVIAL, "space.width=64", "space.batch_size=1024")
FEW_ROWS = 200


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[2000, 20000, 200000, 2000000])
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        table, trials, spec = options.worker
        print(json.dumps(searched(Path(table), int(trials), spec, options.cores)))
        return
    print(describe(("desisky_tune", "ray", "jax", "optuna", "pyarrow")), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        few = write_table(Path(scratch) / "few.parquet", FEW_ROWS)
        by_trials = [(n, in_a_process(few, n, "trivial", options)) for n in options.trials]
        print_costs("trials", by_trials)
        by_rows = []
        for rows in options.rows:
            table = write_table(Path(scratch) / f"{rows}.parquet", rows)
            by_rows.append((rows, in_a_process(table, 2, "rows", options)))
            table.unlink()
        print_costs("rows", by_rows)


def write_table(path: Path, rows: int) -> Path:
    """Write the shipped moonlit exposures, repeated to so many rows, as a feature table."""
    from desisky_tune.data import load_features

    frame = load_features("sv1", "moon").frame
    repeated = frame.iloc[np.arange(rows) % len(frame)].reset_index(drop=True)
    turn = np.arange(rows) // len(frame)
    repeated["EXPID"] = np.arange(1, rows + 1)
    # Other nights, so that a night has about as many exposures as before.
    repeated["NIGHT"] = repeated["NIGHT"].to_numpy() + 10_000 * (turn % 100)
    repeated.to_parquet(path)
    return path


def in_a_process(
    table: Path, trials: int, spec: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Search in a fresh process."""
    command = [sys.executable, __file__, "--cores", str(options.cores)]
    command += ["--worker", str(table), str(trials), spec]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def searched(table: Path, trials: int, spec: str, cores: int) -> dict[str, Any]:
    """Search, and return the seconds of each part."""
    from desisky_tune.ray_session import ray_session
    from desisky_tune.search.events import DataReady, Event, TrialFinished
    from desisky_tune.search.run import run_search
    from desisky_tune.search.space import load_spec

    moments: dict[str, float] = {}

    def note(event: Event) -> None:
        if isinstance(event, DataReady):
            moments["rows"] = time.perf_counter()
        if isinstance(event, TrialFinished):
            moments["trials"] = time.perf_counter()

    chosen = TRIVIAL if spec == "trivial" else ON_MANY_ROWS
    own = (
        f"data.source={table}",
        "data.subset=all",
        "data.exclude_known_bad=false",
        f"search.trials={trials}",
        f"resources.workers={cores}",
    )
    with tempfile.TemporaryDirectory() as runs, ray_session(num_cpus=cores):
        began, spent = time.perf_counter(), time.process_time()
        result = run_search(
            load_spec("quick", overrides=(*own, *chosen)), runs=runs, name="cost", on_event=note
        )
        ended, driver = time.perf_counter(), time.process_time() - spent
        content = json.loads((result.run_dir / "search.json").read_text())
    (figures,) = content["sessions"][-1]["engines"]
    return {
        "seconds": ended - began,
        "rows": moments["rows"] - began,
        "trials": moments["trials"] - moments["rows"],
        "winner": ended - moments["trials"],
        "driver": driver,
        "shares": figures["all"]["shares"],
        "processes": sum(figures["processes"].values()),
    }


def print_costs(what: str, costs: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Print a table of costs, how they grow, and what dominates at each end."""
    parts = ("rows", "trials", "winner")
    print(f"| {what} | seconds | rows | trials | winner | driver | waiting | keeping | processes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for count, cost in costs:
        shares = [f"{100 * cost['shares'][name]:.0f} %" for name in ("waiting", "keeping")]
        seconds = [f"{cost[name]:.2f}" for name in ("seconds", *parts, "driver")]
        print("| " + " | ".join([str(count), *seconds, *shares, str(cost["processes"])]) + " |")
    print()
    if len(costs) > 1:
        (low, first), (high, last) = costs[0], costs[-1]
        slope = (last["seconds"] - first["seconds"]) / (high - low)
        power = np.log(last["seconds"] / first["seconds"]) / np.log(high / low)
        print(f"Each of the {what} beyond the first {low} costs {1e3 * slope:.3g} ms; ", end="")
        print(f"seconds grow as {what} to the power {power:.2f} over the whole range.")
    for count, cost in costs[:: max(1, len(costs) - 1)]:
        most = max(parts, key=lambda name: cost[name])
        share = 100 * cost[most] / cost["seconds"]
        print(f"At {count} {what}: {most} take {share:.0f} % of {cost['seconds']:.1f} s.")
    print(flush=True)


if __name__ == "__main__":
    main()
