"""The one interface between the search and whatever trains.

A backend takes a trial to a number of epochs and says what it measured. The search
knows nothing else of it, so that a fake one with a virtual clock (the tests), a
trainer inside the trial's own process (`LocalBackend`) and an engine that serves
many trials can stand in for one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from desisky_tune.data.columns import BANDS

#: Names of the per-epoch series that a curve holds.
CURVE_SERIES: tuple[str, ...] = ("train_loss", "test_loss", *BANDS)


@dataclass(frozen=True)
class Assignment:
    """A trial as a backend sees it.

    Attributes
    ----------
    number
        The trial's number in the study.
    configuration
        Hyperparameters: width, depth, learning_rate, huber_delta, batch_size.
    seed
        Seed of the initial weights and of the shuffles.
    """

    number: int
    configuration: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Progress:
    """What a backend measured on the validation rows after `epochs` epochs.

    Attributes
    ----------
    epochs
        Epochs trained in total.
    objective
        Lowest RMSE so far (mag): per band over all rows, then the mean of the bands.
    best_epoch
        The epoch, counted from 0, at which that was.
    rmse
        RMSE by band at that epoch (mag).
    train_loss, test_loss
        Losses at that epoch.
    seconds
        Time spent training this trial so far.
    curve
        Every epoch so far, by name of series (`CURVE_SERIES`).
    reason
        Why the trial cannot go on; None while all is well.
    """

    epochs: int
    objective: float
    best_epoch: int
    rmse: Mapping[str, float]
    train_loss: float
    test_loss: float
    seconds: float
    curve: Mapping[str, list[float]] = field(default_factory=dict)
    reason: str | None = None

    @property
    def failed(self) -> bool:
        """True when the numbers of this trial can no longer be used."""
        return self.reason is not None or not math.isfinite(self.objective)

    def as_result(self) -> dict[str, Any]:
        """The metrics as Ray Tune carries them."""
        return {
            "epochs": self.epochs,
            "objective": self.objective,
            "best_epoch": self.best_epoch,
            "rmse": dict(self.rmse),
            "train_loss": self.train_loss,
            "test_loss": self.test_loss,
            "seconds": self.seconds,
            "curve": dict(self.curve),
            "reason": self.reason,
        }


class Backend(Protocol):
    """Whatever trains."""

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        """Take a trial to `epochs` epochs in total, from wherever it stands.

        Asking again for epochs that are already done trains nothing and gives the
        same answer, so that a caller that was interrupted may ask twice.
        """
        ...

    def release(self, trial: Assignment) -> None:
        """Forget a trial that will not be advanced any further."""
        ...
