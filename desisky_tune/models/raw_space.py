"""Which models take raw features and give magnitudes.

A fresh MLP means nothing yet: a training that standardises starts it in scaled space. A model
that was loaded from a checkpoint, or came out of a training, has its scaling folded in and must
be unfolded first. The model itself cannot carry a mark (its arrays are all that the checkpoint
format holds), so the first array of its first layer is remembered here, for as long as it lives.
"""

from __future__ import annotations

import weakref
from typing import Any

import equinox as eqx
import jax

_MARKED: dict[int, weakref.ref[Any]] = {}


def mark_raw_space(model: Any) -> Any:
    """Remember that a model takes raw features and gives magnitudes; return the model."""
    array = _first_array(model)
    if array is not None:
        key = id(array)
        _MARKED[key] = weakref.ref(array, lambda _: _MARKED.pop(key, None))
    return model


def is_raw_space(model: Any) -> bool:
    """True when `mark_raw_space` saw this model, or one that shares its first array."""
    array = _first_array(model)
    reference = None if array is None else _MARKED.get(id(array))
    return reference is not None and reference() is array


def _first_array(model: Any) -> Any:
    arrays = [leaf for leaf in jax.tree.leaves(model) if eqx.is_array(leaf)]
    return arrays[0] if arrays else None
