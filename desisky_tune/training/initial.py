"""Initial weights as Equinox draws them, bit for bit.

Drawn with NumPy: JAX would compile a dozen small programs for each new shape, which takes longer
than many a training of a search.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Layers = list[tuple[NDArray[np.float32], NDArray[np.float32]]]
_Key = tuple[np.uint32, np.uint32]

#: Numbers drawn at a time: the generator's sixty passes over them stay in the caches.
_BLOCK = 8192

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def initial_layers(seed: int, in_size: int, out_size: int, width: int, depth: int) -> Layers:
    """Return the weights of ``equinox.nn.MLP(..., key=jax.random.PRNGKey(seed))``, bit for bit.

    Returns
    -------
    list of (ndarray, ndarray)
        By layer: weight ``(out, in)`` and bias ``(out,)``, float32, uniform within
        ``1 / sqrt(in)``.

    Notes
    -----
    JAX's generator as it is by default (``jax_threefry_partitionable``): Threefry-2x32 of 20 rounds
    (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), its counter the index of
    the number.
    """
    keys = _split((np.uint32(0), np.uint32(seed)), depth + 1)
    sizes = [(in_size, width), *[(width, width)] * (depth - 1), (width, out_size)]
    layers = []
    for key, (inputs, units) in zip(keys, sizes, strict=True):
        of_weight, of_bias = _split(key, 2)
        limit = 1 / math.sqrt(inputs)
        weight = _uniform(of_weight, units * inputs, limit).reshape(units, inputs)
        layers.append((weight, _uniform(of_bias, units, limit)))
    return layers


def _threefry(key: _Key, first: Any, second: Any) -> tuple[Any, Any]:
    """Threefry-2x32 of arrays of words; sums wrap around."""
    words = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    a, b = first + words[0], second + words[1]
    for turn in range(5):
        for bits in _ROTATIONS[turn % 2]:
            a = a + b
            b = (b << np.uint32(bits) | b >> np.uint32(32 - bits)) ^ a
        a = a + words[(turn + 1) % 3]
        b = b + words[(turn + 2) % 3] + np.uint32(turn + 1)
    return a, b


def _words(key: _Key, count: int, start: int = 0) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    index = np.arange(start, start + count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        first, second = _threefry(
            key, (index >> np.uint64(32)).astype(np.uint32), index.astype(np.uint32)
        )
    return first, second


def _split(key: _Key, count: int) -> list[_Key]:
    return list(zip(*_words(key, count), strict=True))


def _uniform(key: _Key, count: int, limit: float) -> NDArray[np.float32]:
    value = np.empty(count, np.float32)
    for start in range(0, count, _BLOCK):
        part = value[start : start + _BLOCK]
        part[:] = _uniform_block(key, start, len(part), limit)
    return value


def _uniform_block(key: _Key, start: int, count: int, limit: float) -> NDArray[np.float32]:
    first, second = _words(key, count, start)
    mantissa = (first ^ second) >> np.uint32(9) | np.uint32(0x3F800000)
    share = mantissa.view(np.float32) - np.float32(1)
    low, high = np.float32(-limit), np.float32(limit)
    # XLA rounds once, after the sum: a fused multiply-add.
    value = (share.astype(np.float64) * np.float64(high - low) + np.float64(low)).astype(np.float32)
    return np.maximum(low, value)
