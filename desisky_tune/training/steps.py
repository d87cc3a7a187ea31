"""One optimiser step on one minibatch: for any model, and lean for the MLP of this project.

Both steppers have the same face. `pack` and `unpack` convert between an Equinox model and the
arrays that the compiled loop carries; `begin` makes the optimiser's state; `batches` prepares
a stack of minibatches; `step` consumes one; `predict` runs the model on all rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax

from desisky_tune.training.scaling import plain_mlp

#: Adam's constants (Kingma & Ba 2015; the defaults of optax).
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

#: From this batch size on, the product with the transposed weights costs no more than the one
#: with a transposed batch, whose masks and transposes XLA would have to move (measured).
_WIDE_BATCH = 64


def trainable(leaf: Any) -> bool:
    """True for what is trained: floating-point arrays, or their abstract shapes."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.issubdtype(leaf.dtype, jnp.inexact)
    return eqx.is_inexact_array(leaf)


class Stepper(Protocol):
    """What the compiled loop needs of a model and its optimiser."""

    def pack(self, model: Any) -> Any:
        """Return the trainable arrays of a model."""
        ...

    def unpack(self, parameters: Any) -> Any:
        """Return the model of these arrays."""
        ...

    def begin(self, parameters: Any) -> Any:
        """Return the optimiser's first state."""
        ...

    def batches(self, inputs: jax.Array) -> Any:
        """Prepare inputs ``(steps, batch, f)`` for `step`, leading axis kept."""
        ...

    def step(
        self, parameters: Any, optimiser: Any, batch: Any, loss: Any, learning_rate: Any
    ) -> tuple[Any, Any, jax.Array]:
        """Return new parameters, new optimiser state and the batch's loss.

        `loss` maps the predictions ``(batch, out)`` of this batch to a scalar.
        """
        ...

    def predict(self, parameters: Any, inputs: jax.Array) -> jax.Array:
        """Return predictions ``(n, out)``."""
        ...


class AdamState(NamedTuple):
    """Moments of Adam, and the number of steps made."""

    first: Any
    second: Any
    steps: jax.Array


def adam_rates(count: jax.Array, learning_rate: Any) -> tuple[jax.Array, jax.Array]:
    """Return the step size and the factor of the second moment at a (1-based) step."""
    steps = count.astype(jnp.float32)
    return learning_rate / (1 - BETA1**steps), 1 / (1 - BETA2**steps)


def adam_update(
    parameter: Any, first: Any, second: Any, gradient: Any, rates: tuple[Any, Any]
) -> tuple[Any, Any, Any]:
    """Update one array by Adam: optax's arithmetic, with the bias corrections as scalars.

    ``p - lr (m / c1) / (sqrt(v / c2) + eps)`` with ``lr / c1`` and ``1 / c2`` computed once: one
    division less an element, a quarter of the update's time.
    """
    size, unbias = rates
    first = BETA1 * first + (1 - BETA1) * gradient
    second = BETA2 * second + (1 - BETA2) * (gradient * gradient)
    return parameter - size * first / (jnp.sqrt(second * unbias) + EPSILON), first, second


class GenericStepper:
    """Any Equinox module, with any optax optimiser (default: Adam with a traced rate)."""

    def __init__(self, static: Any, optimizer: optax.GradientTransformation | None) -> None:
        self._static = static
        self._optimizer = optimizer

    def pack(self, model: Any) -> Any:
        return eqx.filter(model, trainable)

    def unpack(self, parameters: Any) -> Any:
        return eqx.combine(parameters, self._static)

    def begin(self, parameters: Any) -> Any:
        if self._optimizer is not None:
            return self._optimizer.init(parameters)
        zeros = jax.tree.map(jnp.zeros_like, parameters)
        return AdamState(zeros, zeros, jnp.int32(0))

    def batches(self, inputs: jax.Array) -> Any:
        return inputs

    def step(
        self, parameters: Any, optimiser: Any, batch: Any, loss: Any, learning_rate: Any
    ) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(lambda arrays: loss(self.predict(arrays, batch)))(
            parameters
        )
        if self._optimizer is not None:
            updates, optimiser = self._optimizer.update(gradients, optimiser, parameters)
            return optax.apply_updates(parameters, updates), optimiser, value
        count = optimiser.steps + 1
        rates = adam_rates(count, learning_rate)
        leaves, tree = jax.tree.flatten(parameters)
        updated = [
            adam_update(*arrays, rates)
            for arrays in zip(
                leaves,
                jax.tree.leaves(optimiser.first),
                jax.tree.leaves(optimiser.second),
                jax.tree.leaves(gradients),
                strict=True,
            )
        ]
        parameters, first, second = (
            jax.tree.unflatten(tree, [arrays[part] for arrays in updated]) for part in range(3)
        )
        return parameters, AdamState(first, second, count), value

    def predict(self, parameters: Any, inputs: jax.Array) -> jax.Array:
        return jax.vmap(self.unpack(parameters))(inputs)


class Packed(NamedTuple):
    """The weights of an MLP as the lean step holds them (also gradients and moments).

    Attributes
    ----------
    hidden
        ``depth - 1`` matrices ``(width, width)``, input by output.
    rest
        One vector: first weights, last weights, hidden biases, last bias. Together they are a
        few kilobytes, and cost one update instead of `depth` + 3.
    """

    hidden: tuple[jax.Array, ...]
    rest: jax.Array


class LeanStepper:
    """The ReLU MLP under Adam, its backward pass written out.

    The gradient is the one `jax.grad` gives; what is chosen here is the order and the layout of
    the products, for which XLA's CPU back end has a fast path (row-major left operand) or not:
    see `docs/performance.md`.
    """

    def __init__(self, skeleton: eqx.nn.MLP, batch_size: int) -> None:
        self._skeleton = skeleton
        self._width = skeleton.width_size
        self._depth = skeleton.depth
        self._in = int(skeleton.in_size)
        self._out = int(skeleton.out_size)
        self._wide = batch_size >= _WIDE_BATCH

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
        first, *hidden, last = model.layers
        return Packed(
            tuple(layer.weight.T for layer in hidden),
            jnp.concatenate(
                [
                    first.weight.T.ravel(),
                    last.weight.T.ravel(),
                    *(layer.bias for layer in (first, *hidden, last)),
                ]
            ),
        )

    def unpack(self, parameters: Packed) -> eqx.nn.MLP:
        first, last, biases, last_bias = self._split(parameters.rest)
        weights = [first, *parameters.hidden, last]
        arrays = [
            array
            for weight, bias in zip(weights, [*biases, last_bias], strict=True)
            for array in (weight.T, bias)
        ]
        return eqx.tree_at(
            lambda model: [leaf for layer in model.layers for leaf in (layer.weight, layer.bias)],
            self._skeleton,
            arrays,
            is_leaf=lambda leaf: leaf is None,
        )

    def begin(self, parameters: Packed) -> AdamState:
        zeros = jax.tree.map(jnp.zeros_like, parameters)
        return AdamState(zeros, zeros, jnp.int32(0))

    def batches(self, inputs: jax.Array) -> Any:
        return inputs, inputs.swapaxes(1, 2)

    def step(
        self, parameters: Packed, optimiser: AdamState, batch: Any, loss: Any, learning_rate: Any
    ) -> tuple[Packed, AdamState, jax.Array]:
        inputs, transposed_inputs = batch
        count = optimiser.steps + 1
        rates = adam_rates(count, learning_rate)
        _, last, _, _ = self._split(parameters.rest)
        units, predictions = self._forward(parameters, inputs)
        # The barrier keeps the transpose apart from the product, whose left operand is then
        # row-major.
        transposed = [lax.optimization_barrier(unit.T) for unit in units]
        masks = units if self._wide else transposed
        value, residual = jax.value_and_grad(loss)(predictions)
        signal = residual @ last.T if self._wide else _product(last, residual)
        signal = jnp.where(masks[-1] > 0, signal, 0)
        biases = [self._row_sum(signal)]
        hidden, first_moments, second_moments = [], [], []
        for layer in reversed(range(self._depth - 1)):
            weight = parameters.hidden[layer]
            gradient = self._outer(transposed[layer], signal)
            signal = signal @ weight.T if self._wide else weight @ signal
            # Adds nothing, but orders the update after the last use of the weights: XLA then
            # updates them in place and does not copy them first.
            after = (rates[0] + 0 * signal[0, 0], rates[1])
            moments = optimiser.first.hidden[layer], optimiser.second.hidden[layer]
            weight, first, second = adam_update(weight, *moments, gradient, after)
            hidden.append(weight)
            first_moments.append(first)
            second_moments.append(second)
            signal = jnp.where(masks[layer] > 0, signal, 0)
            biases.append(self._row_sum(signal))
        gradient = jnp.concatenate(
            [
                self._outer(transposed_inputs, signal).ravel(),
                (transposed[-1] @ residual).ravel(),
                *biases[::-1],
                residual.sum(0),
            ]
        )
        rest = adam_update(
            parameters.rest, optimiser.first.rest, optimiser.second.rest, gradient, rates
        )
        return (
            Packed(tuple(hidden[::-1]), rest[0]),
            AdamState(
                Packed(tuple(first_moments[::-1]), rest[1]),
                Packed(tuple(second_moments[::-1]), rest[2]),
                count,
            ),
            value,
        )

    def predict(self, parameters: Packed, inputs: jax.Array) -> jax.Array:
        return self._forward(parameters, inputs)[1]

    def _forward(self, parameters: Packed, inputs: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Return the hidden units of every layer ``(n, width)`` and the predictions."""
        first, last, biases, last_bias = self._split(parameters.rest)
        units = []
        rows = inputs
        for weight, bias in zip([first, *parameters.hidden], biases, strict=True):
            rows = jnp.maximum(rows @ weight + bias, 0)
            units.append(rows)
        return units, rows @ last + last_bias

    def _split(self, rest: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array], jax.Array]:
        """Return first weights, last weights, hidden biases and last bias of `Packed.rest`."""
        width, first, last = self._width, self._in * self._width, self._width * self._out
        start = first + last
        return (
            rest[:first].reshape(self._in, width),
            rest[first:start].reshape(width, self._out),
            [rest[start + i * width : start + (i + 1) * width] for i in range(self._depth)],
            rest[start + self._depth * width :],
        )

    def _outer(self, transposed: jax.Array, signal: jax.Array) -> jax.Array:
        """Return a layer's weight gradient ``(in, out)``."""
        return transposed @ signal if self._wide else _product(transposed, signal)

    def _row_sum(self, signal: jax.Array) -> jax.Array:
        return signal.sum(0 if self._wide else 1)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return ``left @ right.T``, as one product."""
    return lax.dot_general(left, right, (((1,), (1,)), ((), ())))
