"""The figures of an evaluation: RMSE by band and their means, with intervals over nights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from desisky_tune.data.columns import BANDS
from desisky_tune.inference.bootstrap import Floats, interval, night_weights, resampled_rmse
from desisky_tune.search.folds import observed

if TYPE_CHECKING:
    from desisky_tune.search.origin import SearchRun

#: What is told of a model on some rows: each band, the mean of all, the mean without V.
NAMES: tuple[str, ...] = (*BANDS, "mean", "mean_grz")


def squared_residuals(
    run: SearchRun, predict: Callable[[Any], np.ndarray], rows: np.ndarray
) -> Floats:
    """Return a model's squared residuals ``(n, 4)`` on rows of a run, mag^2."""
    predictions = np.asarray(predict(run.table.frame.iloc[rows]), dtype=float)
    return np.asarray((predictions - observed(run, rows)) ** 2)


def figures_of(squared: ArrayLike) -> dict[str, float]:
    """Return the RMSE (mag) by name of `NAMES`.

    Parameters
    ----------
    squared
        Squared residuals ``(n, 4)``, or ``(seeds, n, 4)``: the RMSE of each seed are then
        averaged.
    """
    errors = np.asarray(squared, dtype=float)
    if errors.ndim == 2:
        errors = errors[None]
    return _named(np.sqrt(errors.mean(axis=1)).mean(axis=0))


def intervals_of(squared: ArrayLike, nights: ArrayLike) -> dict[str, list[float]]:
    """Return the 95 % interval of each figure, over resampled nights."""
    resampled = _resampled(squared, nights)
    return {name: list(interval(values)) for name, values in resampled.items()}


def difference(one: ArrayLike, other: ArrayLike, nights: ArrayLike) -> dict[str, Any]:
    """Return how far the figures of `one` lie from those of `other`, paired by night.

    Returns
    -------
    dict
        By name of `NAMES`: ``difference`` (mag; negative where `one` is better) and its
        95 % ``interval``.
    """
    first, second = _resampled(one, nights), _resampled(other, nights)
    figures, others = figures_of(one), figures_of(other)
    return {
        name: {
            "difference": figures[name] - others[name],
            "interval": list(interval(first[name] - second[name])),
        }
        for name in NAMES
    }


def _resampled(squared: ArrayLike, nights: ArrayLike) -> dict[str, Floats]:
    errors = np.asarray(squared, dtype=float)
    rmse = resampled_rmse(errors, night_weights(nights))
    if rmse.ndim > 2:
        rmse = rmse.mean(axis=1)
    by_band = dict(zip(BANDS, rmse.T, strict=True))
    return {**by_band, "mean": rmse.mean(axis=1), "mean_grz": rmse[:, 1:].mean(axis=1)}


def _named(rmse: Floats) -> dict[str, float]:
    by_band = {band: float(value) for band, value in zip(BANDS, rmse, strict=True)}
    return {**by_band, "mean": float(rmse.mean()), "mean_grz": float(rmse[1:].mean())}
