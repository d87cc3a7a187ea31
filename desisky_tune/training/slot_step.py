"""One step of many ReLU MLPs of one shape at once, under Adam, in batched matrix products.

The arithmetic of `desisky_tune.training.lean` with one more axis in front, the slot. What a device
with many cores wants is different from what a CPU core wants, and so the order is, too:

- the weights of a slot and their two moments are read and written once a step, whatever the batch:
  that traffic is the ceiling (`docs/performance.md`). Each layer is updated as soon as its gradient
  stands and its weights have been used for the last time, one fused pass in place, while the
  gradient may still lie in the cache;
- products take their operands as they lie: a transpose is a flag of the product, not a copy;
- a slot that stands still is kept by a choice inside that same pass, which costs no traffic.

Slots never mix: every operation is batched over the slot, so that a NaN stays where it arose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from desisky_tune.training.hyperparameters import StepSettings, clip_factor, rate_at
from desisky_tune.training.lean import Packed
from desisky_tune.training.steps import AdamState, adam_rates, adam_update, decayed_update

#: What a product of float32 numbers is computed in. On a CPU all three are float32. On a GPU
#: "float32" is the full one, "tf32x3" three products of 10-bit mantissas that together come near
#: it, "tf32" one of them: faster, with errors of 3e-4 of a product's norm.
PRECISIONS: dict[str, lax.Precision] = {
    "float32": lax.Precision.HIGHEST,
    "tf32x3": lax.Precision.HIGH,
    "tf32": lax.Precision.DEFAULT,
}


class Batch(NamedTuple):
    """The minibatches of all slots.

    Attributes
    ----------
    inputs
        Scaled, with a last column of 1 that multiplies the first bias, ``(slots, batch, in + 1)``.
    targets
        Magnitudes, ``(slots, batch, out)``.
    counts
        Which rows count, bool ``(slots, batch)``: none where the slot has no step to make.
    """

    inputs: jax.Array
    targets: jax.Array
    counts: jax.Array


class SlotScale(NamedTuple):
    """What a slot's loss is made of: its output's scale and its Huber delta, ``(slots, ...)``."""

    target_mean: jax.Array
    target_sd: jax.Array
    huber_delta: jax.Array


class Ends(NamedTuple):
    """`Packed.rest` of all slots taken apart."""

    first: jax.Array
    last: jax.Array
    biases: jax.Array
    last_bias: jax.Array


class SlotStepper:
    """The step of one shape.

    Parameters
    ----------
    in_size, out_size, width, depth
        Of the MLPs, `width` with its padding.
    loss
        "huber" or "l2".
    precision
        A key of `PRECISIONS`.
    extended
        Heed schedule, weight decay and clipping. The whole gradient then stands before any
        weight is updated: its length decides on every one.
    """

    def __init__(
        self,
        *,
        in_size: int,
        out_size: int,
        width: int,
        depth: int,
        loss: str,
        precision: str,
        extended: bool = False,
    ) -> None:
        self._in = in_size
        self._out = out_size
        self._width = width
        self._depth = depth
        self._huber = loss == "huber"
        self._precision = PRECISIONS[precision]
        self._extended = extended

    def abstract(self, slots: int) -> Packed:
        """Return the shapes of the weights of so many slots."""
        width, between = self._width, self._depth - 1
        rest = (self._in + 1 + self._out + between) * width + self._out
        matrix: Any = jax.ShapeDtypeStruct((slots, width, width), jnp.float32)
        vector: Any = jax.ShapeDtypeStruct((slots, rest), jnp.float32)
        return Packed((matrix,) * between, vector)

    def step(
        self,
        parameters: Packed,
        optimiser: AdamState,
        batch: Batch,
        scale: SlotScale,
        settings: StepSettings,
    ) -> tuple[Packed, AdamState, jax.Array]:
        """Return new parameters, new optimiser state and each slot's loss, summed over rows."""
        rows = batch.counts.sum(axis=1)
        moves = rows > 0
        count = optimiser.steps + moves
        # A slot that has not begun divides by 1 - beta**0 = 0: its update is not taken.
        rates = adam_rates(jnp.maximum(count, 1), settings.learning_rate)
        ends = self._ends(parameters.rest)
        units, output = self._forward(parameters, ends, batch.inputs)
        loss, slope = self._loss(output, batch.targets, scale)
        loss = jnp.where(batch.counts, loss, 0).sum(axis=1)
        residual = slope * (scale.target_sd / (jnp.maximum(rows, 1) * self._out)[:, None])[:, None]
        residual = jnp.where(batch.counts[..., None], residual, 0)
        last_gradient = self._product(residual, units[-1], 1, 1)
        signal = jnp.where(units[-1] > 0, self._product(residual, ends.last, 2, 1), 0)
        hidden: list[jax.Array] = []
        first: list[jax.Array] = []
        second: list[jax.Array] = []
        biases: list[jax.Array] = []
        gradients: list[jax.Array] = []
        for layer in reversed(range(self._depth - 1)):
            weight = parameters.hidden[layer]
            biases.append(signal.sum(axis=1))
            gradient = self._product(units[layer], signal, 1, 1)
            signal = self._product(signal, weight, 2, 2)
            gradients.append(gradient)
            # Adds nothing, but orders the update after the last use of the weights: XLA then
            # updates them in place and does not copy them first.
            after = (rates[0] + 0 * signal[:, 0, 0], rates[1])
            moments = optimiser.first.hidden[layer], optimiser.second.hidden[layer]
            updated = _update(moves, weight, *moments, gradient, after)
            for kept, array in zip((hidden, first, second), updated, strict=True):
                kept.append(array)
            signal = jnp.where(units[layer] > 0, signal, 0)
        first_gradient = self._product(batch.inputs, signal, 1, 1)
        parts = [first_gradient, last_gradient, *biases[::-1], residual.sum(axis=1)]
        gradient = jnp.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
        if self._extended:
            whole = Packed(tuple(gradients[::-1]), gradient)
            return *_clipped_and_decayed(parameters, optimiser, whole, moves, settings), loss
        moments = optimiser.first.rest, optimiser.second.rest
        rest = _update(moves, parameters.rest, *moments, gradient, rates)
        return (
            Packed(tuple(hidden[::-1]), rest[0]),
            AdamState(
                Packed(tuple(first[::-1]), rest[1]), Packed(tuple(second[::-1]), rest[2]), count
            ),
            loss,
        )

    def measure(self, parameters: Packed, batch: Batch, scale: SlotScale) -> jax.Array:
        """Return each slot's loss and squared residuals by output, summed over the rows.

        Shape ``(slots, 1 + out)``, mag**2.
        """
        _, output = self._forward(parameters, self._ends(parameters.rest), batch.inputs)
        loss, _ = self._loss(output, batch.targets, scale)
        squared = (_magnitudes(output, scale) - batch.targets) ** 2
        sums = jnp.concatenate([loss[..., None], squared], axis=2)
        return jnp.where(batch.counts[..., None], sums, 0).sum(axis=1)

    # ------------------------------------------------------------------ parts of a step

    def _forward(
        self, parameters: Packed, ends: Ends, inputs: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        """Return the hidden units of every layer ``(slots, n, width)`` and the output."""
        units = [jnp.maximum(self._product(inputs, ends.first, 2, 1), 0)]
        for layer, weight in enumerate(parameters.hidden):
            bias = ends.biases[:, layer, None]
            units.append(jnp.maximum(self._product(units[-1], weight, 2, 1) + bias, 0))
        return units, self._product(units[-1], ends.last, 2, 2) + ends.last_bias[:, None]

    def _loss(
        self, output: jax.Array, targets: jax.Array, scale: SlotScale
    ) -> tuple[jax.Array, jax.Array]:
        """Return each row's loss ``(slots, n)``, the mean of the outputs, and its slope in mag.

        The slope is that of the outputs' sum, ``(slots, n, out)``.
        """
        residual = _magnitudes(output, scale) - targets
        if not self._huber:
            return (residual**2).mean(axis=2), 2 * residual
        delta = scale.huber_delta[:, None, None]
        size = jnp.abs(residual)
        clipped = jnp.minimum(size, delta)
        loss = clipped * (size - 0.5 * clipped)
        return loss.mean(axis=2), jnp.clip(residual, -delta, delta)

    def _ends(self, rest: jax.Array) -> Ends:
        slots, width = len(rest), self._width
        first = (self._in + 1) * width
        start = first + self._out * width
        stop = start + (self._depth - 1) * width
        return Ends(
            rest[:, :first].reshape(slots, self._in + 1, width),
            rest[:, first:start].reshape(slots, self._out, width),
            rest[:, start:stop].reshape(slots, self._depth - 1, width),
            rest[:, stop:],
        )

    def _product(self, left: jax.Array, right: jax.Array, over: int, on: int) -> jax.Array:
        """Multiply slot by slot, summing axis `over` of the left and `on` of the right."""
        return lax.dot_general(
            left, right, (((over,), (on,)), ((0,), (0,))), precision=self._precision
        )


def _update(
    moves: jax.Array, parameter: Any, first: Any, second: Any, gradient: Any, rates: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Update an array of all slots by Adam; one that does not move keeps every bit."""
    each = (slice(None),) + (None,) * (parameter.ndim - 1)
    new = adam_update(parameter, first, second, gradient, tuple(rate[each] for rate in rates))
    old = (parameter, first, second)
    chosen = (jnp.where(moves[each], *pair) for pair in zip(new, old, strict=True))
    parameter, first, second = chosen
    return parameter, first, second


def _clipped_and_decayed(
    parameters: Packed, optimiser: AdamState, gradient: Packed, moves: jax.Array, settings: Any
) -> tuple[Packed, AdamState]:
    """Update all weights of all slots by AdamW, each slot's gradient cut to its length."""
    squares = [
        jnp.square(leaf).reshape(len(leaf), -1).sum(axis=1) for leaf in jax.tree.leaves(gradient)
    ]
    factor = clip_factor(jnp.stack(squares).sum(axis=0), settings.gradient_clip)
    rate = rate_at(settings, optimiser.steps)
    count = optimiser.steps + moves
    rates, decay = adam_rates(jnp.maximum(count, 1), rate), rate * settings.weight_decay

    def update(
        weight: jax.Array, first: jax.Array, second: jax.Array, slope: jax.Array
    ) -> tuple[jax.Array, ...]:
        each = (slice(None),) + (None,) * (weight.ndim - 1)
        sizes = rates[0][each], rates[1][each]
        new = decayed_update(weight, first, second, slope * factor[each], sizes, decay[each])
        old = weight, first, second
        return tuple(jnp.where(moves[each], *pair) for pair in zip(new, old, strict=True))

    leaves, tree = jax.tree.flatten(parameters)
    others = (jax.tree.leaves(each) for each in (optimiser.first, optimiser.second, gradient))
    updated = [update(*arrays) for arrays in zip(leaves, *others, strict=True)]
    weights, first, second = (
        jax.tree.unflatten(tree, [arrays[part] for arrays in updated]) for part in range(3)
    )
    return weights, AdamState(first, second, count)


def _magnitudes(output: jax.Array, scale: SlotScale) -> jax.Array:
    return output * scale.target_sd[:, None] + scale.target_mean[:, None]
