"""A training at its true width, and in the padded width of a slot.

Padded units stay exactly zero under Adam with ReLU: a unit without weights gives 0, takes no
signal back, and so gets gradients, moments and updates of 0. Cutting them off and putting them
back therefore changes no bit, and a state outside a slot is `Program`'s, at the true width.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import numpy as np
from numpy.typing import NDArray

from desisky_tune.models.broadband import mlp_of_layers, on_device
from desisky_tune.training.arrays import TrainState
from desisky_tune.training.initial import initial_layers
from desisky_tune.training.lean import Packed
from desisky_tune.training.steps import AdamState

Array = NDArray[np.float32]


def fresh_state(
    in_size: int,
    out_size: int,
    width: int,
    depth: int,
    seed: int,
    model: eqx.nn.MLP | None = None,
) -> TrainState:
    """Begin a training with a model's weights, in scaled space.

    Those of ``equinox.nn.MLP(..., key=PRNGKey(seed))`` where no model is given.

    Returns
    -------
    TrainState
        NumPy arrays, as `desisky_tune.training.program.Program.init` has them on the device.
    """
    if model is None:
        layers = initial_layers(seed, in_size, out_size, width, depth)
    else:
        layers = [(np.asarray(each.weight), np.asarray(each.bias)) for each in model.layers]
    weights, biases = ([layer[part] for layer in layers] for part in (0, 1))
    rest = [weights[0].T.ravel(), biases[0], weights[-1].ravel(), *biases[1:]]
    hidden: Any = tuple(np.ascontiguousarray(weight.T) for weight in weights[1:-1])
    vector: Any = np.concatenate(rest)
    parameters = Packed(hidden, vector)
    zeros = jax.tree.map(np.zeros_like, parameters)
    start: dict[str, Any] = {
        "optimiser": AdamState(zeros, zeros, _scalar(0, np.int32)),
        "best_value": _scalar(np.inf, np.float32),
        "best_epoch": _scalar(-1, np.int32),
        "epoch": _scalar(0, np.int32),
        "seed": _scalar(seed, np.uint32),
        "failed": _scalar(False, np.bool_),
    }
    return TrainState(parameters=parameters, best_parameters=parameters, **start)


def _scalar(value: float, dtype: Any) -> Any:
    return np.asarray(value, dtype)


def at_width(state: TrainState, in_size: int, out_size: int, width: int) -> TrainState:
    """Return a state with hidden layers of `width` units: padded by zeros, or cut.

    Cutting is for padding: the weights of units that are cut off are lost.
    """
    first = in_size + 1

    def change(tree: Packed) -> Packed:
        return _packed_at(tree, first, out_size, width)

    optimiser = state.optimiser
    return state._replace(
        parameters=change(state.parameters),
        best_parameters=change(state.best_parameters),
        optimiser=AdamState(change(optimiser.first), change(optimiser.second), optimiser.steps),
    )


def model_of(parameters: Packed, in_size: int, out_size: int, width: int) -> eqx.nn.MLP:
    """Return the MLP of these weights, at their own width."""
    depth = len(parameters.hidden) + 1
    first, last, biases, last_bias = _ends(
        np.asarray(parameters.rest), in_size + 1, out_size, width, depth - 1
    )
    between = [
        (np.asarray(weight).T, bias) for weight, bias in zip(parameters.hidden, biases, strict=True)
    ]
    return mlp_of_layers(on_device([(first[:-1].T, first[-1]), *between, (last, last_bias)]))


def _packed_at(tree: Packed, first: int, out: int, width: int) -> Packed:
    between = len(tree.hidden)
    rest = np.asarray(tree.rest)
    old = (len(rest) - out) // (first + out + between)
    head, last, biases, last_bias = _ends(rest, first, out, old, between)
    parts = (_columns(part, width).ravel() for part in (head, last, biases))
    hidden: Any = tuple(
        np.ascontiguousarray(_columns(_columns(np.asarray(weight), width).T, width).T)
        for weight in tree.hidden
    )
    vector: Any = np.concatenate([*parts, last_bias])
    return Packed(hidden, vector)


def _ends(rest: Array, first: int, out: int, width: int, between: int) -> tuple[Any, ...]:
    """Take `Packed.rest` of one training apart: first and last weights, biases, last bias."""
    stops = np.cumsum([first * width, out * width, between * width])
    head, last, biases, last_bias = np.split(rest, stops)
    return (
        head.reshape(first, width),
        last.reshape(out, width),
        biases.reshape(between, width),
        last_bias,
    )


def _columns(array: Array, width: int) -> Array:
    """Return an array with `width` columns: cut off, or filled with zeros."""
    if width <= array.shape[1]:
        return array[:, :width]
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))
