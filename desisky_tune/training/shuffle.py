"""The order of the rows in an epoch, a function of (seed, epoch) alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

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


#: The same, compiled for use outside a program; equal bit for bit.
compiled_epoch_order = partial(jax.jit, static_argnames="rows")(epoch_order)
