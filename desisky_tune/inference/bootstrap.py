"""How far figures over a few nights can be trusted: a bootstrap that draws whole nights.

Exposures of one night share aerosol, cloud and airglow, so that their errors are not
independent: resampling single rows would give intervals that are too narrow. Nights are
drawn with replacement, as many as there are (Davison & Hinkley 1997, Bootstrap Methods and
their Application, section 3.8), the same ones for every model: differences are paired.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from desisky_tune.errors import InputError

Floats: TypeAlias = NDArray[np.float64]

#: Resamples: the ends of a 95 % interval are then known to about 3 % of its width.
DRAWS = 4000


@dataclass(frozen=True)
class NightWeights:
    """Resamples of nights: no more numbers than nights, however many rows they have.

    Attributes
    ----------
    drawn
        How often each night is in each resample, shape ``(draws, nights)``.
    night
        Which of them each row is of, shape ``(n,)``.
    """

    drawn: Floats
    night: NDArray[np.int64]

    @property
    def by_row(self) -> Floats:
        """How often each row is in each resample, shape ``(draws, n)``: of one night alike."""
        return np.asarray(self.drawn[:, self.night])

    def sums(self, values: Floats) -> Floats:
        """Return the sum over each night of values ``(n, ...)``, shape ``(nights, ...)``."""
        by_night = np.zeros((self.drawn.shape[1], *values.shape[1:]))
        np.add.at(by_night, self.night, values)
        return by_night


def night_weights(nights: ArrayLike, draws: int = DRAWS, seed: int = 0) -> NightWeights:
    """Draw nights with replacement, as many as there are.

    Parameters
    ----------
    nights
        The night of each row, shape ``(n,)``.
    draws
        Number of resamples.
    seed
        Of the draw.

    Raises
    ------
    InputError
        When there is no row.
    """
    _, codes = np.unique(np.asarray(nights), return_inverse=True)
    if not len(codes):
        raise InputError("no row to draw nights from")
    return NightWeights(_drawn(int(codes.max()) + 1, draws, seed), codes)


@lru_cache(maxsize=4)
def _drawn(nights: int, draws: int, seed: int) -> Floats:
    """Return how often each night is drawn; the same array for all who ask alike."""
    drawn = np.random.default_rng(seed).multinomial(nights, np.full(nights, 1 / nights), draws)
    weights = drawn.astype(float)
    weights.flags.writeable = False
    return weights


def resampled_rmse(squared: ArrayLike, weights: NightWeights) -> Floats:
    """Return the RMSE of each resample.

    Parameters
    ----------
    squared
        Squared residuals (mag^2), shape ``(..., n, bands)``.
    weights
        Of the same rows.

    Returns
    -------
    ndarray
        Shape ``(draws, ..., bands)``, mag.
    """
    errors = np.moveaxis(np.asarray(squared, dtype=float), -2, 0)
    totals = np.tensordot(weights.drawn, weights.sums(errors), axes=1)
    counts = weights.drawn @ np.bincount(weights.night)
    return np.sqrt(totals / counts.reshape((-1, *(1,) * (totals.ndim - 1))))


def interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return the central interval of resampled values that holds `level` of them."""
    low, high = np.quantile(np.asarray(values, dtype=float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
