"""What a search can vary, and what a configuration says of it.

The five hyperparameters of the documented training run stand in every configuration. The optional
ones stand there only where the space names them; absent means off, and the training is then that
of a search without them, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from desisky_tune.training.names import SCHEDULES

if TYPE_CHECKING:
    from desisky_tune.training.hyperparameters import Hyperparameters

Number = int | float
Value = int | float | str


@dataclass(frozen=True)
class Hyperparameter:
    """What a hyperparameter is, whatever a space says of it.

    Attributes
    ----------
    name
        As in a space file and in a configuration.
    whole
        True when it counts something.
    lowest, highest
        Sane bounds (inclusive, where `positive` and `below` do not say otherwise).
    default
        The value of the documented training run.
    positive
        True when `lowest` itself is not allowed.
    below
        True when `highest` itself is not allowed.
    words
        What it may be, where it is no number.
    optional
        True when it stands in a configuration only where the space names it.
    """

    name: str
    whole: bool
    lowest: Number
    highest: Number
    default: Value
    positive: bool = False
    below: bool = False
    words: tuple[str, ...] = ()
    optional: bool = False

    @property
    def rule(self) -> str:
        """What is allowed, in words."""
        if self.words:
            return " or ".join(self.words)
        kind = "a whole number" if self.whole else "a number"
        floor = f"above {self.lowest:g}" if self.positive else f"from {self.lowest:g}"
        return f"{kind} {floor} to {'below ' if self.below else ''}{self.highest:g}"

    def coerce(self, value: Any) -> Value:
        """Return `value` as a number of the right kind, or one of the words.

        Raises
        ------
        ValueError
            With the rule that it breaks, when it cannot be one.
        """
        if self.words:
            if value not in self.words:
                raise ValueError(f"must be {self.rule}")
            return str(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be {self.rule}")
        if not math.isfinite(value) or (self.whole and value != int(value)):
            raise ValueError(f"must be {self.rule}")
        too_low = value <= self.lowest if self.positive else value < self.lowest
        too_high = value >= self.highest if self.below else value > self.highest
        if too_low or too_high:
            raise ValueError(f"must be {self.rule}")
        return int(value) if self.whole else float(value)


#: Every hyperparameter that a search can vary, in the order in which they are suggested.
HYPERPARAMETERS: Mapping[str, Hyperparameter] = {
    kind.name: kind
    for kind in (
        Hyperparameter("width", True, 1, 8192, 128),
        Hyperparameter("depth", True, 1, 64, 5),
        Hyperparameter("learning_rate", False, 0, 10, 1e-4, positive=True),
        Hyperparameter("huber_delta", False, 0, 100, 0.25, positive=True),
        Hyperparameter("batch_size", True, 1, 1_000_000, 32),
        Hyperparameter("schedule", False, 0, 0, "constant", words=SCHEDULES, optional=True),
        Hyperparameter("warmup", False, 0, 1, 0.0, below=True, optional=True),
        Hyperparameter("final_rate", False, 0, 1, 0.0, optional=True),
        Hyperparameter("weight_decay", False, 0, 100, 0.0, optional=True),
        Hyperparameter("gradient_clip", False, 0, 1e6, 0.0, optional=True),
        Hyperparameter("early_stopping", True, 0, 1_000_000, 0, optional=True),
    )
}

#: Those of the documented training run.
DOCUMENTED: tuple[str, ...] = tuple(n for n, kind in HYPERPARAMETERS.items() if not kind.optional)
#: Those that are off unless a space names them.
OPTIONAL: tuple[str, ...] = tuple(n for n, kind in HYPERPARAMETERS.items() if kind.optional)
#: Those that are words.
WORDS: tuple[str, ...] = tuple(n for n, kind in HYPERPARAMETERS.items() if kind.words)


def in_full(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with every hyperparameter; those that it does not name are off."""
    return {n: configuration.get(n, kind.default) for n, kind in HYPERPARAMETERS.items()}


def switched_on(configurations: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the optional hyperparameters that are on in one of several configurations."""
    off, found = in_full({}), [in_full(each) for each in configurations]
    return [name for name in OPTIONAL if any(each[name] != off[name] for each in found)]


def is_documented_default(configuration: Mapping[str, Any]) -> bool:
    """Whether a configuration is the one of the documented training run."""
    return in_full(configuration) == in_full({})


def of_training(configuration: Mapping[str, Any], epochs: int) -> Hyperparameters:
    """Return what the training core is told of a configuration.

    Parameters
    ----------
    configuration
        Of a trial.
    epochs
        That a complete trial has: a schedule spans them, wherever the training stops.
    """
    from desisky_tune.training.hyperparameters import Hyperparameters

    full = in_full(configuration)
    return Hyperparameters(
        learning_rate=float(full["learning_rate"]),
        huber_delta=float(full["huber_delta"]),
        schedule=str(full["schedule"]),
        warmup=float(full["warmup"]),
        final_rate=float(full["final_rate"]),
        weight_decay=float(full["weight_decay"]),
        gradient_clip=float(full["gradient_clip"]),
        epochs=epochs,
    )


def patience_of(configuration: Mapping[str, Any]) -> int:
    """Return the epochs without a better value after which a trial ends; 0 for never."""
    return int(configuration.get("early_stopping", 0))
