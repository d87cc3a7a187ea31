"""Many trainings of one shape, advanced together by one compiled program.

A slot is one training: a configuration, a fold, a seed. All slots of a program share depth,
padded width, batch size and rows; learning rate and its schedule, weight decay, clipping, Huber
delta, fold, seed, epoch and the epoch to stop at are each slot's own. A slot that has reached its
epoch, or has failed, or is empty, stands still to the bit, and is filled again in place.

A training is a function of (configuration, seed, fold, rows, `SlotShape`) alone. Which slot it has,
what its neighbours do, whether they turn NaN, and in what pieces it is advanced, change no bit.
Between shapes, and between this and `desisky_tune.training.program`, float32 drifts.

Depth is part of the shape and not a run-time value: slots of several depths in one program would
all pay for the deepest (`docs/performance.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from desisky_tune.errors import InputError
from desisky_tune.training.arrays import Curve, TrainState, curve_of
from desisky_tune.training.hyperparameters import StepSettings
from desisky_tune.training.names import LOSSES
from desisky_tune.training.shuffle import padded_epoch_order
from desisky_tune.training.slot_rows import SlotRows
from desisky_tune.training.slot_state import at_width
from desisky_tune.training.slot_step import PRECISIONS, Batch, SlotScale, SlotStepper
from desisky_tune.training.steps import AdamState

#: Epochs that one call on the device can record.
CAPACITY = 64

#: Validation rows that are predicted at once: bounds the memory of their activations.
VALIDATION_BLOCK = 1024


@dataclass(frozen=True)
class SlotShape:
    """What a program is compiled for.

    Attributes
    ----------
    depth, width
        Hidden layers, and units in each with their padding.
    batch_size
        Rows a step.
    slots
        Trainings side by side.
    in_size, out_size
        Inputs and outputs of the models.
    loss
        "huber" or "l2".
    precision
        Of the matrix products: "float32", "tf32x3" or "tf32". They differ on a GPU only.
    extended
        Whether its slots may have a schedule, weight decay and a clipped gradient: a program
        with a step of its own, so that one without them keeps its bits and its speed.
    """

    depth: int
    width: int
    batch_size: int
    slots: int
    in_size: int = 6
    out_size: int = 4
    loss: str = "huber"
    precision: str = "float32"
    extended: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "width", "batch_size", "slots", "in_size", "out_size"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"SlotShape: {name} is {value}; it must be at least 1")
        for name, allowed in (("loss", LOSSES), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"SlotShape: {name} is {getattr(self, name)!r}; it must be one of {allowed}"
                )


class SlotSettings(NamedTuple):
    """What each slot is to do, as NumPy arrays ``(slots,)`` that the caller changes as it likes.

    Attributes
    ----------
    learning_rate, huber_delta
        Of Adam, and of the Huber loss (mag); float32.
    fold
        Which fold of the rows; int32.
    target
        Epochs in all after which the slot stands still; int32, 0 for an empty slot.
    warmup_steps, decay_steps, final_rate, weight_decay, gradient_clip
        Of `desisky_tune.training.hyperparameters.StepSettings`; an extended shape heeds them.
    """

    learning_rate: Any
    huber_delta: Any
    fold: Any
    target: Any
    warmup_steps: Any
    decay_steps: Any
    final_rate: Any
    weight_decay: Any
    gradient_clip: Any

    @classmethod
    def empty(cls, slots: int) -> SlotSettings:
        """Return settings under which no slot moves."""
        return cls(
            np.zeros(slots, np.float32),
            np.ones(slots, np.float32),
            np.zeros(slots, np.int32),
            np.zeros(slots, np.int32),
            np.zeros(slots, np.int32),
            np.zeros(slots, np.int32),
            np.zeros(slots, np.float32),
            np.zeros(slots, np.float32),
            np.zeros(slots, np.float32),
        )

    def fill(
        self, slot: int, step: StepSettings, huber_delta: float, *, fold: int, target: int
    ) -> None:
        """Say what a slot is to do."""
        for name, value in step._asdict().items():
            getattr(self, name)[slot] = value
        self.huber_delta[slot] = huber_delta
        self.fold[slot], self.target[slot] = fold, target

    @property
    def step(self) -> StepSettings:
        """What each step needs to know."""
        return StepSettings(*(getattr(self, name) for name in StepSettings._fields))


@dataclass(frozen=True)
class SlotCurves:
    """The epochs of one `SlotProgram.advance`.

    Attributes
    ----------
    table
        Rows of `Curve`, shape ``(epochs, slots, 4 + out)``; NaN where a slot stood still.
    done
        Epochs that each slot made, shape ``(slots,)``.
    failed
        Which slots have met a value that is not finite, shape ``(slots,)``.
    """

    table: NDArray[np.float32]
    done: NDArray[np.int32]
    failed: NDArray[np.bool_]

    def of(self, slot: int) -> Curve:
        """Return the epochs that a slot made."""
        return curve_of(self.table[: self.done[slot], slot], bool(self.failed[slot]))


class SlotProgram:
    """The compiled training of one `SlotShape`.

    States are those of `desisky_tune.training.program.Program` with an axis of slots in front.
    `put` and `advance` take them over: what was passed in must not be used again.
    """

    def __init__(self, shape: SlotShape) -> None:
        self.shape = shape
        self._stepper = SlotStepper(
            in_size=shape.in_size,
            out_size=shape.out_size,
            width=shape.width,
            depth=shape.depth,
            loss=shape.loss,
            precision=shape.precision,
            extended=shape.extended,
        )
        self._advance = jax.jit(self._advance_on_device, donate_argnums=0)
        self._put = jax.jit(_put_on_device, donate_argnums=0)
        self._take = jax.jit(_take_on_device)

    # ------------------------------------------------------------------ life of the slots

    def empty(self) -> TrainState:
        """Return states on the device for trainings to come."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._abstract())

    def words(self, state: TrainState) -> jax.Array:
        """Bring a training at its true width to the device, as `put` takes it."""
        shape = self.shape
        padded = at_width(state, shape.in_size, shape.out_size, shape.width)
        leaves = jax.tree.leaves(padded)
        return jax.device_put(np.concatenate([_host_words(leaf) for leaf in leaves]))

    def put(self, states: TrainState, slot: int, words: jax.Array) -> TrainState:
        """Put a training into a slot, whatever was in it.

        Parameters
        ----------
        states
            Of all slots; not to be used again.
        slot
            0..slots-1.
        words
            From `words` or `take`.
        """
        if not 0 <= slot < self.shape.slots:
            raise InputError(f"slot {slot} of a program of {self.shape.slots} slots")
        return self._put(states, words, np.int32(slot))

    def take(self, states: TrainState, slot: int) -> jax.Array:
        """Return the training of a slot, on the device; it stays as it is when the slots go on.

        It is one array of 32-bit words, so that one transfer brings it to the host (`state_of`).
        """
        return self._take(states, np.int32(slot))

    def state_of(self, words: jax.Array, width: int) -> TrainState:
        """Return a training that `take` gave, on the host and at its true width."""
        shape = self.shape
        state = _from_words(np.asarray(words), self._abstract(), _host_leaf)
        return at_width(state, shape.in_size, shape.out_size, width)

    def advance(
        self, states: TrainState, rows: SlotRows, settings: SlotSettings, epochs: int
    ) -> tuple[TrainState, SlotCurves]:
        """Train each slot for `epochs` more epochs, or to its target, or until it fails.

        Parameters
        ----------
        states
            Of all slots; not to be used again.
        rows
            From `slot_rows`.
        settings
            May differ from call to call.
        epochs
            0..`CAPACITY`.
        """
        if not 0 <= epochs <= CAPACITY:
            raise InputError(f"SlotProgram.advance: {epochs} epochs; allowed: 0..{CAPACITY}")
        states, chunk = self._advance(states, rows, settings, np.int32(epochs))
        table, done, failed = jax.device_get(chunk)
        return states, SlotCurves(table[: int(done.max())], done, failed)

    def compile(self, rows: SlotRows) -> None:
        """Compile all that a training needs, and run it once on empty slots.

        Raises
        ------
        jax.errors.JaxRuntimeError
            "RESOURCE_EXHAUSTED ..." when the device's memory does not suffice.
        """
        shape = self.shape
        states, _ = self.advance(self.empty(), rows, SlotSettings.empty(shape.slots), 0)
        self.take(self._put(states, self.take(states, 0), np.int32(0)), 0)

    def bytes_per_slot(self) -> int:
        """Return the bytes of a slot's state: weights, two moments, best weights."""
        one = jax.tree.leaves(self._stepper.abstract(1))
        return 4 * 4 * sum(int(np.prod(leaf.shape)) for leaf in one)

    # ------------------------------------------------------------------ inside the compiled part

    def _abstract(self) -> TrainState:
        slots = self.shape.slots
        parameters = self._stepper.abstract(slots)

        def each(dtype: Any) -> Any:
            return jax.ShapeDtypeStruct((slots,), dtype)

        return TrainState(
            parameters=parameters,
            optimiser=AdamState(parameters, parameters, each(jnp.int32)),
            best_parameters=parameters,
            best_value=each(jnp.float32),
            best_epoch=each(jnp.int32),
            epoch=each(jnp.int32),
            seed=each(jnp.uint32),
            failed=each(jnp.bool_),
        )

    def _advance_on_device(
        self, states: TrainState, rows: SlotRows, settings: SlotSettings, epochs: jax.Array
    ) -> tuple[TrainState, tuple[Any, Any, Any]]:
        """Return the new states, and the table of the epochs, their numbers and the failures."""

        def live(states: TrainState) -> jax.Array:
            return (states.epoch < settings.target) & ~states.failed

        def goes_on(carry: tuple[TrainState, jax.Array, jax.Array]) -> jax.Array:
            states, done, _ = carry
            return (done < epochs) & live(states).any()

        def next_epoch(
            carry: tuple[TrainState, jax.Array, jax.Array],
        ) -> tuple[TrainState, jax.Array, jax.Array]:
            states, done, table = carry
            states, row = self._epoch(states, rows, settings, live(states))
            return states, done + 1, lax.dynamic_update_index_in_dim(table, row, done, 0)

        shape = (CAPACITY, self.shape.slots, 4 + self.shape.out_size)
        table = jnp.full(shape, jnp.nan, jnp.float32)
        after, _, table = lax.while_loop(goes_on, next_epoch, (states, jnp.int32(0), table))
        return after, (table, after.epoch - states.epoch, after.failed)

    def _epoch(
        self, states: TrainState, rows: SlotRows, settings: SlotSettings, live: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        fold = settings.fold
        scale = SlotScale(rows.target_mean[fold], rows.target_sd[fold], settings.huber_delta)
        parameters, optimiser, total = self._pass(states, rows, settings, scale, live)
        train_loss = total / rows.train_count[fold]
        sums = self._validate(parameters, rows, settings, scale)
        measured = sums / rows.validation_count[fold][:, None]
        rmse = jnp.sqrt(measured[:, 1:])
        objective = rmse.mean(axis=1)
        # Only what is finite may be the best: a NaN compares as not lower, an infinite loss
        # of the training rows is excluded here.
        finite = jnp.isfinite(train_loss) & jnp.isfinite(measured[:, 0]) & jnp.isfinite(objective)
        better = live & finite & (objective < states.best_value)

        def kept(new: Any, old: Any) -> jax.Array:
            return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        ones = jnp.ones_like(train_loss)
        row = jnp.stack([train_loss, measured[:, 0], objective, *rmse.T, ones], axis=1)
        return states._replace(
            parameters=parameters,
            optimiser=optimiser,
            best_parameters=jax.tree.map(kept, parameters, states.best_parameters),
            best_value=kept(objective, states.best_value),
            best_epoch=kept(states.epoch, states.best_epoch),
            epoch=states.epoch + live,
            failed=states.failed | (live & ~finite),
        ), jnp.where(live[:, None], row, jnp.nan)

    def _pass(
        self,
        states: TrainState,
        rows: SlotRows,
        settings: SlotSettings,
        scale: SlotScale,
        live: jax.Array,
    ) -> tuple[Any, AdamState, jax.Array]:
        """Take one step on each batch; return the sum of the rows' losses, too."""
        slots, batch = self.shape.slots, self.shape.batch_size
        fold = settings.fold
        count = rows.train_count[fold]
        capacity = rows.train.shape[1]
        steps = -(-capacity // batch)

        def drawn(seed: Any, epoch: Any, count: Any, fold: Any) -> jax.Array:
            order = padded_epoch_order(seed, epoch, count, capacity)
            return rows.train.at[fold, order].get(mode="clip")

        positions = jax.vmap(drawn)(states.seed, states.epoch, count, fold)
        positions = jnp.pad(positions, ((0, 0), (0, steps * batch - capacity)))
        positions = positions.reshape(slots, steps, batch).swapaxes(0, 1)

        def step(carry: Any, now: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            parameters, optimiser, total = carry
            number, chosen = now
            place = number * batch + jnp.arange(batch)
            counts = (place < count[:, None]) & live[:, None]
            fetched = _fetch(rows, fold, chosen, counts)
            parameters, optimiser, loss = self._stepper.step(
                parameters, optimiser, fetched, scale, settings.step
            )
            return (parameters, optimiser, total + loss), None

        carry = (states.parameters, states.optimiser, jnp.zeros(slots))
        carry, _ = lax.scan(step, carry, (jnp.arange(steps), positions))
        return carry

    def _validate(
        self, parameters: Any, rows: SlotRows, settings: SlotSettings, scale: SlotScale
    ) -> jax.Array:
        """Return loss and squared residuals by output, summed over each slot's validation rows."""
        slots, fold = self.shape.slots, settings.fold
        capacity = rows.validation.shape[1]
        blocks = -(-capacity // VALIDATION_BLOCK)
        size = -(-capacity // blocks)
        padded = jnp.pad(rows.validation, ((0, 0), (0, blocks * size - capacity)))
        count = rows.validation_count[fold]

        def block(sums: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            number, positions = now
            place = number * size + jnp.arange(size)
            fetched = _fetch(rows, fold, positions[fold], place < count[:, None])
            return sums + self._stepper.measure(parameters, fetched, scale), None

        positions = padded.reshape(-1, blocks, size).swapaxes(0, 1)
        nothing = jnp.zeros((slots, 1 + self.shape.out_size))
        if blocks == 1:
            return block(nothing, (jnp.int32(0), positions[0]))[0]
        return lax.scan(block, nothing, (jnp.arange(blocks), positions))[0]


@lru_cache(maxsize=64)
def slot_program(shape: SlotShape) -> SlotProgram:
    """Return the program of a shape; asked for again, the same one, compiled already."""
    return SlotProgram(shape)


def _fetch(rows: SlotRows, fold: jax.Array, positions: jax.Array, counts: jax.Array) -> Batch:
    """Fetch rows ``(slots, n)`` and scale them; those that do not count are 0."""
    inputs = rows.factor.shape[1]
    fetched = jnp.where(counts[..., None], rows.table[positions], 0)
    scaled = fetched[..., :inputs] * rows.factor[fold][:, None] - rows.shift[fold][:, None]
    ones = jnp.ones((*positions.shape, 1), scaled.dtype)
    return Batch(jnp.concatenate([scaled, ones], axis=2), fetched[..., inputs:], counts)


def _put_on_device(states: TrainState, words: jax.Array, slot: jax.Array) -> TrainState:
    # An update of a slice, not a scatter: in place, and with nothing in it that could race.
    return jax.tree.map(
        lambda every, one: lax.dynamic_update_index_in_dim(every, one, slot, 0),
        states,
        _from_words(words, states, _device_leaf),
    )


def _take_on_device(states: TrainState, slot: jax.Array) -> jax.Array:
    def words(leaf: jax.Array) -> jax.Array:
        one = lax.dynamic_index_in_dim(leaf, slot, 0, keepdims=False).ravel()
        if one.dtype == jnp.bool_:
            return one.astype(jnp.uint32)
        return lax.bitcast_convert_type(one, jnp.uint32)

    return jnp.concatenate([words(leaf) for leaf in jax.tree.leaves(states)])


def _from_words(words: Any, states: TrainState, leaf_of: Callable[[Any, Any], Any]) -> TrainState:
    """Cut the words of one training into leaves of the shapes that all slots' have."""
    leaves, start = [], 0
    every, tree = jax.tree.flatten(states)
    for leaf in every:
        size = int(np.prod(leaf.shape[1:], dtype=int))
        part = leaf_of(words[start : start + size], leaf.dtype)
        leaves.append(part.reshape(leaf.shape[1:]))
        start += size
    return jax.tree.unflatten(tree, leaves)


def _device_leaf(words: jax.Array, dtype: Any) -> jax.Array:
    return words > 0 if dtype == jnp.bool_ else lax.bitcast_convert_type(words, dtype)


def _host_leaf(words: NDArray[np.uint32], dtype: Any) -> NDArray[Any]:
    return words > 0 if dtype == np.bool_ else words.view(dtype)


def _host_words(leaf: Any) -> NDArray[np.uint32]:
    array = np.asarray(leaf).ravel()
    return array.astype(np.uint32) if array.dtype == np.bool_ else array.view(np.uint32)
