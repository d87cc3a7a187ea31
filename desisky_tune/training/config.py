"""What a training run is asked to do, and what it leaves behind."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from desisky_tune.errors import InputError
from desisky_tune.training.names import LOSSES

Loss = str | Callable[[Any, Any], Any]


@dataclass
class TrainingConfig:
    """Settings of a `BroadbandTrainer`.

    Parameters
    ----------
    epochs
        Passes over the training rows, at least 1.
    learning_rate
        Step size of Adam, above 0 (an optimizer of your own brings its own).
    loss
        "l2", "huber", or a callable ``(pred, targets) -> scalar`` written with `jax.numpy`.
    huber_delta
        Residual (mag) at which the Huber loss turns from quadratic to linear, above 0.
    save_best
        Save the best model while training.
    save_dir
        Folder of the checkpoint; ``~/.cache/desisky/saved_models/broadband`` by default.
    run_name
        The checkpoint is ``<run_name>.eqx``.
    print_every
        Print a line every so many epochs; 0 prints nothing.
    validate_every
        Measure the test rows every so many epochs.
    seed
        Seed of the shuffles, in 0..2**32-1.
    standardize
        Scale inputs and targets inside, by the training rows, and fold the scaling into the
        model that comes back (`equinox.nn.MLP` only). False is the documented arithmetic.

    Raises
    ------
    InputError
        When a value is out of its range.
    """

    epochs: int
    learning_rate: float
    loss: Loss = "l2"
    huber_delta: float = 1.0
    save_best: bool = True
    save_dir: str | os.PathLike[str] | None = None
    run_name: str = "broadband_training"
    print_every: int = 50
    validate_every: int = 1
    seed: int = field(default=0, kw_only=True)
    standardize: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _at_least("epochs", self.epochs, 1)
        _at_least("print_every", self.print_every, 0)
        _at_least("validate_every", self.validate_every, 1)
        _at_least("seed", self.seed, 0)
        if self.seed >= 2**32:
            raise InputError(f"TrainingConfig: seed is {self.seed}; it must be below 2**32")
        for name in ("learning_rate", "huber_delta"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise InputError(f"TrainingConfig: {name} is {value!r}; it must be above 0")
        if not callable(self.loss) and self.loss not in LOSSES:
            allowed = " or ".join(repr(name) for name in LOSSES)
            raise InputError(
                f"Unknown loss: {self.loss!r}; TrainingConfig takes {allowed}, or a callable"
            )
        if not self.run_name or Path(self.run_name).name != self.run_name:
            raise InputError(
                f"TrainingConfig: run_name is {self.run_name!r}; it must be a file name"
                " without folders (save_dir names the folder)"
            )

    @property
    def loss_name(self) -> str:
        """The loss as it is written into a checkpoint."""
        return self.loss if isinstance(self.loss, str) else f"{_name_of(self.loss)} (custom)"

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint keeps under ``training.config``."""
        return {
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "loss": self.loss_name,
            "huber_delta": self.huber_delta,
            "seed": self.seed,
            "standardize": self.standardize,
        }


@dataclass
class TrainingHistory:
    """Losses of a run, by epoch.

    Attributes
    ----------
    train_losses
        One a finished epoch: mean over the training rows, each at the time of its own step.
    test_losses
        One a validated epoch (every `validate_every`-th): mean over all test rows.
    best_test_loss
        Lowest test loss.
    best_epoch
        The epoch, counted from 0, at which that was; -1 before any.
    config
        The settings of the run.
    """

    train_losses: list[float] = field(default_factory=list)
    test_losses: list[float] = field(default_factory=list)
    best_test_loss: float = math.inf
    best_epoch: int = -1
    config: TrainingConfig | None = None


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(
            f"TrainingConfig: {name} is {value!r}; it must be a whole number of at least {least}"
        )


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
