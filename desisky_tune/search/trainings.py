"""The trainings of a trial under way, as every backend keeps them.

Where they stand, to which epoch they go next, and why a trial ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import numpy as np

from desisky_tune.search.backend import CURVE_SERIES, Assignment, Member, Progress
from desisky_tune.search.hyperparameters import patience_of
from desisky_tune.search.pooling import MemberCurve, pool, pooled_progress

if TYPE_CHECKING:
    from desisky_tune.training.arrays import Curve


@dataclass(frozen=True)
class Training:
    """One member under way: where it stands, and what it has measured.

    Attributes
    ----------
    state
        Of its program.
    epochs
        Done.
    seconds
        Spent on it.
    curve
        Every epoch, by name of series (`CURVE_SERIES`).
    objectives
        Mean of the bands' RMSE (mag) of every epoch.
    failed
        Whether a value was not finite.
    """

    state: Any
    epochs: int = 0
    seconds: float = 0.0
    curve: Mapping[str, list[float]] = field(default_factory=dict)
    objectives: Sequence[float] = ()
    failed: bool = False

    def after(self, curves: Sequence[Curve], state: Any, seconds: float, **changes: Any) -> Self:
        """Return this training with more epochs done, in `seconds`, in pieces."""
        table = np.concatenate(
            [
                np.column_stack([curve.train_loss, curve.test_loss, curve.rmse, curve.objective])
                for curve in curves
            ]
        )
        *series, objectives = table.T
        return replace(
            self,
            state=state,
            epochs=self.epochs + len(table),
            seconds=self.seconds + seconds,
            curve={
                name: [*self.curve.get(name, ()), *map(float, values)]
                for name, values in zip(CURVE_SERIES, series, strict=True)
            },
            objectives=[*self.objectives, *map(float, objectives)],
            failed=curves[-1].failed,
            **changes,
        )

    def notes(self) -> dict[str, Any]:
        """Return what is kept beside its state, to go on with later."""
        return {
            "epochs": self.epochs,
            "seconds": self.seconds,
            "curve": dict(self.curve),
            "objectives": list(self.objectives),
        }


SomeTraining = TypeVar("SomeTraining", bound=Training)
#: Validation rows of a fold.
RowsOf = Callable[[int], int]


class RunningTrial(Generic[SomeTraining]):
    """The members of a trial; whoever trains or keeps them holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.trainings: dict[Member, SomeTraining] = {}


def curves_of(trainings: Mapping[Member, Training], rows_of: RowsOf) -> list[MemberCurve]:
    """Return what each member has measured, with the weight of its fold."""
    return [
        MemberCurve(member, rows_of(member.fold), training.curve, training.objectives)
        for member, training in trainings.items()
    ]


def where_it_stands(
    trial: Assignment, trainings: Mapping[Member, Training], rows_of: RowsOf
) -> Progress:
    """Say where a trial stands: at the best epoch so far of its members together."""
    curves = curves_of(trainings, rows_of)
    seconds = sum(training.seconds for training in trainings.values())
    for member, training in trainings.items():
        if training.failed or not training.epochs:
            where = f" (fold {member.fold}, seed {member.seed})" if trial.members else ""
            reason = (
                f"training diverged: a loss was not finite in epoch {training.epochs - 1}{where}"
            )
            return pooled_progress(curves, seconds, reason)
    return pooled_progress(curves, seconds, patience=patience_of(trial.configuration))


def next_goal(
    trial: Assignment, trainings: Mapping[Member, Training], rows_of: RowsOf, epochs: int
) -> int:
    """Return the epochs to which all members go before anybody looks whether they go on.

    Without early stopping that is `epochs`. With it, no further than where the trial ends if no
    better value comes: so the epoch at which it ends follows from its pooled curve alone, and no
    epoch beyond it is ever trained, whatever the rungs and however often it was interrupted.
    """
    patience = patience_of(trial.configuration)
    if not patience:
        return epochs
    if len(trainings) < len(trial.trainings) or not all(t.epochs for t in trainings.values()):
        return min(epochs, patience + 1)
    best = pool(curves_of(trainings, rows_of)).best_epochs.values()
    return min(epochs, max(best) + patience + 1)
