"""One step of the ReLU MLP under Adam, its backward pass written out.

The gradient is the one `jax.grad` gives. What is chosen here is the order, the layout and the
number of the operations, for XLA's CPU back end (`docs/performance.md` has the figures):

- a matrix product is fast when its left operand is row-major over the summed axis; the weight
  gradient needs the transposed units for that, and they are made once, apart from the product;
- a small batch sends the signal back transposed, ``(width, batch)``, and so multiplies by
  weights as they lie; a large one sends it as ``(batch, width)`` and spares the transposes;
- the first bias is a row of the first weights, the inputs having one more column of ones;
- small arrays share one vector, and so one update by Adam;
- the weights are updated in place where the update is known to come after their last use.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from desisky_tune.training.scaling import plain_mlp
from desisky_tune.training.steps import AdamState, adam_rates, adam_update, trainable

#: From this batch size on the signal goes back as ``(batch, width)``.
WIDE_BATCH = 64


class Packed(NamedTuple):
    """The weights of an MLP as the lean step holds them (also gradients and moments).

    Attributes
    ----------
    hidden
        ``depth - 1`` matrices ``(width, width)``, input by output.
    rest
        One vector: first weights ``(in, width)`` and, as one more row, their bias; last weights
        ``(out, width)``; the other hidden biases; the last bias.
    """

    hidden: tuple[jax.Array, ...]
    rest: jax.Array


class Ends(NamedTuple):
    """`Packed.rest` taken apart."""

    first: jax.Array
    last: jax.Array
    biases: list[jax.Array]
    last_bias: jax.Array


class LeanStepper:
    """A `Stepper` for `equinox.nn.MLP` with ReLU and biases, and Adam."""

    def __init__(self, skeleton: eqx.nn.MLP, batch_size: int) -> None:
        self._skeleton = skeleton
        self._width = skeleton.width_size
        self._depth = skeleton.depth
        self._in = int(skeleton.in_size)
        self._out = int(skeleton.out_size)
        self._wide = batch_size >= WIDE_BATCH

    @staticmethod
    def fits(model: Any) -> bool:
        """True for a float32 MLP of this project's kind: ReLU, biases, a linear end."""
        if type(model) is not eqx.nn.MLP or model.depth < 1:
            return False
        plain = plain_mlp()
        arrays = jax.tree.leaves(eqx.filter(model, trainable))
        return (
            model.use_bias
            and model.use_final_bias
            and model.activation is plain.activation
            and model.final_activation is plain.final_activation
            and model.in_size != "scalar"
            and model.out_size != "scalar"
            and all(array.dtype == jnp.float32 for array in arrays)
        )

    def pack(self, model: Any) -> Packed:
        """Return the trainable arrays of a model."""
        first, *hidden, last = model.layers
        rest = [first.weight.T.ravel(), first.bias, last.weight.ravel()]
        rest += [layer.bias for layer in (*hidden, last)]
        return Packed(tuple(layer.weight.T for layer in hidden), jnp.concatenate(rest))

    def unpack(self, parameters: Packed) -> eqx.nn.MLP:
        """Return the model of these arrays."""
        ends = self._ends(parameters.rest)
        arrays = [ends.first[:-1].T, ends.first[-1]]
        for weight, bias in zip(parameters.hidden, ends.biases, strict=True):
            arrays += [weight.T, bias]
        arrays += [ends.last, ends.last_bias]
        return eqx.tree_at(
            lambda model: [leaf for layer in model.layers for leaf in (layer.weight, layer.bias)],
            self._skeleton,
            arrays,
            is_leaf=lambda leaf: leaf is None,
        )

    def begin(self, parameters: Packed) -> AdamState:
        """Return the optimiser's first state."""
        zeros = jax.tree.map(jnp.zeros_like, parameters)
        return AdamState(zeros, zeros, jnp.int32(0))

    def batches(self, inputs: jax.Array) -> Any:
        """Return inputs ``(steps, batch, in + 1)``, the last one 1, and the same transposed."""
        augmented = _augmented(inputs)
        return augmented, augmented.swapaxes(1, 2)

    def step(
        self, parameters: Packed, optimiser: AdamState, batch: Any, loss: Any, learning_rate: Any
    ) -> tuple[Packed, AdamState, jax.Array]:
        """Return new parameters, new optimiser state and the batch's loss."""
        rows, columns = batch
        count = optimiser.steps + 1
        rates = adam_rates(count, learning_rate)
        ends = self._ends(parameters.rest)
        units, predictions = self._forward(parameters, rows)
        # What the weight gradients are multiplied by from the left. The barrier keeps the
        # transpose apart from the product, which XLA would otherwise make of it.
        left = [lax.optimization_barrier(unit.T) for unit in units[:-1]]
        value, residual = jax.value_and_grad(loss)(predictions)
        last_gradient = lax.optimization_barrier(residual.T) @ units[-1]
        if self._wide:
            signal = jnp.where(units[-1] > 0, residual @ ends.last, 0)
        else:
            last = lax.optimization_barrier(ends.last.T)
            signal = jnp.where(units[-1].T > 0, _product(last, residual), 0)
        hidden, first_moments, second_moments, biases = [], [], [], []
        for layer in reversed(range(self._depth - 1)):
            weight = parameters.hidden[layer]
            biases.append(signal.sum(0 if self._wide else 1))
            gradient = left[layer] @ signal if self._wide else _product(left[layer], signal)
            signal = signal @ weight.T if self._wide else weight @ signal
            # Adds nothing, but orders the update after the last use of the weights: XLA then
            # updates them in place and does not copy them first.
            after = (rates[0] + 0 * signal[0, 0], rates[1])
            moments = optimiser.first.hidden[layer], optimiser.second.hidden[layer]
            weight, first, second = adam_update(weight, *moments, gradient, after)
            hidden.append(weight)
            first_moments.append(first)
            second_moments.append(second)
            mask = units[layer] if self._wide else left[layer]
            signal = jnp.where(mask > 0, signal, 0)
        first_gradient = columns @ signal if self._wide else _product(columns, signal)
        gradient = jnp.concatenate(
            [first_gradient.ravel(), last_gradient.ravel(), *biases[::-1], residual.sum(0)]
        )
        moments = optimiser.first.rest, optimiser.second.rest
        rest, first, second = adam_update(parameters.rest, *moments, gradient, rates)
        return (
            Packed(tuple(hidden[::-1]), rest),
            AdamState(
                Packed(tuple(first_moments[::-1]), first),
                Packed(tuple(second_moments[::-1]), second),
                count,
            ),
            value,
        )

    def predict(self, parameters: Packed, inputs: jax.Array) -> jax.Array:
        """Return predictions ``(n, out)``."""
        return self._forward(parameters, _augmented(inputs))[1]

    def _forward(self, parameters: Packed, rows: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Return the hidden units of every layer ``(n, width)`` and the predictions."""
        ends = self._ends(parameters.rest)
        units = [jnp.maximum(rows @ ends.first, 0)]
        for weight, bias in zip(parameters.hidden, ends.biases, strict=True):
            units.append(jnp.maximum(units[-1] @ weight + bias, 0))
        return units, _product(units[-1], ends.last) + ends.last_bias

    def _ends(self, rest: jax.Array) -> Ends:
        width = self._width
        first = (self._in + 1) * width
        start = first + self._out * width
        stop = start + (self._depth - 1) * width
        biases = rest[start:stop].reshape(self._depth - 1, width)
        return Ends(
            rest[:first].reshape(self._in + 1, width),
            rest[first:start].reshape(self._out, width),
            [biases[layer] for layer in range(self._depth - 1)],
            rest[stop:],
        )


def _augmented(inputs: jax.Array) -> jax.Array:
    """Return the inputs with one more, 1, that multiplies the first bias."""
    return jnp.concatenate([inputs, jnp.ones((*inputs.shape[:-1], 1), inputs.dtype)], axis=-1)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return ``left @ right.T``, as one product."""
    return lax.dot_general(left, right, (((1,), (1,)), ((), ())))
