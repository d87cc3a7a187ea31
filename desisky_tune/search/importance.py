"""How much each hyperparameter mattered, by Optuna's PED-ANOVA.

Watanabe et al. 2023 (IJCAI): where the best trials of a search lie along one axis,
against where all of them lie. It needs no more than the finished trials (Optuna's fANOVA
would need scikit-learn).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from desisky_tune.search.records import TrialRecord
from desisky_tune.search.space import SearchSpec

#: Complete trials below which nothing can be said.
FEWEST_TRIALS = 5
#: The best share of the trials, which PED-ANOVA holds against all of them.
BEST_SHARE = 0.25
#: Draws of the bootstrap over trials.
DRAWS = 60


@dataclass(frozen=True)
class Importance:
    """Of one hyperparameter; the importances of a search add up to 1.

    Attributes
    ----------
    name
        The hyperparameter.
    value
        Its share.
    low, high
        16th and 84th percentile of the share when the trials are drawn anew.
    """

    name: str
    value: float
    low: float
    high: float


def importances(spec: SearchSpec, records: Sequence[TrialRecord]) -> list[Importance]:
    """Return the importance of each searched hyperparameter, the largest first.

    Parameters
    ----------
    spec
        The search.
    records
        Its trials; the complete ones whose configuration lies in the space count.

    Returns
    -------
    list of Importance
        Empty where fewer than `FEWEST_TRIALS` trials count, or nothing is searched.
    """
    trials = _trials(spec, records)
    names = [name for name, each in sorted(spec.unconditional().items()) if not each.single()]
    if len(trials) < FEWEST_TRIALS or not names:
        return []
    shares = _shares(trials, names)
    draw = np.random.default_rng(spec.search.seed)
    drawn = np.array(
        [
            _shares([trials[i] for i in draw.integers(len(trials), size=len(trials))], names)
            for _ in range(DRAWS)
        ]
    )
    low, high = np.percentile(drawn, [16, 84], axis=0)
    found = [
        Importance(name, float(share), float(lowest), float(highest))
        for name, share, lowest, highest in zip(names, shares, low, high, strict=True)
    ]
    return sorted(found, key=lambda each: -each.value)


def _trials(spec: SearchSpec, records: Sequence[TrialRecord]) -> list[FrozenTrial]:
    """The complete trials as Optuna's; those outside the space have no place on its axes.

    Hyperparameters that a condition may leave out have none either.
    """
    space = spec.unconditional()
    trials = []
    for record in records:
        params, distributions = (
            {name: each for name, each in part.items() if name in space}
            for part in spec.as_params(record.configuration)
        )
        if record.state == "COMPLETE" and distributions == space:
            trials.append(
                optuna.create_trial(
                    state=TrialState.COMPLETE,
                    value=record.objective,
                    params=params,
                    distributions=distributions,
                )
            )
    return trials


def _shares(trials: Sequence[FrozenTrial], names: list[str]) -> np.ndarray:
    """Return the importance of each name, in that order, with the sum 1 (or all 0)."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    study.add_trials(trials)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    with warnings.catch_warnings():
        # Draws in which the best trials cannot be told apart: all importances are 0 then.
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=names)
    return np.array([found.get(name, 0.0) for name in names])
