"""The two ways to train: one compiled program, or batch by batch.

Both advance by epochs and give curves of the same form; where both apply the curves agree to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from desisky_tune.errors import InputError
from desisky_tune.training.batches import Batch, all_batches, epoch_batches
from desisky_tune.training.program import (
    Curve,
    Hyperparameters,
    Program,
    TargetScale,
    TrainingArrays,
    TrainState,
    curve_of,
)
from desisky_tune.training.scaling import Scaling

if TYPE_CHECKING:
    from desisky_tune.training.native.program import NativeProgram


class Training(Protocol):
    """A training under way."""

    @property
    def state(self) -> TrainState:
        """Where it stands."""
        ...

    def advance(self, epochs: int) -> Curve:
        """Train for more epochs."""
        ...


class CompiledTraining:
    """Rows gathered into arrays, epochs advanced on the device."""

    def __init__(
        self,
        program: Program | NativeProgram,
        state: TrainState,
        arrays: TrainingArrays,
        hyperparameters: Hyperparameters,
    ) -> None:
        self.state = state
        self._program = program
        self._arrays = arrays
        self._hyperparameters = hyperparameters

    def advance(self, epochs: int) -> Curve:
        """Train for more epochs."""
        self.state, curve = self._program.advance(
            self.state, self._arrays, self._hyperparameters, epochs
        )
        return curve


class BatchTraining:
    """Loaders that must be iterated: a step for each batch that they give.

    Parameters
    ----------
    program
        Whose step is taken.
    state
        Where to begin.
    loaders
        Of training and test rows.
    scaling
        Fitted on training rows; None leaves the batches as they are.
    hyperparameters
        Learning rate and Huber delta.
    validate_every
        Iterate the test loader every so many epochs.
    """

    def __init__(
        self,
        program: Program,
        state: TrainState,
        loaders: tuple[Any, Any],
        scaling: Scaling | None,
        hyperparameters: Hyperparameters,
        validate_every: int,
    ) -> None:
        self.state = state
        self._program = program
        self._train_loader, self._test_loader = loaders
        self._scaling = scaling
        self._rates = (
            jnp.float32(hyperparameters.learning_rate),
            jnp.float32(hyperparameters.huber_delta),
        )
        self._validate_every = validate_every

    def advance(self, epochs: int) -> Curve:
        """Train for more epochs."""
        rows = []
        for _ in range(epochs):
            rows.append(self._epoch())
            if bool(self.state.failed):
                break
        return curve_of(np.stack(rows), bool(self.state.failed))

    def _epoch(self) -> np.ndarray:
        state = self.state
        epoch = int(state.epoch)
        parameters, optimiser = state.parameters, state.optimiser
        losses: list[jax.Array] = []
        sizes: list[int] = []
        scale: TargetScale | None = None
        for inputs, targets in epoch_batches(self._train_loader, int(state.seed), epoch):
            scale = scale or TargetScale.of(self._scaling, targets.shape[1])
            parameters, optimiser, loss = self._program.batch_step(
                parameters, optimiser, self._scaled(inputs), targets, scale, self._rates
            )
            losses.append(loss)
            sizes.append(len(inputs))
        if scale is None:
            raise InputError(f"epoch {epoch}: the training loader gave no batch")
        train_loss = jnp.dot(jnp.stack(losses), jnp.asarray(sizes, jnp.float32)) / sum(sizes)
        due = epoch % self._validate_every == 0
        if due:
            predictions, targets = self._predict(parameters, scale)
            measured = self._program.measure(predictions, targets, self._rates[1])
        else:
            measured = jnp.full(2 + len(scale.target_sd), jnp.nan, jnp.float32)
        self.state, row = self._program.conclude(
            state, parameters, optimiser, train_loss, measured, jnp.bool_(due)
        )
        return np.asarray(row)

    def _predict(self, parameters: Any, scale: TargetScale) -> tuple[jax.Array, np.ndarray]:
        batches = list(all_batches(self._test_loader, "test loader"))
        if not batches:
            raise InputError("the test loader gave no batch")
        predictions = [
            self._program.predict(parameters, self._scaled(inputs), scale) for inputs, _ in batches
        ]
        return jnp.concatenate(predictions), np.concatenate([targets for _, targets in batches])

    def _scaled(self, inputs: np.ndarray) -> np.ndarray:
        return inputs if self._scaling is None else self._scaling.scale_inputs(inputs)


def rows_of(batches: Callable[[], Any]) -> Batch:
    """Return all rows that one pass over batches gives.

    Raises
    ------
    InputError
        When there are none.
    """
    parts = list(batches())
    if not parts:
        raise InputError("the training loader gave no batch")
    inputs, targets = (np.concatenate(column) for column in zip(*parts, strict=True))
    return inputs, targets
