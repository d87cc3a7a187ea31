"""Samplers over the unit cube: a Sobol sequence, CMA-ES, a Gaussian process.

Each hyperparameter that is searched is one axis from 0 to 1
(`desisky_tune.search.parameters`), lists of choices in rising order included. Like
every sampler of a search these keep nothing: they read the trials of the study.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import norm, qmc, rankdata

from desisky_tune.search.gaussian_process import GaussianProcess, next_point
from desisky_tune.search.hyperparameters import Value
from desisky_tune.search.parameters import Choices, Conditional, Range
from desisky_tune.search.space import SearchSpec


class _UnitCubeSampler(BaseSampler):
    """Suggests a point of the unit cube; random where it has none to suggest."""

    def __init__(self, spec: SearchSpec, number: int, *, seed: int) -> None:
        self._number = number
        self._random = RandomSampler(seed=seed)
        self._rng = np.random.default_rng(seed)
        self._spec = spec
        self._axes: dict[str, Range | Choices | Conditional] = {}
        self._space: dict[str, BaseDistribution] = {}
        for name, distribution in spec.distributions().items():
            if not distribution.single():
                self._axes[name] = spec.space[name]
                self._space[name] = distribution

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the space of the specification."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return one value per axis, or nothing to leave the trial to chance."""
        point = self._point(study) if self._axes else None
        if point is None:
            return {}
        return self._values(point)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one hyperparameter at random."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _point(self, study: Study) -> np.ndarray | None:
        """Return the point to try, (axes,) in 0 to 1."""
        raise NotImplementedError

    def _history(self, study: Study) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what is known: points (n, axes), values (n,), points under way (m, axes).

        A pruned trial counts with its last value: it lies above what the trial would have
        come to, and the trial was among the worst at its rung. The order is that of the
        trials' numbers, which a study that was written anew keeps.
        """
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != self._number]
        known = [
            t
            for t in trials
            if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and t.value is not None
        ]
        pending = [t for t in trials if t.state == TrialState.RUNNING]
        return (
            self._points(known),
            np.array([t.value for t in known], dtype=float),
            self._points(pending),
        )

    def _points(self, trials: list[FrozenTrial]) -> np.ndarray:
        points = np.full((len(trials), len(self._axes)), 0.5)
        for row, trial in enumerate(trials):
            for column, (name, axis) in enumerate(self._axes.items()):
                # A choice that is not on the list has no place on its axis: its middle.
                if name in trial.params:
                    points[row, column] = axis.fraction(trial.params[name])
        return points

    def _allowed(self, points: np.ndarray) -> np.ndarray:
        """Tell which points (n, axes) keep the constraints, (n,)."""
        fixed = self._spec.fixed_configuration()
        return np.array(
            [self._spec.broken_constraint(fixed | self._values(point)) is None for point in points]
        )

    def _values(self, point: np.ndarray) -> dict[str, Value]:
        """Return the hyperparameters at a point (axes,)."""
        return {
            name: axis.at(float(fraction))
            for (name, axis), fraction in zip(self._axes.items(), point, strict=True)
        }


class SobolSampler(_UnitCubeSampler):
    """A scrambled Sobol sequence; trial `number` has its point `number`."""

    def __init__(self, spec: SearchSpec, number: int, *, sequence: int) -> None:
        super().__init__(spec, number, seed=sequence)
        self._sequence = sequence

    def _point(self, study: Study) -> np.ndarray | None:
        engine = qmc.Sobol(len(self._axes), scramble=True, rng=self._sequence)
        if self._number:
            engine.fast_forward(self._number)
        return np.asarray(engine.random(1)[0])


class CmaSampler(_UnitCubeSampler):
    """CMA-ES, replayed from the trials of the study for each suggestion.

    The finished trials, by number, are told to a fresh optimizer in batches of its
    population; the suggestion is drawn from the distribution that it then has. Trials
    that were not drawn from it (the first ones, and late ones) inform it all the same.
    """

    def __init__(self, spec: SearchSpec, number: int, *, seed: int, startup: int) -> None:
        super().__init__(spec, number, seed=seed)
        self._seed = seed
        self._startup = startup

    def _point(self, study: Study) -> np.ndarray | None:
        from cmaes import CMA

        points, values, _ = self._history(study)
        axes = len(self._axes)
        if len(values) < self._startup or axes < 2:
            # A covariance needs two axes; a single one is searched at random.
            return None
        bounds = np.tile([0.0, 1.0], (axes, 1))
        order = np.argsort(values[: self._startup], kind="stable")
        best = points[order[: max(1, self._startup // 3)]]
        optimizer = CMA(mean=best.mean(axis=0), sigma=0.25, bounds=bounds, seed=self._seed)
        size = optimizer.population_size
        for start in range(self._startup, len(values) - size + 1, size):
            batch = slice(start, start + size)
            optimizer.tell(list(zip(points[batch], values[batch], strict=True)))
        return np.asarray(optimizer.ask())


class GpSampler(_UnitCubeSampler):
    """A Gaussian process and expected improvement.

    Values are replaced by the normal score of their rank, which keeps one absurd learning
    rate from flattening everything else. Trials under way count with the value that the
    process expects of them (the Kriging believer of Ginsbourger et al. 2010), so that
    neighbours in flight differ.
    """

    def __init__(self, spec: SearchSpec, number: int, *, seed: int, startup: int) -> None:
        super().__init__(spec, number, seed=seed)
        self._startup = startup

    def _point(self, study: Study) -> np.ndarray | None:
        points, values, pending = self._history(study)
        if len(values) < max(2, self._startup):
            return None
        scores = norm.ppf((rankdata(values) - 0.5) / len(values))
        with warnings.catch_warnings():
            # A flat likelihood ends scipy's line search early; the point it has will do.
            warnings.simplefilter("ignore", RuntimeWarning)
            process = GaussianProcess.fit(points, scores)
        if len(pending):
            process = process.believing(pending)
        allowed = self._allowed if self._spec.constrained else None
        return next_point(process, float(scores.min()), self._rng, allowed)
