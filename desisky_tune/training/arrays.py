"""What goes into a compiled training and what comes out of it: rows, state, curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from desisky_tune.errors import InputError
from desisky_tune.training.scaling import Scaling

#: An array on a device, or (the native core's) in memory.
Array = Any


class TrainingArrays(NamedTuple):
    """Rows on the device. Make it with `training_arrays`.

    Attributes
    ----------
    train_inputs, validation_inputs
        Scaled inputs, float32 ``(n, f)``.
    train_targets, validation_targets
        Magnitudes, float32 ``(n, out)``: losses are in magnitudes, scaled or not.
    target_mean, target_sd
        Turn the model's output into magnitudes, float32 ``(out,)``; 0 and 1 without a scaling.
    """

    train_inputs: jax.Array
    train_targets: jax.Array
    validation_inputs: jax.Array
    validation_targets: jax.Array
    target_mean: jax.Array
    target_sd: jax.Array


class TargetScale(NamedTuple):
    """What turns a model's output into magnitudes, float32 ``(out,)``: 0 and 1 for nothing."""

    target_mean: jax.Array
    target_sd: jax.Array

    @classmethod
    def of(cls, scaling: Scaling | None, outputs: int) -> TargetScale:
        """Return the scale of a scaling, or of none."""
        if scaling is None:
            return cls(jnp.zeros(outputs), jnp.ones(outputs))
        return cls(
            jnp.asarray(scaling.target_mean, jnp.float32),
            jnp.asarray(scaling.target_sd, jnp.float32),
        )


def training_arrays(
    train_x: ArrayLike,
    train_y: ArrayLike,
    val_x: ArrayLike,
    val_y: ArrayLike,
    scaling: Scaling | None = None,
) -> TrainingArrays:
    """Scale the rows and put them on the device.

    Parameters
    ----------
    train_x, val_x
        Raw inputs, shape ``(n, f)``.
    train_y, val_y
        Magnitudes, shape ``(n, out)``.
    scaling
        Fitted on the training rows; None leaves inputs and outputs as they are.

    Raises
    ------
    InputError
        When shapes disagree, a part has no rows, or a value is not finite.
    """
    parts = [np.asarray(part, np.float32) for part in (train_x, train_y, val_x, val_y)]
    names = ("training inputs", "training targets", "validation inputs", "validation targets")
    for name, part in zip(names, parts, strict=True):
        if part.ndim != 2 or not len(part):
            raise InputError(f"{name} of shape {part.shape}; needed: (rows, columns), rows > 0")
        broken = int((~np.isfinite(part)).any(axis=1).sum())
        if broken:
            raise InputError(f"{name}: {broken} of {len(part)} rows are not finite")
    shapes = [part.shape for part in parts]
    if (
        shapes[0][0] != shapes[1][0]
        or shapes[2][0] != shapes[3][0]
        or shapes[0][1] != shapes[2][1]
        or shapes[1][1] != shapes[3][1]
    ):
        raise InputError(f"rows or columns of training and validation disagree: {shapes}")
    if scaling is not None:
        parts[0], parts[2] = scaling.scale_inputs(train_x), scaling.scale_inputs(val_x)
    scale = TargetScale.of(scaling, shapes[1][1])
    inputs, targets, val_inputs, val_targets = map(jnp.asarray, parts)
    return TrainingArrays(inputs, targets, val_inputs, val_targets, *scale)


class TrainState(NamedTuple):
    """Where a training stands: a pytree of arrays, never changed in place.

    Attributes
    ----------
    parameters, optimiser
        Of the last epoch, in the program's own layout (`Program.last_model` unpacks them).
    best_parameters
        Of the best epoch so far (`Program.best_model`).
    best_value
        What was lowest there: the objective or the test loss; infinity before any epoch.
    best_epoch
        Counted from 0; -1 before any epoch.
    epoch
        Epochs done.
    seed
        Of the shuffles.
    failed
        True after a loss or an objective that is not finite. Such a training does not advance.
    """

    parameters: Any
    optimiser: Any
    best_parameters: Any
    best_value: Array
    best_epoch: Array
    epoch: Array
    seed: Array
    failed: Array


@dataclass(frozen=True)
class Curve:
    """The epochs of one `Program.advance`, as NumPy arrays.

    After a value that is not finite the training stops: the curve ends with that epoch, and
    `failed` is True. Epochs that were not validated hold NaN, and False in `validated`.

    Attributes
    ----------
    train_loss
        Shape ``(k,)``: mean over the training rows, each at the time of its own step.
    test_loss
        Shape ``(k,)``: over all validation rows after the epoch.
    objective
        Shape ``(k,)``, mag: mean of `rmse` over the outputs.
    rmse
        Shape ``(k, out)``, mag, over all validation rows.
    validated
        Shape ``(k,)``, bool.
    failed
        True when the last epoch gave a value that is not finite.
    """

    train_loss: NDArray[np.float32]
    test_loss: NDArray[np.float32]
    objective: NDArray[np.float32]
    rmse: NDArray[np.float32]
    validated: NDArray[np.bool_]
    failed: bool

    def __len__(self) -> int:
        return len(self.train_loss)


def curve_of(table: NDArray[np.float32], failed: bool) -> Curve:
    """Read the rows that epochs leave: train loss, test loss, objective, RMSE, validated."""
    return Curve(
        train_loss=table[:, 0],
        test_loss=table[:, 1],
        objective=table[:, 2],
        rmse=table[:, 3:-1],
        validated=table[:, -1] > 0,
        failed=failed,
    )
