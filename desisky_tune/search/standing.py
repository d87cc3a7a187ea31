"""How the finalists are ranked: from their out-of-fold errors to the one that is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from desisky_tune.inference.bootstrap import DRAWS, Floats, night_weights, resampled_rmse


@dataclass(frozen=True)
class Standing:
    """Where a finalist stands.

    Attributes
    ----------
    number
        Of its trial.
    objective
        Mean over the seeds of the pooled RMSE, the mean of the bands (mag).
    error
        Standard error of the objective over nights (mag).
    difference
        Objective minus that of the finalist with the lowest (mag).
    difference_error
        Standard error of the difference over nights, the same nights for both (mag).
    parameters
        Weights and biases.
    """

    number: int
    objective: float
    error: float
    difference: float
    difference_error: float
    parameters: int

    @property
    def tied(self) -> bool:
        """Whether it lies within one standard error of the lowest."""
        return self.difference <= self.difference_error


def objective_of(squared: ArrayLike) -> float:
    """Return the objective of squared out-of-fold residuals ``(seeds, n, bands)``, mag."""
    return float(np.sqrt(np.mean(np.asarray(squared, dtype=float), axis=1)).mean())


def rank(
    squared: Mapping[int, ArrayLike],
    nights: ArrayLike,
    parameters: Mapping[int, int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Standing]:
    """Rank finalists: the one to take first, the others by objective.

    Of those within one standard error of the lowest objective the simplest is taken: the
    one with the fewest parameters, then the lowest objective (the rule of one standard
    error, Breiman et al. 1984, Classification and Regression Trees, section 3.4.3; the error
    here is that of the difference, over the same resampled nights for both).

    Parameters
    ----------
    squared
        By number: squared out-of-fold residuals ``(seeds, n, bands)``, mag^2, of the same
        rows for every finalist.
    nights
        The night of each row, shape ``(n,)``.
    parameters
        By number: weights and biases.
    draws, seed
        Of the bootstrap.

    Returns
    -------
    list of Standing
        None without a finalist.
    """
    if not squared:
        return []
    weights = night_weights(nights, draws, seed)
    objectives = {number: objective_of(errors) for number, errors in squared.items()}
    resampled: dict[int, Floats] = {
        number: resampled_rmse(errors, weights).mean(axis=(1, 2))
        for number, errors in squared.items()
    }
    order = sorted(objectives, key=lambda number: (objectives[number], parameters[number], number))
    standings = [
        Standing(
            number=number,
            objective=objectives[number],
            error=float(resampled[number].std(ddof=1)),
            difference=objectives[number] - objectives[order[0]],
            difference_error=float((resampled[number] - resampled[order[0]]).std(ddof=1)),
            parameters=parameters[number],
        )
        for number in order
    ]
    tied = [each for each in standings if each.tied]
    if not tied:
        return standings
    taken = min(tied, key=lambda each: (each.parameters, each.objective, each.number))
    return [taken, *(each for each in standings if each is not taken)]
