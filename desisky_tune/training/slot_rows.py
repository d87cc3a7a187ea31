"""The rows that many trainings share on one device, and what tells their folds apart.

The rows lie there once. A fold is two lists of positions in them and a scaling of its own. The
scaling of a fold is applied on the device to rows that are standardised already, in float64 on the
host: what is left to do there is close to nothing, so that float32 loses nothing. With one fold
it is exactly nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from desisky_tune.errors import InputError
from desisky_tune.training.scaling import Scaling


@dataclass(frozen=True, eq=False)
class FoldRows:
    """Which rows a training learns from, and which it is measured on.

    Attributes
    ----------
    train, validation
        Positions in the rows that are shared.
    scaling
        Fitted to the training rows of this fold.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    scaling: Scaling

    @classmethod
    def of(
        cls, inputs: ArrayLike, targets: ArrayLike, train: ArrayLike, validation: ArrayLike
    ) -> FoldRows:
        """Fit the scaling to the training rows of ``(n, f)`` inputs and ``(n, out)`` targets."""
        train, validation = np.asarray(train, np.int64), np.asarray(validation, np.int64)
        return cls(
            train,
            validation,
            Scaling.fit(np.asarray(inputs)[train], np.asarray(targets)[train]),
        )


class SlotRows(NamedTuple):
    """Rows and folds on the device. Make it with `slot_rows`.

    Attributes
    ----------
    table
        Standardised inputs and magnitudes side by side, float32 ``(n, f + out)``: a row is
        fetched at once.
    train, validation
        Positions in `table`, int32 ``(folds, r)`` and ``(folds, v)``, each fold's own first and
        padded with 0.
    train_count, validation_count
        How many of them are the fold's, int32 ``(folds,)``.
    factor, shift
        Scaled inputs are ``table * factor - shift``, float32 ``(folds, f)``.
    target_mean, target_sd
        Turn the model's output into magnitudes, float32 ``(folds, out)``.
    """

    table: jax.Array
    train: jax.Array
    validation: jax.Array
    train_count: jax.Array
    validation_count: jax.Array
    factor: jax.Array
    shift: jax.Array
    target_mean: jax.Array
    target_sd: jax.Array


def slot_rows(inputs: ArrayLike, targets: ArrayLike, folds: Sequence[FoldRows]) -> SlotRows:
    """Put rows and folds on the device.

    Parameters
    ----------
    inputs
        Raw inputs, shape ``(n, f)``.
    targets
        Magnitudes, shape ``(n, out)``.
    folds
        At least one.

    Raises
    ------
    InputError
        When shapes disagree, a fold has no rows or rows that there are not, or a value of a
        fold's rows is not finite.
    """
    inputs = np.asarray(inputs, np.float32)
    targets = np.asarray(targets, np.float32)
    if inputs.ndim != 2 or targets.ndim != 2 or len(inputs) != len(targets):
        raise InputError(
            f"inputs of shape {inputs.shape} and targets of shape {targets.shape}; needed: (rows,"
            " columns), as many rows in both"
        )
    if not folds:
        raise InputError("slot_rows: no fold given; at least one is needed")
    for number, fold in enumerate(folds):
        _check(fold, number, inputs, targets)
    base = _base(inputs, targets, folds)
    scaled = base.scale_inputs(inputs)
    affine = [_on_top_of(base, fold.scaling) for fold in folds]
    return SlotRows(
        table=jnp.asarray(np.hstack([scaled, targets])),
        train=_padded([fold.train for fold in folds]),
        validation=_padded([fold.validation for fold in folds]),
        train_count=jnp.asarray([len(fold.train) for fold in folds], jnp.int32),
        validation_count=jnp.asarray([len(fold.validation) for fold in folds], jnp.int32),
        factor=jnp.asarray(np.stack([factor for factor, _ in affine]), jnp.float32),
        shift=jnp.asarray(np.stack([shift for _, shift in affine]), jnp.float32),
        target_mean=jnp.asarray(np.stack([f.scaling.target_mean for f in folds]), jnp.float32),
        target_sd=jnp.asarray(np.stack([f.scaling.target_sd for f in folds]), jnp.float32),
    )


def _base(inputs: np.ndarray, targets: np.ndarray, folds: Sequence[FoldRows]) -> Scaling:
    """Return the scaling of the table: the only fold's own, or one of all rows in use."""
    if len(folds) == 1:
        return folds[0].scaling
    used = np.unique(np.concatenate([part for f in folds for part in (f.train, f.validation)]))
    return Scaling.fit(inputs[used], targets[used])


def _on_top_of(base: Scaling, scaling: Scaling) -> tuple[np.ndarray, np.ndarray]:
    """Return factor and shift that turn rows of one scaling into rows of another.

    ``(x - m) / s = z (s_0 / s) - (m - m_0) / s`` with ``z = (x - m_0) / s_0``; a feature that is
    constant in the fold becomes 0 whatever its value.
    """
    factor = np.where(scaling.constant, 0.0, base.input_sd / scaling.input_sd)
    shift = np.where(scaling.constant, 0.0, scaling.input_mean - base.input_mean)
    return factor, shift / scaling.input_sd


def _padded(parts: Sequence[np.ndarray]) -> jax.Array:
    table = np.zeros((len(parts), max(map(len, parts))), np.int32)
    for row, part in zip(table, parts, strict=True):
        row[: len(part)] = part
    return jnp.asarray(table)


def _check(fold: FoldRows, number: int, inputs: np.ndarray, targets: np.ndarray) -> None:
    for name, part in (("training", fold.train), ("validation", fold.validation)):
        if part.ndim != 1 or not len(part):
            raise InputError(f"fold {number}: {name} rows of shape {part.shape}; needed: (n,), n>0")
        if part.min() < 0 or part.max() >= len(inputs):
            raise InputError(
                f"fold {number}: {name} rows {part.min()}..{part.max()}; there are {len(inputs)}"
            )
        finite = np.isfinite(inputs[part]).all(axis=1) & np.isfinite(targets[part]).all(axis=1)
        if not finite.all():
            broken = int((~finite).sum())
            raise InputError(f"fold {number}: {broken} of {len(part)} {name} rows are not finite")
    sizes = (len(fold.scaling.input_mean), len(fold.scaling.target_mean))
    if sizes != (inputs.shape[1], targets.shape[1]):
        raise InputError(
            f"fold {number}: a scaling of {sizes[0]} inputs and {sizes[1]} targets, and rows of"
            f" {inputs.shape[1]} and {targets.shape[1]}"
        )
