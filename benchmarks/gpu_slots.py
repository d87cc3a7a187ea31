"""Trials per minute on one device against the number of slots, beside the device's ceilings.

    python benchmarks/gpu_slots.py [--slots 1 64 256 512] [--precision float32 tf32] [--budget 420]

Needs JAX, Equinox, optax and NumPy, and the package beside it in the checkout: neither Ray nor any
other of its dependencies, so that it runs on a machine with an accelerator that has only those.

The default architecture (6 -> 128 x 5 -> 4), batches of 32 of 1351 rows, 580 rows validated after
each epoch, 500 epochs to a trial. Some epochs are measured with all slots in use, compiles apart,
and extrapolated to 500: an epoch costs the same whichever it is. Prints, in Markdown:

- the device, the versions, the command;
- both ceilings, measured now: a large triad (``a + s b``: two arrays read, one written) for the
  bandwidth of memory, a large batched product of random matrices at the precision in use for the
  arithmetic; and the trials per minute that each would allow. Bytes counted: weights and two
  moments read and written once a step, nothing else. Operations counted: 6 a weight and row in
  training, less the first layer's input gradient, and 2 in validation;
- by precision and number of slots: milliseconds an epoch, trials per minute, the share of each
  ceiling that is used, and the share of what the tighter one allows;
- one slot, and the program of a single training, against a loop that calls the device each step,
  all with products in full float32;
- whether slots, neighbours (one of them NaN) and chunks changed a bit, and how far the first epoch
  is from that of the single training.

On a CPU it measures in small and says so: slots are made for devices that one training leaves idle.
No measurement is begun after `--budget` seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _machine import describe

from desisky_tune.training.program import Hyperparameters, program_for, training_arrays
from desisky_tune.training.slot_count import device_memory, epoch_seconds, most_slots
from desisky_tune.training.slot_rows import FoldRows, SlotRows, slot_rows
from desisky_tune.training.slot_state import fresh_state
from desisky_tune.training.slot_step import PRECISIONS
from desisky_tune.training.slots import SlotProgram, SlotSettings, SlotShape, slot_program

INPUTS, OUTPUTS, TRAIN_ROWS, VALIDATION_ROWS = 6, 4, 1351, 580
EPOCHS = 500
RATE, DELTA = 1e-4, 0.25


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--slots",
        type=int,
        nargs="+",
        default=[1, 2, 4] if on_cpu else [1, 16, 64, 128, 256, 512, 1024],
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=list(PRECISIONS),
        default=["float32"] if on_cpu else ["float32", "tf32"],
    )
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--budget", type=float, default=420.0)
    options = parser.parse_args(arguments)
    bench = Benchmark(options, on_cpu)
    bench.say(_machine(on_cpu))
    for part in (bench.ceilings, bench.slots, bench.one_slot, bench.exactness):
        part()
    bench.say(f"\nTook {bench.elapsed():.0f} s.")


class Benchmark:
    """The measurements of one call, and the time that they may take."""

    def __init__(self, options: argparse.Namespace, on_cpu: bool) -> None:
        self._began = time.perf_counter()
        self._options = options
        self._on_cpu = on_cpu
        self._data = _data()
        self._fold = FoldRows.of(*self._data, *_split())
        self._rows: SlotRows = slot_rows(*self._data, [self._fold])
        self._shape = SlotShape(options.depth, options.width, options.batch, 1)
        self._bandwidth = 0.0
        self._rates: dict[str, float] = {}

    def say(self, line: str) -> None:
        print(line, flush=True)

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._began

    def _late(self, what: str) -> bool:
        late = self.elapsed() > self._options.budget
        if late:
            self.say(f"\nNot measured, for want of time: {what}.")
        return late

    # ------------------------------------------------------------------ ceilings

    def ceilings(self) -> None:
        """Measure what the device can do at best."""
        self._bandwidth = triad_rate(2**24 if self._on_cpu else 2**28)
        self.say("\n| ceiling | measured | trials per minute that it allows |\n|---|---|---|")
        moved = trial_bytes(self._shape)
        self.say(
            f"| memory, large triad | {self._bandwidth / 1e9:.0f} GB/s |"
            f" {60 * self._bandwidth / moved:.0f} |"
        )
        worked = trial_operations(self._shape)
        size, count = (1024, 2) if self._on_cpu else (2048, 32)
        for precision in self._options.precision:
            self._rates[precision] = product_rate(precision, size, count)
            self.say(
                f"| {precision}, {count} products of {size} x {size} |"
                f" {self._rates[precision] / 1e12:.2f} TFLOP/s |"
                f" {60 * self._rates[precision] / worked:.0f} |"
            )
        self.say(
            f"\nA trial of {EPOCHS} epochs moves at least {moved / 1e9:.1f} GB and makes"
            f" {worked / 1e12:.2f} TFLOP."
        )

    # ------------------------------------------------------------------ slots

    def slots(self) -> None:
        """Measure trials per minute against the number of slots."""
        self.say(
            "\n| precision | slots | ms an epoch | trials per minute | share of bandwidth |"
            " share of arithmetic | of the tighter ceiling |\n|---|---|---|---|---|---|---|"
        )
        for precision in self._options.precision:
            for slots in self._options.slots:
                self._slots_row(replace(self._shape, slots=slots, precision=precision))

    def _slots_row(self, shape: SlotShape) -> None:
        what = f"| {shape.precision} | {shape.slots} |"
        if self.elapsed() > self._options.budget:
            self.say(f"{what} not measured, for want of time | | | | |")
            return
        if shape.slots > most_slots(shape, self._rows, device_memory()):
            self.say(f"{what} more than fit into memory | | | | |")
            return
        seconds = epoch_seconds(shape, self._rows, at_least=1.0)
        trials = shape.slots / (EPOCHS * seconds)
        moved = trials * trial_bytes(shape) / self._bandwidth
        worked = trials * trial_operations(shape) / self._rates[shape.precision]
        self.say(
            f"{what} {1e3 * seconds:.2f} | {60 * trials:.0f} | {100 * moved:.0f} % |"
            f" {100 * worked:.0f} % | {100 * max(moved, worked):.0f} % |"
        )

    # ------------------------------------------------------------------ one training

    def one_slot(self) -> None:
        """Time a single training: as a slot, in its own program, and step by step."""
        if self._late("one slot against a loop"):
            return
        slot = epoch_seconds(self._shape, self._rows, at_least=0.5)
        with jax.default_matmul_precision("float32"):
            self._one_slot(slot)

    def _one_slot(self, slot: float) -> None:
        program = self._program()
        arrays, state = self._arrays(), program.init(0)
        state, _ = program.advance(state, arrays, Hyperparameters(RATE, DELTA), 1)
        single = _median(lambda: program.advance(state, arrays, Hyperparameters(RATE, DELTA), 4), 3)
        self.say("\n| one training | ms an epoch | slot is faster by |\n|---|---|---|")
        rows = [
            ("a slot of a program of one slot", slot),
            ("the program of a single training", single / 4),
            ("a loop, its loss fetched each step (Equinox, optax)", self._loop(fetch=True)),
            ("the same loop, nothing fetched", self._loop(fetch=False)),
        ]
        for name, seconds in rows:
            self.say(f"| {name} | {1e3 * seconds:.2f} | {seconds / slot:.1f} |")

    def _loop(self, *, fetch: bool) -> float:
        """Return the seconds of an epoch that calls the device each step, validation left out."""
        inputs, targets = (np.asarray(part) for part in self._arrays()[:2])
        mean, sd = self._fold.scaling.target_mean, self._fold.scaling.target_sd
        optimizer = optax.adam(RATE)

        def loss(model: Any, inputs: Any, targets: Any) -> jax.Array:
            predictions = jax.vmap(model)(inputs) * jnp.float32(sd) + jnp.float32(mean)
            return optax.huber_loss(predictions, targets, delta=DELTA).mean()

        @eqx.filter_jit
        def step(model: Any, state: Any, inputs: Any, targets: Any) -> Any:
            value, gradient = eqx.filter_value_and_grad(loss)(model, inputs, targets)
            updates, state = optimizer.update(gradient, state, model)
            return eqx.apply_updates(model, updates), state, value

        shape, key = self._shape, jax.random.PRNGKey(0)
        model = eqx.nn.MLP(INPUTS, OUTPUTS, shape.width, shape.depth, key=key)
        state = optimizer.init(eqx.filter(model, eqx.is_array))
        random = np.random.default_rng(0)

        def epoch() -> None:
            nonlocal model, state
            order = random.permutation(TRAIN_ROWS)
            for start in range(0, TRAIN_ROWS, shape.batch_size):
                part = order[start : start + shape.batch_size]
                model, state, value = step(model, state, inputs[part], targets[part])
                if fetch:
                    float(value)
            jax.block_until_ready(value)

        return _median(epoch, 5)

    # ------------------------------------------------------------------ bits

    def exactness(self) -> None:
        """Say whether a slot's surroundings changed a bit, and how far the first epoch drifts."""
        lines = [
            "\n| precision | slots, neighbours, chunks | first epoch, from a single training |"
        ]
        lines.append("|---|---|---|")
        for precision in self._options.precision:
            if self._late(f"exactness at {precision}"):
                break
            slots = max(count for count in self._options.slots if count <= 64)
            program = slot_program(replace(self._shape, slots=slots, precision=precision))
            alone, first = self._trained(program, 0, [5], False)
            among, _ = self._trained(program, slots - 1, [1, 2, 2], True)
            same = all(map(np.array_equal, jax.tree.leaves(alone), jax.tree.leaves(among)))
            with jax.default_matmul_precision("float32"):
                single = self._program()
                _, curve = single.advance(
                    single.init(7), self._arrays(), Hyperparameters(RATE, DELTA), 1
                )
            drift = abs(first / float(curve.objective[0]) - 1)
            verdict = f"not a bit changed in {slots} slots" if same else "BITS CHANGED"
            lines.append(f"| {precision} | {verdict} | {drift:.1e} |")
        self.say("\n".join(lines))

    def _trained(
        self, program: SlotProgram, slot: int, chunks: list[int], crowded: bool
    ) -> tuple[Any, float]:
        """Return a training after some epochs, and its objective after the first."""
        shape = program.shape
        states, wanted = program.empty(), SlotSettings.empty(shape.slots)
        for other in range(shape.slots) if crowded else [slot]:
            seed = 7 if other == slot else other + 100
            fresh = fresh_state(INPUTS, OUTPUTS, shape.width, shape.depth, seed)
            states = program.put(states, other, program.words(fresh))
            wanted.learning_rate[other] = RATE if other == slot or other % 3 else 1e30
            wanted.huber_delta[other], wanted.target[other] = DELTA, sum(chunks)
        objectives = []
        for chunk in chunks:
            states, curves = program.advance(states, self._rows, wanted, chunk)
            objectives.append(float(curves.of(slot).objective[0]))
        return program.state_of(program.take(states, slot), shape.width), objectives[0]

    def _program(self) -> Any:
        shape = self._shape
        return program_for(
            in_size=INPUTS,
            out_size=OUTPUTS,
            width=shape.width,
            depth=shape.depth,
            batch_size=shape.batch_size,
            core="xla",
        )

    def _arrays(self) -> Any:
        inputs, targets = self._data
        train, validation = _split()
        parts = (inputs[train], targets[train], inputs[validation], targets[validation])
        return training_arrays(*parts, self._fold.scaling)


# ---------------------------------------------------------------------- what is counted


def trial_bytes(shape: SlotShape) -> float:
    """Return the bytes that a trial moves at least: weights and moments, there and back."""
    steps = EPOCHS * -(-TRAIN_ROWS // shape.batch_size)
    return steps * 6 * SlotProgram(shape).bytes_per_slot() / 4


def trial_operations(shape: SlotShape) -> float:
    """Return the operations of a trial."""
    weights = INPUTS * shape.width + (shape.depth - 1) * shape.width**2 + shape.width * OUTPUTS
    training = TRAIN_ROWS * (6 * weights - 2 * INPUTS * shape.width)
    return EPOCHS * (training + VALIDATION_ROWS * 2 * weights)


def triad_rate(length: int) -> float:
    """Return the bytes a second of ``a + s b`` on arrays of `length` float32, three moved."""
    first, second = (jax.random.normal(jax.random.PRNGKey(seed), (length,)) for seed in (0, 1))
    triad = jax.jit(lambda first, second: first + 0.5 * second)
    return 3 * 4 * length / _repeated(lambda last: triad(first, second), 8)


def product_rate(precision: str, size: int, count: int) -> float:
    """Return the operations a second of a large batched product."""
    left, right = (
        jax.random.normal(jax.random.PRNGKey(seed), (count, size, size)) for seed in (0, 1)
    )
    multiply = jax.jit(lambda left, right: jnp.matmul(left, right, precision=PRECISIONS[precision]))
    return 2 * count * size**3 / _repeated(lambda last: multiply(left, right), 8)


def _repeated(call: Callable[[Any], Any], times: int) -> float:
    """Return the seconds of a call, several of them under way at once; the median of five."""
    jax.block_until_ready(call(None))

    def several() -> None:
        last = None
        for _ in range(times):
            last = call(last)
        jax.block_until_ready(last)

    return _median(several, 5) / times


def _median(call: Callable[[], Any], times: int) -> float:
    call()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(TRAIN_ROWS + VALIDATION_ROWS, INPUTS)).astype(np.float32)
    noise = random.normal(0, 0.05, (len(inputs), OUTPUTS))
    return inputs, (20 + np.tanh(inputs[:, :OUTPUTS]) + noise).astype(np.float32)


def _split() -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(TRAIN_ROWS + VALIDATION_ROWS)
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def _machine(on_cpu: bool) -> str:
    device = jax.devices()[0]
    memory = device_memory() / 2**30
    lines = [describe(("jax", "jaxlib", "equinox", "optax", "numpy"))]
    lines.append(f"- device: {device.device_kind} ({device.platform}), {memory:.0f} GiB for JAX")
    if on_cpu:
        lines.append(
            "- **in small, on a CPU**: no figure here says anything of a GPU; slots do not pay on"
            " a CPU, where a training keeps its core busy by itself"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
