"""The one interface between the search and whatever trains.

A backend takes a trial to a number of epochs and says what it measured. The search
knows nothing else of it, so that a fake one with a virtual clock (the tests), a
trainer inside the trial's own process (`LocalBackend`) and an engine that serves
many trials can stand in for one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from desisky_tune.data.columns import BANDS

#: Names of the per-epoch series that a curve holds.
CURVE_SERIES: tuple[str, ...] = ("train_loss", "test_loss", *BANDS)


@dataclass(frozen=True)
class Member:
    """One training of a trial's configuration.

    Attributes
    ----------
    fold
        Which of the rows' folds it is trained and validated on.
    seed
        Seed of the initial weights and of the shuffles.
    """

    fold: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Assignment:
    """A trial as a backend sees it.

    Attributes
    ----------
    number
        The trial's number in the study.
    configuration
        Hyperparameters: width, depth, learning_rate, huber_delta, batch_size, and the optional
        ones that the space names.
    seed
        Seed of the initial weights and of the shuffles.
    members
        What is trained, where it is more than one; empty: fold 0 and `seed`. Every seed
        has the same folds.
    keep_members
        When its last epoch is done, the weights of every member at the epoch that the
        pooled curve chose for its seed are to lie on disk
        (`desisky_tune.search.local.member_path`).
    """

    number: int
    configuration: Mapping[str, Any]
    seed: int
    members: tuple[Member, ...] = ()
    keep_members: bool = False

    @property
    def trainings(self) -> tuple[Member, ...]:
        """The members, also where there is one alone."""
        return self.members or (Member(0, self.seed),)


@dataclass(frozen=True)
class Progress:
    """What a backend measured on the validation rows after `epochs` epochs.

    With several members these are the figures of `desisky_tune.search.pooling.pool`.

    Attributes
    ----------
    epochs
        Epochs trained in total, by every member.
    objective
        Lowest RMSE so far (mag): per band over all rows, then the mean of the bands; the
        mean over the seeds, where there are several.
    best_epoch
        The epoch, counted from 0, at which that was; the lower median over the seeds.
    rmse
        RMSE by band at that epoch (mag).
    train_loss, test_loss
        Losses at that epoch.
    seconds
        Time spent training this trial so far.
    curve
        Every epoch so far, by name of series (`CURVE_SERIES`).
    objectives
        The RMSE of every epoch so far (mag), the mean of the bands; with several seeds the
        mean over them of the lowest so far.
    reason
        Why the trial cannot go on; None while all is well.
    spread
        Standard deviation of the objective over the seeds (mag); None with one seed.
    stopped
        Whether the trial has ended early, its best value being old enough
        (``early_stopping``): it is complete.
    """

    epochs: int
    objective: float
    best_epoch: int
    rmse: Mapping[str, float]
    train_loss: float
    test_loss: float
    seconds: float
    curve: Mapping[str, list[float]] = field(default_factory=dict)
    objectives: Sequence[float] = ()
    reason: str | None = None
    spread: float | None = None
    stopped: bool = False

    @property
    def failed(self) -> bool:
        """True when the numbers of this trial can no longer be used."""
        return self.reason is not None or not math.isfinite(self.objective)

    def ends_at(self, epochs: int) -> bool:
        """Whether there is nothing to train on the way to `epochs`: done, ended early, failed."""
        return self.failed or self.stopped or self.epochs >= epochs

    def objectives_at(self, rungs: Sequence[int]) -> dict[int, float]:
        """Return the lowest RMSE up to each of `rungs` (epochs) that was reached in good order."""
        whole = next(
            (at for at, value in enumerate(self.objectives) if not math.isfinite(value)),
            len(self.objectives),
        )
        return {rung: min(self.objectives[:rung]) for rung in rungs if rung <= whole}

    def as_result(self, rungs: Sequence[int] = ()) -> dict[str, Any]:
        """The metrics as Ray Tune carries them, with the objective at each rung reached."""
        return {
            "epochs": self.epochs,
            "objective": self.objective,
            "best_epoch": self.best_epoch,
            "rmse": dict(self.rmse),
            "train_loss": self.train_loss,
            "test_loss": self.test_loss,
            "seconds": self.seconds,
            "curve": dict(self.curve),
            "rungs": self.objectives_at(rungs),
            "reason": self.reason,
            "spread": self.spread,
            "stopped": self.stopped,
        }


def stopped_by(error: Exception, epochs: int) -> Progress:
    """Say that a trial cannot go on after `epochs` epochs, because of an exception."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    nan = math.nan
    return Progress(
        epochs=epochs,
        objective=nan,
        best_epoch=-1,
        rmse={},
        train_loss=nan,
        test_loss=nan,
        seconds=0.0,
        reason=reason[:500],
    )


class Backend(Protocol):
    """Whatever trains."""

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        """Take a trial to `epochs` epochs in total, from wherever it stands.

        Asking for epochs that are already done trains nothing: the answer is where the
        trial stands, which is further where an earlier process has taken it further.
        """
        ...

    def release(self, trial: Assignment) -> None:
        """Forget a trial that will not be advanced any further."""
        ...
