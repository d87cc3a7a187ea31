"""A Gaussian process on the unit cube, and the point of highest expected improvement.

Rasmussen & Williams, "Gaussian Processes for Machine Learning" (2006): eqs. 2.25-2.26 for
the prediction, 2.30 for the likelihood, 5.9 for its gradient, 4.17 for the Matern kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import norm, qmc

#: Bounds of the logarithms of (length scales, amplitude, noise).
_LENGTHS = (np.log(0.05), np.log(5.0))
_AMPLITUDE = (np.log(0.1), np.log(10.0))
_NOISE = (np.log(1e-4), np.log(0.5))

#: Sobol points (a power of two) among which the acquisition is searched first.
_CANDIDATES = 1024

#: Points that each round of the refinement starts from, and steps tried around each.
_LEADERS, _STEPS = 5, 50


def matern(a: np.ndarray, b: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the Matern-5/2 kernel of unit amplitude between points (n, d) and (m, d)."""
    difference = (a[:, None, :] - b[None, :, :]) / lengths
    return _matern_of(np.sqrt(np.square(difference).sum(axis=-1)))


def _matern_of(distance: np.ndarray) -> np.ndarray:
    scaled = np.sqrt(5.0) * distance
    return (1 + scaled + np.square(scaled) / 3) * np.exp(-scaled)


@dataclass(frozen=True)
class GaussianProcess:
    """A process of mean 0, conditioned on values.

    Attributes
    ----------
    points, values
        What it is conditioned on: (n, d) in the unit cube, (n,).
    lengths
        Length scale per axis, (d,).
    amplitude, noise
        Variances of the process and of the values around it.
    """

    points: np.ndarray
    values: np.ndarray
    lengths: np.ndarray
    amplitude: float
    noise: float

    @classmethod
    def fit(cls, points: np.ndarray, values: np.ndarray) -> GaussianProcess:
        """Choose lengths, amplitude and noise by their posterior.

        The prior is log-normal and weak: lengths near half the cube, amplitude near 1,
        noise near 0.01, which keeps a handful of points from claiming certainty.
        """
        axes = points.shape[1]
        centre = np.log([*[0.5] * axes, 1.0, 0.01])
        width = np.array([*[1.0] * axes, 1.0, 1.5])
        bounds = [*[_LENGTHS] * axes, _AMPLITUDE, _NOISE]
        squares = np.square(points[:, None, :] - points[None, :, :])

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = _negative_log_likelihood(theta, squares, values)
            offset = (theta - centre) / width
            return value + 0.5 * float(offset @ offset), gradient + offset / width

        found = minimize(loss, centre, jac=True, bounds=bounds, method="L-BFGS-B")
        best = np.exp(found.x)
        return cls(points, values, best[:axes], float(best[axes]), float(best[axes + 1]))

    @cached_property
    def _factor(self) -> tuple[np.ndarray, bool]:
        kernel = self.amplitude * matern(self.points, self.points, self.lengths)
        return cho_factor(kernel + self.noise * np.eye(len(self.points)), lower=True)

    def predict(self, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation, (m,) each, of the process at points (m, d)."""
        cross = self.amplitude * matern(where, self.points, self.lengths)
        mean = cross @ cho_solve(self._factor, self.values)
        explained = np.einsum("ij,ji->i", cross, cho_solve(self._factor, cross.T))
        variance = self.amplitude - explained
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def believing(self, pending: np.ndarray) -> GaussianProcess:
        """Return the process as it were if its own mean had been found at `pending`."""
        mean, _ = self.predict(pending)
        return GaussianProcess(
            np.vstack([self.points, pending]),
            np.concatenate([self.values, mean]),
            self.lengths,
            self.amplitude,
            self.noise,
        )


def _negative_log_likelihood(
    theta: np.ndarray, squares: np.ndarray, values: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return minus the log marginal likelihood and its gradient in the logarithms `theta`."""
    lengths, (amplitude, noise) = np.exp(theta[:-2]), np.exp(theta[-2:])
    by_axis = squares / np.square(lengths)
    distance = np.sqrt(by_axis.sum(axis=-1))
    kernel = amplitude * _matern_of(distance)
    count = len(values)
    factor = cho_factor(kernel + noise * np.eye(count), lower=True)
    weights = cho_solve(factor, values)
    loss = (
        0.5 * values @ weights + np.log(np.diag(factor[0])).sum() + 0.5 * count * np.log(2 * np.pi)
    )
    inner = cho_solve(factor, np.eye(count)) - np.outer(weights, weights)
    # d k / d log length_i = amplitude 5/3 (1 + sqrt(5) r) exp(-sqrt(5) r) x_i^2 / length_i^2
    scaled = np.sqrt(5.0) * distance
    slope = amplitude * 5 / 3 * (1 + scaled) * np.exp(-scaled)
    gradient = [0.5 * np.sum(inner * slope * by_axis[..., axis]) for axis in range(len(lengths))]
    gradient.append(0.5 * np.sum(inner * kernel))
    gradient.append(0.5 * noise * np.trace(inner))
    return float(loss), np.array(gradient)


def log_expected_improvement(mean: np.ndarray, sd: np.ndarray, best: float) -> np.ndarray:
    """Return log E[max(best - f, 0)] for normal f: finite also where it underflows.

    log(phi(z) + z Phi(z)) + log sd with z = (best - mean) / sd; far below 0 the bracket
    tends to phi(z) / z^2 (1 - 3 / z^2 + 15 / z^4).
    """
    z = (best - mean) / sd
    near = np.maximum(z, -5.0)
    direct = np.log(norm.pdf(near) + near * norm.cdf(near))
    square = np.square(np.minimum(z, -5.0))
    far = norm.logpdf(z) - np.log(square) + np.log1p(-3 / square + 15 / np.square(square))
    return np.log(sd) + np.where(z > -5.0, direct, far)


def next_point(
    process: GaussianProcess,
    best: float,
    rng: np.random.Generator,
    allowed: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Return the point (d,) of the unit cube where an improvement on `best` is expected most.

    A Sobol sequence first, then rounds of ever smaller steps around what leads: the
    expected improvement of many points costs hardly more than that of one.

    Parameters
    ----------
    process
        What is known.
    best
        The lowest value so far.
    rng
        Draws the candidates.
    allowed
        Tells which points (n, d) may be tried, (n,); None for all.
    """
    axes = process.points.shape[1]
    candidates = qmc.Sobol(axes, scramble=True, rng=rng).random(_CANDIDATES)
    leaders = process.points[np.argsort(process.values, kind="stable")[:_LEADERS]]
    for radius in (0.2, 0.1, 0.05, 0.02, 0.01):
        steps = rng.normal(0, radius, (len(leaders), _STEPS, axes))
        around = np.clip(leaders[:, None, :] + steps, 0, 1).reshape(-1, axes)
        candidates = np.vstack([candidates, around])
        gain = log_expected_improvement(*process.predict(candidates), best)
        if allowed is not None:
            gain[~allowed(candidates)] = -np.inf
        candidates = candidates[np.argsort(-gain, kind="stable")[:_LEADERS]]
        leaders = candidates
    return leaders[0]
