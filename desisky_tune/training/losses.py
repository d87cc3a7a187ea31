"""L2 and Huber losses on magnitudes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from desisky_tune.errors import InputError
from desisky_tune.training.names import LOSSES


def loss_l2(pred: Any, targets: Any) -> jax.Array:
    """Mean squared error over rows and bands.

    Parameters
    ----------
    pred, targets
        Magnitudes, shape ``(n, 4)``.

    Returns
    -------
    jax.Array
        Scalar, mag**2.
    """
    return jnp.mean((pred - targets) ** 2)


def loss_huber(pred: Any, targets: Any, delta: Any = 1.0) -> jax.Array:
    """Mean Huber loss over rows and bands.

    With residual `r`: ``r**2 / 2`` where ``|r| <= delta``, else ``delta * (|r| - delta / 2)``
    (Huber 1964, Ann. Math. Statist. 35, 73).

    Parameters
    ----------
    pred, targets
        Magnitudes, shape ``(n, 4)``.
    delta
        Where the loss turns linear, mag.

    Returns
    -------
    jax.Array
        Scalar.
    """
    size = jnp.abs(pred - targets)
    clipped = jnp.minimum(size, delta)
    return jnp.mean(clipped * (size - 0.5 * clipped))


def named_loss(
    loss: str | Callable[[Any, Any], Any],
) -> Callable[[Any, Any, Any], jax.Array]:
    """Return a loss as a function ``(pred, targets, huber_delta) -> scalar``.

    Raises
    ------
    InputError
        When the name is unknown.
    """
    if callable(loss):
        custom = loss
        return lambda pred, targets, huber_delta: custom(pred, targets)
    if loss == "l2":
        return lambda pred, targets, huber_delta: loss_l2(pred, targets)
    if loss == "huber":
        return loss_huber
    raise InputError(f"Unknown loss: {loss!r}; it must be one of {', '.join(LOSSES)}")


def loss_func(
    model: Callable[[Any], Any],
    inputs: Any,
    targets: Any,
    loss_name: str | Callable[[Any, Any], Any] = "l2",
    huber_delta: Any = 1.0,
) -> jax.Array:
    """Run a model on a batch and give the loss of its predictions.

    Parameters
    ----------
    model
        Maps one row of inputs ``(f,)`` to magnitudes ``(4,)``.
    inputs
        Shape ``(n, f)``.
    targets
        Magnitudes, shape ``(n, 4)``.
    loss_name
        "l2", "huber" or a callable ``(pred, targets) -> scalar``.
    huber_delta
        For "huber", mag.

    Returns
    -------
    jax.Array
        Scalar.

    Raises
    ------
    InputError
        When the name is unknown (a `ValueError`: "Unknown loss ...").
    """
    loss = named_loss(loss_name)
    return loss(jax.vmap(model)(jnp.asarray(inputs)), jnp.asarray(targets), huber_delta)
