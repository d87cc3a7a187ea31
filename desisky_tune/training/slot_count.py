"""How many slots a program has.

The number follows from the configuration and the settings of a run, never from what happens to run
beside: a trial's numbers depend on it (`desisky_tune.training.slots`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from desisky_tune.training.slot_rows import SlotRows
from desisky_tune.training.slot_state import fresh_state
from desisky_tune.training.slots import (
    CAPACITY,
    VALIDATION_BLOCK,
    SlotProgram,
    SlotSettings,
    SlotShape,
)

#: Twice the slots must finish this many times the trainings to be worth it.
WORTHWHILE = 1.1

#: Share of the device's memory that slots may take.
MEMORY_SHARE = 0.8

#: Slots are counted at this shape, the documented default architecture.
REFERENCE = {"depth": 5, "width": 128, "batch_size": 32}


def footprint(shape: SlotShape, rows: SlotRows) -> int:
    """Estimate the bytes that a program with all its slots takes while it trains.

    Weights, two moments and the best weights, the gradient of all layers at worst, the units of a
    batch on their way forward and back or of a block of validation rows, and the epoch's order
    with the keys that were sorted for it.
    """
    state = SlotProgram(shape).bytes_per_slot()
    block = min(rows.validation.shape[1], VALIDATION_BLOCK)
    units = max(2 * shape.depth * shape.batch_size, 3 * block) * shape.width
    order = 4 * rows.train.shape[1]
    table = CAPACITY * (4 + shape.out_size)
    return shape.slots * (state + state // 4 + 4 * (units + order + table))


def device_memory() -> int:
    """Return the bytes of the device's memory, or of the machine's where it has none of its own."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    if limit is not None:
        return int(limit)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def most_slots(shape: SlotShape, rows: SlotRows, memory: int) -> int:
    """Return how many slots of a shape fit into `memory` bytes, at least 1."""
    one = footprint(replace(shape, slots=1), rows)
    return max(1, int(MEMORY_SHARE * memory) // one)


@dataclass(frozen=True)
class Calibration:
    """What a calibration saw.

    Attributes
    ----------
    slots
        The number that it chose.
    seconds
        Seconds of an epoch of all slots, by the number of slots tried; none where memory left
        no choice.
    """

    slots: int
    seconds: dict[int, float]


def calibrate(
    shape: SlotShape,
    rows: SlotRows,
    most: int,
    *,
    first: int = 1,
    time_epoch: Callable[[SlotShape, SlotRows], float] | None = None,
) -> Calibration:
    """Double the slots for as long as `WORTHWHILE` times the trainings come of it.

    Parameters
    ----------
    shape
        What is to be trained; its number of slots is of no account.
    rows
        On the device.
    most
        Slots that memory allows.
    first
        Slots to begin with.
    time_epoch
        Measures the seconds of an epoch (tests); `epoch_seconds` by default.
    """
    measure = time_epoch or epoch_seconds
    slots = min(first, most)
    if 2 * slots > most:
        return Calibration(slots, {})
    seconds = {slots: measure(replace(shape, slots=slots), rows)}
    while 2 * slots <= most:
        seconds[2 * slots] = measure(replace(shape, slots=2 * slots), rows)
        if 2 * seconds[slots] < WORTHWHILE * seconds[2 * slots]:
            break
        slots *= 2
    return Calibration(slots, seconds)


def epoch_seconds(shape: SlotShape, rows: SlotRows, at_least: float = 0.2) -> float:
    """Return the seconds of an epoch with all slots in use, compiles apart.

    Epochs are timed, more and more of them, until they last `at_least` seconds.
    """
    program = SlotProgram(shape)
    program.compile(rows)
    states, wanted = filled(program)
    epochs = 1
    while True:
        began = time.perf_counter()
        states, _ = program.advance(states, rows, wanted, epochs)
        seconds = time.perf_counter() - began
        if seconds > at_least or epochs == CAPACITY:
            return seconds / epochs
        epochs = min(CAPACITY, 4 * epochs)


def filled(program: SlotProgram) -> tuple[Any, SlotSettings]:
    """Return states and settings with a training without end in every slot."""
    shape = program.shape
    fresh = fresh_state(shape.in_size, shape.out_size, shape.width, shape.depth, 0)
    states = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], shape.slots, axis=0), fresh)
    wanted = SlotSettings.empty(shape.slots)
    wanted.learning_rate[:] = 1e-4
    wanted.target[:] = np.iinfo(np.int32).max
    seeds = jnp.arange(shape.slots, dtype=jnp.uint32)
    return states._replace(seed=seeds), wanted


def scaled_slots(shape: SlotShape, reference: SlotShape) -> int:
    """Return the slots of a shape that move as many bytes a step as the reference does."""
    ours, theirs = (SlotProgram(each).bytes_per_slot() for each in (shape, reference))
    return max(1, int(reference.slots * theirs / ours))


def power_of_two(slots: int) -> int:
    """Return the largest power of two that is at most `slots` (at least 1)."""
    return 1 << (max(1, slots).bit_length() - 1)


def first_try() -> int:
    """Return how many slots a calibration begins with: on a GPU few are never enough."""
    return 1 if jax.default_backend() == "cpu" else 32
