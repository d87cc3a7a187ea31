"""What a deterministic search costs, and whether it repeats itself.

Runs one space with and without ``search.deterministic``, in turn, without finalists, and prints
wall time, epochs and epochs a second of each search, the slowdown, and whether the leaderboards
of each kind agree to the last bit (those of the other kind need not).

    python benchmarks/deterministic.py --repeats 3 --set search.trials=64
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

from _machine import describe

from desisky_tune.ray_session import ray_session
from desisky_tune.search.leaderboard import leaderboard
from desisky_tune.search.run import run_search
from desisky_tune.search.space import load_spec


def main() -> None:
    """Run the searches and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="quick")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    print(describe(["desisky_tune", "ray", "jax", "optuna"]), end="\n\n", flush=True)
    print(
        "| deterministic | wall (s) | trials | epochs | epochs/s |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    paces: dict[bool, list[float]] = {False: [], True: []}
    boards: dict[bool, list[str]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as runs, ray_session():
        for _ in range(options.repeats):
            for deterministic in (False, True):
                extra = ["evaluation.finalists=0", f"search.deterministic={deterministic}".lower()]
                spec = load_spec(options.space, (*options.set, *extra))
                began = time.perf_counter()
                records = run_search(spec, runs=runs).records
                seconds = time.perf_counter() - began
                epochs = sum(record.epochs for record in records)
                paces[deterministic].append(epochs / seconds)
                boards[deterministic].append(board(records))
                cells = (deterministic, f"{seconds:.1f}", len(records), epochs)
                print(
                    "|", *(f"{cell} |" for cell in cells), f"{epochs / seconds:.0f} |", flush=True
                )
    plain, ordered = (statistics.median(paces[kind]) for kind in (False, True))
    print(f"\nEpochs a second: {plain:.0f} without, {ordered:.0f} with it "
          f"({100 * (1 - ordered / plain):.0f} % less).")  # fmt: skip
    for kind, name in ((False, "Without"), (True, "With")):
        print(
            f"{name} it {len(set(boards[kind]))} different leaderboards in {options.repeats} runs."
        )


def board(records: list[Any]) -> str:
    """Return a leaderboard as text, every digit, without the times."""
    return str(leaderboard(records).drop(columns="seconds").to_csv(index=False))


if __name__ == "__main__":
    main()
