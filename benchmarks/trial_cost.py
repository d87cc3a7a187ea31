"""What a trial costs an engine beside its training: one trial after the other, in its process.

    python benchmarks/trial_cost.py                     # both engines, 60 trials of 20 epochs
    python benchmarks/trial_cost.py --trials 20 --engines cpu

Without Ray: a trial is advanced to its epochs and released, as an engine does when it is told to,
with its state and its weights written to a folder. The engine of a CPU gets another architecture
each time (width 16 to 128, depth 1 to 7, batches of 128); the engine of a GPU, run on a CPU with
four slots, another width of 17 to 32 at depth 3, so that all of them share one program. Each
engine has a process and an empty cache of programs to itself. Prints the first trial apart, which
compiles and imports; of the others the mean, in which a program for a new shape shows, and medians.
What is neither training nor compiling is weights drawn, models built, files written: what the last
column says is paid for every trial of a search.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _machine import describe

ENGINES = {"cpu": "of a CPU", "slots": "of a GPU, on a CPU, 4 slots"}
SLOTS = 4
TRAIN_SHARE = 0.7
PARTS = ("training", "compiling")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--worker", choices=list(ENGINES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(measured(options.worker, options.trials, options.epochs)))
        return
    print(describe(("desisky_tune", "jax", "equinox", "numpy")), end="\n\n", flush=True)
    print("| engine | first (s) | a trial: mean (ms) | median | training | compiling | else |")
    print("|---|---|---|---|---|---|---|")
    for engine in options.engines:
        first, *others = in_a_process(engine, options)
        whole = [1e3 * sum(one.values()) for one in others]
        cells = [f"{sum(first.values()):.2f}"]
        cells += [f"{statistics.fmean(whole):.1f}", f"{statistics.median(whole):.1f}"]
        for part in (*PARTS, "else"):
            cells.append(f"{1e3 * statistics.median(one[part] for one in others):.1f}")
        print(f"| {ENGINES[engine]} | " + " | ".join(cells) + " |", flush=True)


def in_a_process(engine: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Measure in a fresh process, with no program kept from another."""
    command = [sys.executable, __file__, "--worker", engine]
    command += ["--trials", str(options.trials), "--epochs", str(options.epochs)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "XDG_CACHE_HOME": cache,
        }
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    answer: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measured(engine: str, trials: int, epochs: int) -> list[dict[str, float]]:
    """Train trials one after the other; return the seconds of each, by what they went into."""
    with tempfile.TemporaryDirectory() as folder:
        backend = backend_of(engine, Path(folder))
        seconds = []
        for number, configuration in zip(range(trials + 1), configurations(engine), strict=False):
            before, began = backend.meter.seconds(), time.perf_counter()
            one_trial(backend, number, configuration, epochs)
            took, after = time.perf_counter() - began, backend.meter.seconds()
            parts = {part: after[part] - before[part] for part in PARTS}
            seconds.append({**parts, "else": took - sum(parts.values())})
    return seconds


def one_trial(backend: Any, number: int, configuration: dict[str, Any], epochs: int) -> None:
    """Train a trial and let go of it, as an engine does."""
    from desisky_tune.search.backend import Assignment

    trial = Assignment(number, configuration, 0)
    with backend.meter.working():
        backend.advance(trial, epochs)
        backend.release(trial)


def backend_of(engine: str, folder: Path) -> Any:
    """Return the backend of an engine on the shipped moonlit exposures."""
    from desisky_tune.data import load_features
    from desisky_tune.search.arrays import SearchArrays
    from desisky_tune.search.local import LocalBackend
    from desisky_tune.search.slot_backend import SlotBackend
    from desisky_tune.search.space import load_spec

    spec = load_spec("broadband", overrides=("data.source=sv1",))
    table = load_features("sv1", "moon")
    rows = np.random.default_rng(0).permutation(len(table.frame))
    train = round(TRAIN_SHARE * len(rows))
    split = (np.sort(rows[:train]), np.sort(rows[train:]))
    arrays = SearchArrays.from_folds(table, [split], spec.data.features)
    if engine == "cpu":
        return LocalBackend(arrays, spec.training, folder, lanes=1)
    return SlotBackend(arrays, spec.training, folder, slots=SLOTS, expected=SLOTS)


def configurations(engine: str) -> Iterator[dict[str, Any]]:
    """Draw hyperparameters, always the same ones."""
    draw = np.random.default_rng(0)
    while True:
        if engine == "cpu":
            width, depth = int(16 * 2 ** draw.uniform(0, 3)), int(draw.integers(1, 8))
        else:
            width, depth = int(draw.integers(17, 33)), 3
        yield {
            "width": width,
            "depth": depth,
            "learning_rate": 1e-3,
            "huber_delta": 0.25,
            "batch_size": 128,
        }


if __name__ == "__main__":
    main()
