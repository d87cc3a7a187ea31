"""One optimiser step on one minibatch, for any model; `lean` has one for the MLP.

A stepper converts between an Equinox model and the arrays that the compiled loop carries (`pack`,
`unpack`), makes the optimiser's state (`begin`), prepares a stack of minibatches (`batches`),
takes a `step` on one, and runs the model on all rows (`predict`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from desisky_tune.training.hyperparameters import StepSettings, clip_factor, rate_at

#: Adam's constants (Kingma & Ba 2015; the defaults of optax).
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


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
    steps: Any


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
    change, first, second = _adam_change(first, second, gradient, rates)
    return parameter - change, first, second


def decayed_update(
    parameter: Any, first: Any, second: Any, gradient: Any, rates: tuple[Any, Any], decay: Any
) -> tuple[Any, Any, Any]:
    """Update one array by AdamW, `decay` being the step's rate times the weight decay.

    One difference, not two: a decay of a few parts in 1e8 a step would be rounded away by itself.
    """
    change, first, second = _adam_change(first, second, gradient, rates)
    return parameter - (change + decay * parameter), first, second


def _adam_change(
    first: Any, second: Any, gradient: Any, rates: tuple[Any, Any]
) -> tuple[Any, Any, Any]:
    size, unbias = rates
    first = BETA1 * first + (1 - BETA1) * gradient
    second = BETA2 * second + (1 - BETA2) * (gradient * gradient)
    return size * first / (jnp.sqrt(second * unbias) + EPSILON), first, second


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


class ExtendedStepper(GenericStepper):
    """AdamW with a schedule and a clipped gradient; its learning rate is a `StepSettings`.

    ``optax.chain(clip_by_global_norm(...), adamw(schedule, weight_decay=...))``, weight decay on
    weights and biases alike (Loshchilov & Hutter 2019).
    """

    def __init__(self, static: Any) -> None:
        super().__init__(static, None)

    def step(
        self, parameters: Any, optimiser: Any, batch: Any, loss: Any, learning_rate: StepSettings
    ) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(lambda arrays: loss(self.predict(arrays, batch)))(
            parameters
        )
        leaves = jax.tree.leaves(gradients)
        squares = jnp.stack([jnp.sum(leaf * leaf) for leaf in leaves]).sum()
        factor = clip_factor(squares, learning_rate.gradient_clip)
        rate = rate_at(learning_rate, optimiser.steps)
        count = optimiser.steps + 1
        rates, decay = adam_rates(count, rate), rate * learning_rate.weight_decay
        old, tree = jax.tree.flatten(parameters)
        moments = jax.tree.leaves(optimiser.first), jax.tree.leaves(optimiser.second)
        updated = [
            decayed_update(*arrays, rates, decay)
            for arrays in zip(old, *moments, [factor * leaf for leaf in leaves], strict=True)
        ]
        parameters, first, second = (
            jax.tree.unflatten(tree, [arrays[part] for arrays in updated]) for part in range(3)
        )
        return parameters, AdamState(first, second, count), value
