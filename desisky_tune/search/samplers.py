"""The samplers of a search, each made anew for each trial.

A sampler is made for one trial, with a seed derived from the search's seed and the
trial's number, and keeps nothing: what it suggests is a function of (seed, number,
trials in the study). So a search that was interrupted, and whose study was written anew
from the ledger, goes on as it would have gone on.

TPE and random search are Optuna's. Optuna's own QMC sampler counts its points in the
study's attributes and takes the space from the first trial, its CMA-ES keeps its state
there and treats lists of choices at random, and its GP needs PyTorch: those three are
written here over the unit cube (`desisky_tune.search.unit_cube`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from desisky_tune.search.space import SearchSpec

#: Candidates that TPE draws per suggestion (Optuna's default).
TPE_CANDIDATES = 24
#: Suggestions for one trial that may break a constraint before chance takes over.
OWN_ATTEMPTS = 20


def make_sampler(spec: SearchSpec, number: int, attempt: int = 0) -> BaseSampler:
    """Return the sampler for trial `number` of a search.

    Parameters
    ----------
    spec
        The search.
    number
        The trial's.
    attempt
        Suggestions for this trial that broke a constraint so far. After `OWN_ATTEMPTS` of
        them chance decides (at once with qmc, whose sequence has one point per trial).
    """
    seed = trial_seed(spec.search.seed, number, attempt)
    startup = spec.search.startup_trials
    if attempt >= (1 if spec.search.sampler == "qmc" else OWN_ATTEMPTS):
        return RandomSampler(seed=seed)
    match spec.search.sampler:
        case "random":
            return RandomSampler(seed=seed)
        case "tpe":
            return SpaceTPESampler(spec.unconditional(), seed=seed, startup=startup)
    # These need scipy's distributions, which take a while to import.
    from desisky_tune.search.unit_cube import CmaSampler, GpSampler, SobolSampler

    match spec.search.sampler:
        case "qmc":
            return SobolSampler(spec, number, sequence=spec.search.seed)
        case "cmaes":
            return CmaSampler(spec, number, seed=seed, startup=startup)
        case "gp":
            return GpSampler(spec, number, seed=seed, startup=startup)
        case other:
            raise AssertionError(f"sampler {other!r} passed the specification's check")


def trial_seed(seed: int, number: int, attempt: int = 0) -> int:
    """Return the seed of trial `number` in a search with `seed`: 31 bits, well mixed."""
    source = [seed, number, attempt] if attempt else [seed, number]
    return int(np.random.SeedSequence(source).generate_state(1)[0]) & 0x7FFFFFFF


def sampler_settings(spec: SearchSpec) -> dict[str, Any]:
    """Return what decides the suggestions beside the space, for a run's record."""
    settings: dict[str, Any] = {
        "sampler": spec.search.sampler,
        "seed": spec.search.seed,
        "optuna": optuna.__version__,
    }
    if spec.search.sampler in ("tpe", "gp", "cmaes"):
        settings["startup_trials"] = spec.search.startup_trials
    if spec.search.sampler == "tpe":
        settings |= {
            "multivariate": True,
            "group": False,
            "constant_liar": True,
            "candidates": TPE_CANDIDATES,
        }
    return settings


class SpaceTPESampler(TPESampler):
    """Multivariate TPE over the space of the specification.

    Optuna takes the space from the trials that there are: the documented default, whose
    distributions may have been widened, would drop out hyperparameters for good. Every
    option whose default changed between Optuna's versions is given: `multivariate`
    (hyperparameters are sampled jointly), `group` off (what a condition may
    leave out stands outside the joint space, and is sampled by itself),
    `constant_liar` (trials under way count as bad, so that neighbours in flight differ).
    """

    def __init__(self, space: dict[str, BaseDistribution], *, seed: int, startup: int) -> None:
        super().__init__(
            n_startup_trials=startup,
            n_ei_candidates=TPE_CANDIDATES,
            seed=seed,
            multivariate=True,
            group=False,
            constant_liar=True,
        )
        self._space = {name: each for name, each in sorted(space.items()) if not each.single()}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the space of the specification."""
        return self._space
