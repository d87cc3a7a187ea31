"""How far figures over a few nights can be trusted: a bootstrap that draws whole nights.

Exposures of one night share aerosol, cloud and airglow, so that their errors are not
independent: resampling single rows would give intervals that are too narrow. Nights are
drawn with replacement, as many as there are (Davison & Hinkley 1997, Bootstrap Methods and
their Application, section 3.8), the same ones for every model: differences are paired.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from desisky_tune.errors import InputError

Floats: TypeAlias = NDArray[np.float64]

#: Resamples: the ends of a 95 % interval are then known to about 3 % of its width.
DRAWS = 4000


def night_weights(nights: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Draw nights with replacement.

    Parameters
    ----------
    nights
        The night of each row, shape ``(n,)``.
    draws
        Number of resamples.
    seed
        Of the draw.

    Returns
    -------
    ndarray
        Shape ``(draws, n)``: how often each row is in each resample. Rows of one night
        have one weight.

    Raises
    ------
    InputError
        When there is no row.
    """
    _, codes = np.unique(np.asarray(nights), return_inverse=True)
    if not len(codes):
        raise InputError("no row to draw nights from")
    count = int(codes.max()) + 1
    draw = np.random.default_rng(seed)
    drawn = draw.multinomial(count, np.full(count, 1 / count), size=draws)
    return drawn[:, codes].astype(float)


def resampled_rmse(squared: ArrayLike, weights: Floats) -> Floats:
    """Return the RMSE of each resample.

    Parameters
    ----------
    squared
        Squared residuals (mag^2), shape ``(..., n, bands)``.
    weights
        From `night_weights`, shape ``(draws, n)``.

    Returns
    -------
    ndarray
        Shape ``(draws, ..., bands)``, mag.
    """
    errors = np.asarray(squared, dtype=float)
    totals = np.tensordot(weights, errors, axes=(1, errors.ndim - 2))
    counts = weights.sum(axis=1).reshape((-1, *(1,) * (errors.ndim - 1)))
    return np.sqrt(totals / counts)


def interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return the central interval of resampled values that holds `level` of them."""
    low, high = np.quantile(np.asarray(values, dtype=float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
