"""The mean of several networks, weighted or not, as one network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import numpy as np
from numpy.typing import NDArray

from desisky_tune.models.broadband import mlp_of_layers, on_device


def mean_model(models: Sequence[eqx.nn.MLP], weights: Sequence[float] | None = None) -> eqx.nn.MLP:
    """Return one MLP that gives the mean of what several MLPs give.

    The members lie side by side in it: their first layers one above the other, the layers
    between on the diagonal of larger ones (zeros elsewhere), the (weighted) mean of their last ones
    at the end. A member with fewer layers than another is lengthened by identities, which ReLU
    leaves alone, since what it gives is never negative. Exact up to rounding.

    Parameters
    ----------
    models
        MLPs with ReLU, biases and at least one hidden layer, as `make_broadbandMLP` makes
        them, of the same inputs and outputs; widths and depths may differ.
    weights
        How much each counts; they add up to 1. None: all alike.

    Returns
    -------
    equinox.nn.MLP
        Its width is the sum of the members' widths, its depth the largest of theirs. A
        single member comes back as it is.

    Raises
    ------
    ValueError
        Without a model, with one that has no hidden layer, or when sizes do not agree.
    """
    if not models:
        raise ValueError("the mean of no model")
    shares = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(shares) != len(models) or not math.isclose(sum(shares), 1, abs_tol=1e-9):
        raise ValueError(f"the mean of {len(models)} models takes as many weights, of sum 1")
    if len(models) == 1:
        return models[0]
    layers = [_arrays(model) for model in models]
    ends = {(each[0][0].shape[1], each[-1][0].shape[0]) for each in layers}
    if len(ends) > 1 or min(len(each) for each in layers) < 2:
        raise ValueError(
            "the mean of models takes the same inputs and outputs and a hidden layer in each"
        )
    depth = max(len(each) for each in layers) - 1
    merged = [
        tuple(np.concatenate(parts) for parts in zip(*(each[0] for each in layers), strict=True))
    ]
    for level in range(1, depth):
        blocks = [each[level] if level < len(each) - 1 else _identity(each) for each in layers]
        merged.append((_diagonal([w for w, _ in blocks]), np.concatenate([b for _, b in blocks])))
    last = [(each[-1], share) for each, share in zip(layers, shares, strict=True)]
    merged.append(
        (
            np.concatenate([w * s for (w, _), s in last], axis=1),
            np.sum([b * s for (_, b), s in last], axis=0),
        )
    )
    layers_of_mean = [(w.astype(np.float32), b.astype(np.float32)) for w, b in merged]
    return mlp_of_layers(on_device(layers_of_mean))


def _arrays(model: eqx.nn.MLP) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    return [
        (np.asarray(layer.weight, np.float64), np.asarray(layer.bias, np.float64))
        for layer in model.layers
    ]


def _identity(layers: list[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """A layer that hands on what a member's last hidden layer gives."""
    width = layers[-1][0].shape[1]
    return np.eye(width), np.zeros(width)


def _diagonal(blocks: list[NDArray[Any]]) -> NDArray[Any]:
    whole = np.zeros((sum(map(len, blocks)),) * 2)
    at = 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole
