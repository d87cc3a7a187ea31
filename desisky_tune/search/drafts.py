"""Suggestions that are looked at before they are written: those that break a constraint are not.

A value that a study's trial was given cannot be taken back. So a sampler is asked here for
a draft, as often as it takes, and only a configuration that may be trained gets into the study.
"""

from __future__ import annotations

from typing import Any, cast

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from desisky_tune.errors import SpaceError
from desisky_tune.search.hyperparameters import Value
from desisky_tune.search.samplers import OWN_ATTEMPTS, make_sampler
from desisky_tune.search.space import SearchSpec

#: Drafts for one trial, until the constraints are taken for ones that nothing can keep.
MOST_DRAFTS = 1000


class Draft:
    """Answers as an Optuna trial does, and writes nothing down."""

    def __init__(self, study: optuna.Study, trial: FrozenTrial, sampler: BaseSampler) -> None:
        self._study, self._trial, self._sampler = study, trial, sampler
        space = sampler.infer_relative_search_space(study, trial)
        self._joint = sampler.sample_relative(study, trial, space) if space else {}

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool) -> int:
        """Draw a whole number."""
        return int(self._draw(name, IntDistribution(low, high, log=log, step=step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool
    ) -> float:
        """Draw a number."""
        return float(self._draw(name, FloatDistribution(low, high, log=log, step=step)))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Draw one of a list."""
        return self._draw(name, CategoricalDistribution(choices))

    def _draw(self, name: str, distribution: BaseDistribution) -> Any:
        if name in self._joint:
            value = self._joint[name]
            if distribution._contains(distribution.to_internal_repr(value)):
                return value
        return self._sampler.sample_independent(self._study, self._trial, name, distribution)


def draw_within(
    spec: SearchSpec, number: int, study: optuna.Study, trial: FrozenTrial
) -> dict[str, Value]:
    """Return a configuration for trial `number` that keeps the constraints.

    One that the search began with is not drawn again while there is another: a sampler with
    the seed of an earlier run would repeat what that run began with.

    Parameters
    ----------
    spec
        The search.
    number
        The trial's.
    study, trial
        Where it belongs; not written to.

    Raises
    ------
    SpaceError
        When `MOST_DRAFTS` drafts broke a constraint; it names the last one's.
    """
    broken: str | None = None
    begun = spec.first_configurations()
    for attempt in range(MOST_DRAFTS):
        sampler = make_sampler(spec, number, attempt)
        draft = Draft(study, trial, sampler)
        configuration = spec.suggest(cast(optuna.Trial, draft))
        broken = spec.broken_constraint(configuration)
        if broken is None and (configuration not in begun or attempt >= OWN_ATTEMPTS):
            return configuration
    raise SpaceError(
        f"{spec.name}: {MOST_DRAFTS} suggestions in a row break {broken}; "
        "loosen it, or narrow the space to where it can be kept"
    )


def require_feasible(spec: SearchSpec) -> None:
    """Refuse constraints that nothing in the space seems to keep, before anything is read.

    Raises
    ------
    SpaceError
        As `draw_within`.
    """
    if spec.constrained:
        study = optuna.create_study()
        draw_within(spec, len(spec.first_configurations()), study, study.ask()._get_latest_trial())
