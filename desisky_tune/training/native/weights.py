"""The native core's layout of weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from desisky_tune.training.initial import Layers

#: Numbers in a row of the layout; as in ``training.c``.
PANEL = 16


def weight_pitch(units: int) -> int:
    """Return the rows from one panel of weights to the next; as in ``training.c``."""
    return units | 1


def _padded(count: int) -> int:
    return -(-count // PANEL) * PANEL


def pack(layers: Layers) -> NDArray[np.float32]:
    """Return the weights of an MLP as one vector in the native layout.

    By layer: the weights ``(inputs / 16, units, 16)``, inputs innermost, with a row more where
    the number of units is even, and the biases; whole panels, filled with zeros.
    """
    parts: list[NDArray[np.float32]] = []
    for weight, bias in layers:
        units, inputs = weight.shape
        panels = np.zeros((_padded(inputs) // PANEL, weight_pitch(units), PANEL), np.float32)
        wide = np.zeros((units, _padded(inputs)), np.float32)
        wide[:, :inputs] = weight
        panels[:, :units] = wide.reshape(units, -1, PANEL).swapaxes(0, 1)
        parts += [panels.ravel(), np.pad(bias, (0, _padded(units) - units))]
    return np.concatenate(parts)


def unpack(packed: Any, sizes: list[tuple[int, int]]) -> Layers:
    """Return the layers of a vector that `pack` made; `sizes` is (inputs, units) by layer."""
    layers, at = [], 0
    packed = np.asarray(packed)
    for inputs, units in sizes:
        shape = (_padded(inputs) // PANEL, weight_pitch(units), PANEL)
        size = math.prod(shape)
        panels = packed[at : at + size].reshape(shape)[:, :units]
        weight = panels.swapaxes(0, 1).reshape(units, -1)[:, :inputs]
        at += size
        layers.append((np.ascontiguousarray(weight), packed[at : at + units].copy()))
        at += _padded(units)
    return layers
