"""The order of the rows in an epoch, a function of (seed, epoch) alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

#: Up to this many rows the sort key has at least 16 random bits.
_ONE_WORD = 2**16


def epoch_order(seed: Any, epoch: Any, rows: int) -> jax.Array:
    """Return a random permutation of ``range(rows)``.

    Parameters
    ----------
    seed, epoch
        Whole numbers in 0..2**32-1; may be traced.
    rows
        Number of rows.

    Notes
    -----
    Sorts random numbers that carry the row's index in their low bits: one array to sort instead
    of two, 37 us instead of 105 for 1351 rows. Two rows that draw the same high bits (21 of them
    for 1351 rows) keep their order, a bias of the order of 1e-6.
    """
    key = jax.random.fold_in(jax.random.PRNGKey(seed), epoch)
    bits = jax.random.bits(key, (rows,), jnp.uint32)
    if rows > _ONE_WORD:
        return jnp.argsort(bits).astype(jnp.int32)
    low = max(rows - 1, 1).bit_length()
    keyed = (bits >> low << low) | jnp.arange(rows, dtype=jnp.uint32)
    return (jnp.sort(keyed) & jnp.uint32(2**low - 1)).astype(jnp.int32)


def padded_epoch_order(seed: Any, epoch: Any, rows: Any, capacity: int) -> jax.Array:
    """Return `epoch_order` of `rows` rows, a traced number, at the head of ``(capacity,)``.

    Parameters
    ----------
    seed, epoch
        As for `epoch_order`.
    rows
        Number of rows, in ``1..capacity``; may be traced.
    capacity
        Length of what is returned. What stands behind the first `rows` entries means nothing.

    Notes
    -----
    JAX's bits at a position do not depend on how many are drawn, so the first `rows` of them are
    those of `epoch_order`; the keys of the padding sort behind all others.
    """
    key = jax.random.fold_in(jax.random.PRNGKey(seed), epoch)
    bits = jax.random.bits(key, (capacity,), jnp.uint32)
    index = jnp.arange(capacity, dtype=jnp.uint32)
    count = jnp.asarray(rows).astype(jnp.uint32)
    low = 32 - lax.clz(jnp.maximum(count - 1, 1))
    keyed = (bits >> low << low) | index
    last = jnp.uint32(2**32 - 1)
    if capacity <= _ONE_WORD:
        ordered = jnp.sort(jnp.where(index < count, keyed, last))
        return (ordered & ((jnp.uint32(1) << low) - 1)).astype(jnp.int32)
    keys = jnp.where(index < count, jnp.where(count > _ONE_WORD, bits, keyed), last)
    return jnp.argsort(keys).astype(jnp.int32)


#: `epoch_order`, compiled for use outside a program; equal bit for bit.
compiled_epoch_order = partial(jax.jit, static_argnames="rows")(epoch_order)
