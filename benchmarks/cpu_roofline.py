"""The training core's float32 rate over that of a large matrix product, all cores in use.

    python benchmarks/cpu_roofline.py [--widths 16 32 64 128 256 512] [--batches 16 32 64 128 256]
                                      [--depth 5] [--depths 1 3 8] [--core auto] [--rounds 5]
                                      [--cores 2]

One training per core (all of them, or `--cores`), each in a thread of its own, against NumPy's
product of 2048 x 2048 on as many cores. The two take turns, and the share is the median over the
rounds of the ratio within a round, so that a busy machine does not favour either. Operations of a
training: 2 a weight forward, 4 backward, less the gradient of the first layer's inputs; nothing
else that it does (Adam, losses, shuffles, sums of biases) counts. 1351 rows, no validation.

Prints the machine, the versions, the command, and a table in Markdown: per cent of the product's
rate by width and batch size, and by depth; below half, why.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

INPUTS, OUTPUTS, ROWS = 6, 4, 1351
PRODUCT = 2048
#: Seconds of training in a round, and of a call in it (25 epochs to a first rung take as long).
PIECE, STRIDE = 0.4, 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="*", default=[1, 3, 8])
    parser.add_argument("--core", choices=["auto", "xla"], default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    cores = options.cores
    # Read when they are imported: a training takes one core, the product all of them.
    os.environ |= {"NPROC": "1", "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": str(cores)}
    from _machine import describe

    print(describe(("jax", "jaxlib", "numpy", "equinox")))
    bench = Bench(cores, options.rounds, options.core)
    print(f"\nDepth {options.depth}, {cores} cores, {bench.name}.\n")
    _print_by_width(bench, options)
    if options.depths:
        _print_by_depth(bench, options)
    rate = statistics.median(bench.products) / 1e9
    print(f"\nsgemm of {PRODUCT} x {PRODUCT}: {rate:.0f} GFLOP/s (median)")


class Bench:
    """Trainings and products in turn."""

    def __init__(self, cores: int, rounds: int, core: str) -> None:
        import numpy as np

        from desisky_tune.training.program import Hyperparameters, training_arrays

        random = np.random.default_rng(0)
        inputs = random.normal(size=(ROWS + 16, INPUTS)).astype(np.float32)
        targets = np.tanh(inputs[:, :OUTPUTS])
        self._arrays = training_arrays(inputs[:ROWS], targets[:ROWS], inputs[ROWS:], targets[ROWS:])
        self._hyperparameters = Hyperparameters(1e-4, 0.25)
        self._square = random.random((PRODUCT, PRODUCT), np.float32)
        self._cores, self._rounds, self._core = cores, rounds, core
        self._pool = ThreadPoolExecutor(cores)
        self.products: list[float] = []

    @property
    def name(self) -> str:
        """What trains."""
        return f"training core {type(self._program(8, 1, 32)).__name__}"

    def share(self, width: int, depth: int, batch: int) -> float:
        """Return the rate of the trainings over that of the product."""
        program = self._program(width, depth, batch)
        states = [program.init(seed) for seed in range(self._cores)]
        self._epochs(program, states, 1, 0.0)
        began = time.perf_counter()
        self._epochs(program, states, 1, 0.0)
        stride = max(1, round(STRIDE / (time.perf_counter() - began)))
        weights = INPUTS * width + (depth - 1) * width**2 + width * OUTPUTS
        operations = ROWS * (6 * weights - 2 * INPUTS * width)
        shares = []
        for _ in range(self._rounds):
            product = self._product()
            rate = operations * self._epochs(program, states, stride, PIECE)
            product = statistics.mean([product, self._product()])
            self.products.append(product)
            shares.append(rate / product)
        return statistics.median(shares)

    def _epochs(self, program: object, states: list[object], stride: int, seconds: float) -> float:
        """Train for a time, `stride` epochs a call; return epochs per second, all together."""

        def one(state: object) -> float:
            began, done = time.perf_counter(), 0
            while not done or time.perf_counter() - began < seconds:
                program.advance(state, self._arrays, self._hyperparameters, stride)  # type: ignore[attr-defined]
                done += stride
            return done / (time.perf_counter() - began)

        return sum(self._pool.map(one, states))

    def _product(self) -> float:
        began = time.perf_counter()
        for _ in range(3):
            self._square @ self._square
        return 3 * 2 * PRODUCT**3 / (time.perf_counter() - began)

    def _program(self, width: int, depth: int, batch: int) -> object:
        from desisky_tune.training.program import program_for

        return program_for(
            in_size=INPUTS,
            out_size=OUTPUTS,
            width=width,
            depth=depth,
            batch_size=batch,
            validate_every=2**30,
            core=self._core,
        )


def _print_by_width(bench: Bench, options: argparse.Namespace) -> None:
    print("| width | " + " | ".join(f"batch {batch}" for batch in options.batches) + " |")
    print("|---" * (1 + len(options.batches)) + "|")
    low = []
    for width in options.widths:
        shares = [bench.share(width, options.depth, batch) for batch in options.batches]
        low += [
            (width, options.depth, batch)
            for batch, share in zip(options.batches, shares, strict=True)
            if share < 0.5
        ]
        print(f"| {width} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |")
    _explain(low)


def _print_by_depth(bench: Bench, options: argparse.Namespace) -> None:
    print("\n| width 128, depth | " + " | ".join(f"batch {b}" for b in options.batches) + " |")
    print("|---" * (1 + len(options.batches)) + "|")
    low = []
    for depth in options.depths:
        shares = [bench.share(128, depth, batch) for batch in options.batches]
        low += [
            (128, depth, batch)
            for batch, share in zip(options.batches, shares, strict=True)
            if share < 0.5
        ]
        print(f"| {depth} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |")
    _explain(low)


def _explain(cells: list[tuple[int, int, int]]) -> None:
    """Say for each cell below half what a step does beside its products."""
    for width, depth, batch in cells:
        ends = (INPUTS + OUTPUTS) * width
        weights = ends + (depth - 1) * width**2
        counted = batch * (6 * weights - 2 * INPUTS * width)
        print(
            f"- width {width}, depth {depth}, batch {batch}: {counted / 1e6:.2f} million operations"
            f" a step, {100 * ends / weights:.0f} % of the weights in the ends, whose sums are of"
            f" {INPUTS} and {OUTPUTS} terms; beside them, uncounted: Adam on {weights:,} weights,"
            f" {batch} rows to gather, their losses, {batch * depth * width:,} units to transpose"
        )


if __name__ == "__main__":
    main()
