"""Milliseconds per epoch of the training core, beside desisky's trainer and a large sgemm.

    python benchmarks/epoch_time.py [--batch 32 128] [--width 128] [--depth 5] [--repeats 9]
                                    [--core auto xla]

The default architecture (6 -> 128 x 5 -> 4) on 1351 training rows, as in a 70/30 split of the
1931 moonlit exposures of the DR1 VAC; the other 580 are validated after each epoch. Prints the
machine, the versions, the command, and tables in Markdown:

- milliseconds per epoch with validation, and without, by the core that `program_for` chooses
  (in C on a CPU) and by XLA; the rate of the second, counting 2
  operations a weight forward and 4 backward, less the first layer's input gradient; and its
  share of the rate of a large float32 matrix product on as many cores as the program used.
  The product is NumPy's and XLA's of 2048 x 2048, whichever is faster;
- where desisky and torch are installed, the same epoch by its trainer, and the ratio.

Every measurement is a process of its own. Figures are medians over repetitions. Run it on an
idle machine: the share is of what one core gives at that moment.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from _machine import describe

TRAIN_ROWS, TEST_ROWS, INPUTS, OUTPUTS = 1351, 580, 6, 4
PRODUCT = 2048
NEVER = 2**30


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--core", nargs="+", default=["auto", "xla"])
    parser.add_argument("--reference-epochs", type=int, default=4)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(globals()["_measure_" + options.worker](options)))
        return
    print(describe(("jax", "jaxlib", "numpy", "equinox", "optax", "torch", "desisky")))
    print(_core_table(options))
    print(_reference_table(options))


def _core_table(options: argparse.Namespace) -> str:
    lines = [
        "",
        "| training core | batch | ms/epoch | without validation | cores used | GFLOP/s |"
        " sgemm, same cores | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, batch in itertools.product(options.core, options.batch):
        core = _worker("core", options, batch=[batch], core=[name])
        cores = max(1, round(core["cores"]))
        product = max(
            (_worker(kind, options, cores=cores)["rate"], kind) for kind in ("numpy", "xla")
        )
        rate = _operations(options.width, options.depth) / core["training"]
        lines.append(
            f"| {core['name']} | {batch} | {1e3 * core['epoch']:.2f} |"
            f" {1e3 * core['training']:.2f} | {core['cores']:.2f} | {rate / 1e9:.1f} |"
            f" {product[0] / 1e9:.1f} ({product[1]}) | {100 * rate / product[0]:.0f} % |"
        )
    return "\n".join(lines)


def _reference_table(options: argparse.Namespace) -> str:
    try:
        import desisky  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        return f"\ndesisky's trainer: not measured ({error})"
    lines = ["", "| batch | desisky, ms/epoch | here, ms/epoch | ratio |", "|---|---|---|---|"]
    for batch in options.batch:
        theirs = _worker("reference", options, batch=[batch])["epoch"]
        ours = _worker("trainer", options, batch=[batch])["epoch"]
        lines.append(f"| {batch} | {1e3 * theirs:.0f} | {1e3 * ours:.2f} | {theirs / ours:.0f} |")
    lines.append("")
    lines.append("Both with `BroadbandTrainer.train`, raw inputs, validation, no checkpoint.")
    return "\n".join(lines)


def _worker(kind: str, options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    values = {**vars(options), **changes}
    cores = values.pop("cores", None)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if cores is not None:
        environment |= {"OPENBLAS_NUM_THREADS": str(cores), "NPROC": str(cores)}
    command = [sys.executable, __file__, "--worker", kind]
    command += ["--batch", *map(str, values["batch"]), "--core", *values["core"]]
    for name in ("width", "depth", "repeats", "reference_epochs"):
        command += ["--" + name.replace("_", "-"), str(values[name])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _operations(width: int, depth: int) -> int:
    weights = INPUTS * width + (depth - 1) * width**2 + width * OUTPUTS
    return TRAIN_ROWS * (6 * weights - 2 * INPUTS * width)


def _rows() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(TRAIN_ROWS + TEST_ROWS, INPUTS)).astype(np.float32)
    targets = (20 + np.tanh(inputs[:, :OUTPUTS])).astype(np.float32)
    return inputs[:TRAIN_ROWS], targets[:TRAIN_ROWS], inputs[TRAIN_ROWS:], targets[TRAIN_ROWS:]


def _measure_core(options: argparse.Namespace) -> dict[str, Any]:
    from desisky_tune.training.program import (
        Hyperparameters,
        Program,
        program_for,
        training_arrays,
    )

    arrays = training_arrays(*_rows())
    hyperparameters = Hyperparameters(learning_rate=1e-4, huber_delta=0.25)
    measured: dict[str, Any] = {}
    for name, validate_every in (("epoch", 1), ("training", NEVER)):
        program = program_for(
            in_size=INPUTS,
            out_size=OUTPUTS,
            width=options.width,
            depth=options.depth,
            batch_size=options.batch[0],
            validate_every=validate_every,
            core=options.core[0],
        )
        measured["name"] = "XLA" if isinstance(program, Program) else "native"
        state, _ = program.advance(program.init(0), arrays, hyperparameters, 3)
        began = time.perf_counter()
        program.advance(state, arrays, hyperparameters, 3)
        count = max(1, round(1.5 / (time.perf_counter() - began)))
        walls, cores = [], []
        for _ in range(options.repeats):
            wall, processor = time.perf_counter(), time.process_time()
            program.advance(state, arrays, hyperparameters, count)
            wall = time.perf_counter() - wall
            walls.append(wall / count)
            cores.append((time.process_time() - processor) / wall)
        measured[name] = statistics.median(walls)
        measured["cores"] = statistics.median(cores)
    return measured


def _measure_numpy(options: argparse.Namespace) -> dict[str, float]:
    square = np.random.default_rng(0).random((PRODUCT, PRODUCT), np.float32)
    return {"rate": _product_rate(options, lambda: square @ square)}


def _measure_xla(options: argparse.Namespace) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    square = jnp.asarray(np.random.default_rng(0).random((PRODUCT, PRODUCT), np.float32))
    multiply = jax.jit(jnp.matmul)
    return {"rate": _product_rate(options, lambda: multiply(square, square).block_until_ready())}


def _product_rate(options: argparse.Namespace, product: Callable[[], Any]) -> float:
    product()
    seconds = []
    for _ in range(3 * options.repeats):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return 2 * PRODUCT**3 / statistics.median(seconds)


def _measure_trainer(options: argparse.Namespace) -> dict[str, float]:
    from desisky_tune.training import BroadbandTrainer, NumpyLoader, TrainingConfig

    epochs = 200
    settings = TrainingConfig(epochs, 1e-4, "huber", 0.25, save_best=False, print_every=0)
    train, test = (
        NumpyLoader(_dataset(part, "desisky_tune.training"), options.batch[0], shuffle=not part)
        for part in range(2)
    )
    BroadbandTrainer(_model(options), settings).train(train, test)
    began = time.perf_counter()
    BroadbandTrainer(_model(options), settings).train(train, test)
    return {"epoch": (time.perf_counter() - began) / epochs}


def _measure_reference(options: argparse.Namespace) -> dict[str, float]:
    from desisky.training import BroadbandTrainer, NumpyLoader, TrainingConfig

    ends = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingConfig(
            options.reference_epochs + 1,
            1e-4,
            "huber",
            0.25,
            save_best=False,
            save_dir=folder,
            print_every=NEVER,
        )
        train, test = (
            NumpyLoader(_dataset(part, "desisky.training"), options.batch[0], shuffle=not part)
            for part in range(2)
        )
        trainer = BroadbandTrainer(
            _model(options), settings, on_epoch_end=lambda *_: ends.append(time.perf_counter())
        )
        trainer.train(train, test)
    # The first epoch compiles.
    return {"epoch": statistics.median(np.diff(ends)[1:])}


def _dataset(part: int, package: str) -> Any:
    import importlib

    import pandas as pd

    from desisky_tune.data.columns import FEATURES, TARGETS

    inputs, targets = _rows()[2 * part : 2 * part + 2]
    frame = pd.DataFrame(np.hstack([inputs, targets]), columns=[*FEATURES, *TARGETS])
    kind = importlib.import_module(package).SkyBrightnessDataset
    return kind(frame, np.zeros((len(frame), 1), np.float32), list(FEATURES))


def _model(options: argparse.Namespace) -> Any:
    import equinox as eqx
    import jax

    return eqx.nn.MLP(INPUTS, OUTPUTS, options.width, options.depth, key=jax.random.PRNGKey(0))


if __name__ == "__main__":
    main()
