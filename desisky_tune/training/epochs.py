"""What a program compiles: epochs of one training, on the device.

Every function here is traced by JAX; `desisky_tune.training.program` compiles them, and leads a
training's life outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from desisky_tune.errors import InputError
from desisky_tune.training.arrays import TargetScale, TrainingArrays, TrainState
from desisky_tune.training.shuffle import epoch_order
from desisky_tune.training.steps import Stepper


@dataclass(frozen=True, eq=False)
class Epochs:
    """Epochs of a training of one shape.

    Attributes
    ----------
    stepper
        Takes a step on a batch.
    loss
        ``(predictions, targets, delta) -> scalar``.
    batch_size, select, validate_every, shuffle, drop_last, capacity
        As for `desisky_tune.training.program.Program`.
    """

    stepper: Stepper
    loss: Callable[[Any, Any, Any], Any]
    batch_size: int
    select: str
    validate_every: int
    shuffle: bool
    drop_last: bool
    capacity: int

    def advance(
        self, state: TrainState, arrays: TrainingArrays, rate: Any, delta: Any, epochs: Any
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        """Return the new state, the epochs done, and a table with a row for each of them."""

        def goes_on(carry: tuple[TrainState, jax.Array, jax.Array]) -> jax.Array:
            state, done, _ = carry
            return (done < epochs) & ~state.failed

        def next_epoch(
            carry: tuple[TrainState, jax.Array, jax.Array],
        ) -> tuple[TrainState, jax.Array, jax.Array]:
            state, done, table = carry
            state, row = self._epoch(state, arrays, rate, delta)
            return state, done + 1, table.at[done].set(row)

        columns = 4 + arrays.train_targets.shape[1]
        table = jnp.full((self.capacity, columns), jnp.nan, jnp.float32)
        return lax.while_loop(goes_on, next_epoch, (state, jnp.int32(0), table))

    def _epoch(
        self, state: TrainState, arrays: TrainingArrays, rate: Any, delta: Any
    ) -> tuple[TrainState, jax.Array]:
        parameters, optimiser, train_loss = self._pass(state, arrays, rate, delta)
        outputs = arrays.train_targets.shape[1]

        def validate(parameters: Any) -> jax.Array:
            output = self.stepper.predict(parameters, arrays.validation_inputs)
            return self.measure(_magnitudes(output, arrays), arrays.validation_targets, delta)

        if self.validate_every == 1:
            due, measured = jnp.bool_(True), validate(parameters)
        else:
            due = state.epoch % self.validate_every == 0
            measured = lax.cond(
                due, validate, lambda _: jnp.full(2 + outputs, jnp.nan, jnp.float32), parameters
            )
        return self.conclude(state, parameters, optimiser, train_loss, measured, due)

    def measure(self, predictions: Any, targets: Any, delta: Any) -> jax.Array:
        """Return test loss, objective and RMSE of each output, over all rows."""
        loss = self.loss(predictions, targets, delta)
        rmse = jnp.sqrt(jnp.mean((predictions - targets) ** 2, axis=0))
        return jnp.concatenate([jnp.stack([loss, rmse.mean()]), rmse])

    def conclude(
        self,
        state: TrainState,
        parameters: Any,
        optimiser: Any,
        train_loss: jax.Array,
        measured: jax.Array,
        due: jax.Array,
    ) -> tuple[TrainState, jax.Array]:
        """Close an epoch: keep its parameters if they are the best; make its row."""
        # Only what is finite may be the best: a NaN compares as not lower, an infinite loss
        # of the training rows is excluded here.
        failed = ~jnp.isfinite(train_loss) | (due & ~jnp.isfinite(measured[:2]).all())
        value = measured[1] if self.select == "rmse" else measured[0]
        better = due & ~failed & (value < state.best_value)
        row = jnp.concatenate([train_loss[None], measured, due[None].astype(jnp.float32)])
        return state._replace(
            parameters=parameters,
            optimiser=optimiser,
            best_parameters=jax.tree.map(
                lambda new, old: jnp.where(better, new, old), parameters, state.best_parameters
            ),
            best_value=jnp.where(better, value, state.best_value),
            best_epoch=jnp.where(better, state.epoch, state.best_epoch),
            epoch=state.epoch + 1,
            failed=failed,
        ), row

    def _pass(
        self, state: TrainState, arrays: TrainingArrays, rate: Any, delta: Any
    ) -> tuple[Any, Any, jax.Array]:
        """Take one step on each batch; return the mean loss of the rows, too."""
        inputs, targets = arrays.train_inputs, arrays.train_targets
        rows, batch = len(inputs), self.batch_size
        if self.shuffle:
            order = epoch_order(state.seed, state.epoch, rows)
            inputs, targets = inputs[order], targets[order]
        full, short = divmod(rows, batch)
        if self.drop_last:
            short = 0
        if not (full or short):
            raise InputError(f"drop_last leaves no batch of {batch} out of {rows} rows")

        def step(carry: tuple[Any, Any], batch: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            prepared, observed = batch
            *carry_out, loss = self.stepper.step(
                *carry,
                prepared,
                lambda output: self.loss(_magnitudes(output, arrays), observed, delta),
                rate,
            )
            return tuple(carry_out), loss

        carry: Any = (state.parameters, state.optimiser)
        total = jnp.float32(0)
        used = full * batch
        if full:
            stacked = (
                inputs[:used].reshape(full, batch, -1),
                targets[:used].reshape(full, batch, -1),
            )
            carry, losses = lax.scan(step, carry, (self.stepper.batches(stacked[0]), stacked[1]))
            total = batch * losses.sum()
        if short:
            # A step of its own size, not a padded one: exact, and no operation on padding.
            last = self.stepper.batches(inputs[None, used:])
            carry, loss = step(carry, (jax.tree.map(lambda part: part[0], last), targets[used:]))
            total = total + short * loss
        parameters, optimiser = carry
        return parameters, optimiser, total / (used + short)

    def batch_step(
        self,
        parameters: Any,
        optimiser: Any,
        inputs: jax.Array,
        targets: jax.Array,
        scale: TargetScale,
        hyperparameters: tuple[Any, Any],
    ) -> tuple[Any, Any, jax.Array]:
        rate, delta = hyperparameters
        prepared = jax.tree.map(lambda part: part[0], self.stepper.batches(inputs[None]))
        return self.stepper.step(
            parameters,
            optimiser,
            prepared,
            lambda output: self.loss(_magnitudes(output, scale), targets, delta),
            rate,
        )

    def predict(self, parameters: Any, inputs: jax.Array, scale: TargetScale) -> jax.Array:
        return _magnitudes(self.stepper.predict(parameters, inputs), scale)


def _magnitudes(output: jax.Array, scale: TargetScale | TrainingArrays) -> jax.Array:
    return output * scale.target_sd + scale.target_mean
