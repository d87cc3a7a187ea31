"""Standardisation by the training rows, and the algebra that folds it into an MLP.

With means `m`, `m_y` and standard deviations `s`, `s_y` of inputs and targets, an MLP that
works in scaled space, ``y = m_y + s_y f((x - m) / s)``, equals one on raw features whose first
layer is ``W / s``, ``b - W (m / s)`` and whose last is ``s_y W``, ``s_y b + m_y``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import equinox as eqx
import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from desisky_tune.errors import InputError
from desisky_tune.models.raw_space import is_raw_space, mark_raw_space

__all__ = ["Scaling", "fold", "is_raw_space", "mark_raw_space", "unfold"]

Vector = NDArray[np.float64]

#: Spread, relative to the size of the values, below which a column says nothing: float32 rows
#: of one value can differ by this much.
_CONSTANT_RELATIVE = 1e-6


@dataclass(frozen=True, eq=False)
class Scaling:
    """Means and standard deviations of the training rows.

    Attributes
    ----------
    input_mean, input_sd
        Shape ``(f,)``; a constant feature has standard deviation 1.
    target_mean, target_sd
        Shape ``(4,)``, mag; a constant target has standard deviation 1.
    constant
        Shape ``(f,)``, True where a feature does not vary in the training rows.
    """

    input_mean: Vector
    input_sd: Vector
    target_mean: Vector
    target_sd: Vector
    constant: NDArray[np.bool_]

    @classmethod
    def fit(cls, inputs: ArrayLike, targets: ArrayLike) -> Scaling:
        """Fit to training rows.

        Parameters
        ----------
        inputs
            Shape ``(n, f)``.
        targets
            Magnitudes, shape ``(n, 4)``.

        Raises
        ------
        InputError
            When there is no row, or a value is not finite.
        """
        input_mean, input_sd, constant = _moments(inputs, "inputs")
        target_mean, target_sd, _ = _moments(targets, "targets")
        return cls(input_mean, input_sd, target_mean, target_sd, constant)

    def scale_inputs(self, inputs: ArrayLike) -> NDArray[np.float32]:
        """Return scaled inputs ``(n, f)``; a constant feature becomes 0 whatever its value."""
        scaled = (np.asarray(inputs, np.float64) - self.input_mean) / self.input_sd
        return np.where(self.constant, 0.0, scaled).astype(np.float32)

    def scale_targets(self, targets: ArrayLike) -> NDArray[np.float32]:
        """Return scaled targets ``(n, 4)``."""
        return ((np.asarray(targets, np.float64) - self.target_mean) / self.target_sd).astype(
            np.float32
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; `from_dict` gives the same numbers back."""
        return {
            "input_mean": self.input_mean.tolist(),
            "input_sd": self.input_sd.tolist(),
            "target_mean": self.target_mean.tolist(),
            "target_sd": self.target_sd.tolist(),
            "constant": [bool(flag) for flag in self.constant],
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Scaling:
        """Rebuild from `as_dict`.

        Raises
        ------
        InputError
            When a key is missing, or lengths do not agree.
        """
        try:
            scaling = cls(
                input_mean=np.asarray(mapping["input_mean"], np.float64),
                input_sd=np.asarray(mapping["input_sd"], np.float64),
                target_mean=np.asarray(mapping["target_mean"], np.float64),
                target_sd=np.asarray(mapping["target_sd"], np.float64),
                constant=np.asarray(mapping["constant"], bool),
            )
        except KeyError as error:
            raise InputError(f"a scaling without {error}") from None
        lengths = (scaling.input_mean.shape, scaling.input_sd.shape, scaling.constant.shape)
        if len(set(lengths)) > 1 or scaling.target_mean.shape != scaling.target_sd.shape:
            raise InputError(f"a scaling whose parts have different lengths: {lengths}")
        return scaling


def fold(model: eqx.nn.MLP, scaling: Scaling) -> eqx.nn.MLP:
    """Fold a scaling into an MLP of scaled space.

    Parameters
    ----------
    model
        Maps scaled inputs to scaled targets.
    scaling
        What scaled them.

    Returns
    -------
    equinox.nn.MLP
        Maps raw features to magnitudes. The columns of constant features are zero, so that
        the model does not look at what it could not learn. Algebra in float64, leaves float32.

    Raises
    ------
    InputError
        When the model is no MLP with biases, or sizes do not agree.
    """
    layers = _layers(model, scaling)
    with np.errstate(over="ignore", invalid="ignore"):
        weight, bias = layers[0]
        weight = np.where(scaling.constant, 0.0, weight / scaling.input_sd)
        layers[0] = weight, bias - weight @ scaling.input_mean
        weight, bias = layers[-1]
        layers[-1] = (
            scaling.target_sd[:, None] * weight,
            scaling.target_sd * bias + scaling.target_mean,
        )
    return mark_raw_space(_with_ends(model, layers))


def unfold(model: eqx.nn.MLP, scaling: Scaling) -> eqx.nn.MLP:
    """Return the MLP of scaled space that `fold` makes into `model`.

    A constant feature of `scaling` is held at its value in the training rows: what the model
    made of it goes into the first layer's bias, and its column becomes zero.

    Raises
    ------
    InputError
        As `fold`.
    """
    layers = _layers(model, scaling)
    weight, bias = layers[0]
    bias = bias + weight @ scaling.input_mean
    layers[0] = np.where(scaling.constant, 0.0, weight * scaling.input_sd), bias
    weight, bias = layers[-1]
    layers[-1] = (
        weight / scaling.target_sd[:, None],
        (bias - scaling.target_mean) / scaling.target_sd,
    )
    return _with_ends(model, layers)


@lru_cache(maxsize=1)
def plain_mlp() -> Any:
    """Return the shape of an MLP with Equinox's defaults: to compare activations with."""
    return eqx.filter_eval_shape(eqx.nn.MLP, 1, 1, 1, 1, key=jax.random.PRNGKey(0))


def _moments(values: ArrayLike, what: str) -> tuple[Vector, Vector, NDArray[np.bool_]]:
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2 or not len(rows):
        raise InputError(f"training {what} of shape {rows.shape}: no rows to fit a scaling to")
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=0))
    if len(broken):
        count = int((~np.isfinite(rows)).any(axis=1).sum())
        raise InputError(
            f"training {what}: {count} of {len(rows)} rows are not finite (column {broken[0]})"
        )
    mean = rows.mean(axis=0)
    spread = rows.std(axis=0)
    constant = spread <= _CONSTANT_RELATIVE * np.abs(rows).max(axis=0)
    return mean, np.where(constant, 1.0, spread), constant


def _layers(model: eqx.nn.MLP, scaling: Scaling) -> list[tuple[Vector, Vector]]:
    if not isinstance(model, eqx.nn.MLP):
        raise InputError(
            f"standardising needs an equinox.nn.MLP, not {type(model).__name__}: the scaling is"
            " folded into its first and last layers"
        )
    linear_end = model.final_activation is plain_mlp().final_activation
    if not (model.use_bias and model.use_final_bias and linear_end):
        raise InputError(
            "standardising needs an MLP with biases and without a final activation: the scaling"
            " is folded into its first and last layers"
        )
    sizes = (len(scaling.input_mean), len(scaling.target_mean))
    first, last = model.layers[0].weight, model.layers[-1].weight
    if (first.shape[1], last.shape[0]) != sizes:
        raise InputError(
            f"a model of {first.shape[1]} inputs and {last.shape[0]} outputs, and a scaling of"
            f" {sizes[0]} and {sizes[1]}"
        )
    return [
        (np.asarray(layer.weight, np.float64), np.asarray(layer.bias, np.float64))
        for layer in model.layers
    ]


def _with_ends(model: eqx.nn.MLP, layers: list[tuple[Vector, Vector]]) -> eqx.nn.MLP:
    ends = {0, len(layers) - 1}
    with np.errstate(over="ignore"):
        arrays: list[tuple[Any, Any]] = [
            (
                jax.device_put(weight.astype(np.float32)),
                jax.device_put(bias.astype(np.float32)),
            )
            if index in ends
            else (model.layers[index].weight, model.layers[index].bias)
            for index, (weight, bias) in enumerate(layers)
        ]

    def parts(tree: eqx.nn.MLP) -> list[Any]:
        return [array for layer in tree.layers for array in (layer.weight, layer.bias)]

    return eqx.tree_at(parts, model, [array for pair in arrays for array in pair])
