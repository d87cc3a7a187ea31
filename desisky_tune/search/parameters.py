"""What may stand for one hyperparameter in a space: a range, a list of choices, a value.

Each of the three gives an Optuna distribution, and maps to and from the unit interval,
so that samplers which work on the unit cube treat all of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from optuna import Trial
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from desisky_tune.search.expression import Condition
from desisky_tune.search.hyperparameters import Number, Value, in_full

#: What an entry of a space may hold.
ENTRY_KEYS: tuple[str, ...] = ("low", "high", "log", "step", "choices", "when", "otherwise")


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included.

    Attributes
    ----------
    low, high
        Bounds; whole numbers where the hyperparameter counts something.
    log
        Every factor is equally likely, instead of every difference.
    step
        Distance of neighbouring values from `low` on; None for a float without one.
    whole
        True for a hyperparameter that counts something.
    """

    low: Number
    high: Number
    log: bool = False
    step: Number | None = None
    whole: bool = False

    @property
    def distribution(self) -> BaseDistribution:
        """The distribution as Optuna knows it."""
        if self.whole:
            return IntDistribution(
                int(self.low), int(self.top), log=self.log, step=int(self.step or 1)
            )
        return FloatDistribution(self.low, self.top, log=self.log, step=self.step)

    @property
    def top(self) -> Number:
        """The highest value that the steps reach: `high`, or the last step below it."""
        if self.step is None:
            return self.high
        # Decimal, because 0.3 // 0.1 is 2 in binary floating point.
        low, high, step = (Decimal(str(value)) for value in (self.low, self.high, self.step))
        top = low + (high - low) // step * step
        return int(top) if self.whole else float(top)

    def suggest(self, name: str, trial: Trial) -> Number:
        """Ask `trial` for a value."""
        if self.whole:
            return trial.suggest_int(
                name, int(self.low), int(self.top), log=self.log, step=int(self.step or 1)
            )
        return trial.suggest_float(name, self.low, self.top, log=self.log, step=self.step)

    def contains(self, value: Value) -> bool:
        """Whether `value` is one of this range."""
        assert not isinstance(value, str)
        if not self.low <= value <= self.top:
            return False
        if self.step is None or self.log:
            return True
        steps = (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-8

    def widened(self, value: Value) -> BaseDistribution | None:
        """The distribution, made just wide enough to hold `value`.

        None where it cannot: 0, which is "off", has no place among factors.
        """
        if self.contains(value):
            return self.distribution
        assert not isinstance(value, str)
        if self.log and value <= 0:
            return None
        low, high = min(self.low, value), max(self.top, value)
        if self.whole:
            return IntDistribution(int(low), int(high), log=self.log)
        return FloatDistribution(low, high, log=self.log)

    def at(self, fraction: float) -> Number:
        """The value at `fraction` (0 to 1) of the way through the range."""
        fraction = min(max(fraction, 0.0), 1.0)
        if self.step is not None and not self.log:
            count = round((self.top - self.low) / self.step) + 1
            value = self.low + min(int(fraction * count), count - 1) * self.step
        elif self.log:
            # A whole number owns the interval of half a unit on either side of it.
            half = 0.5 if self.whole else 0.0
            lowest, highest = math.log(self.low - half), math.log(self.top + half)
            value = math.exp(lowest + fraction * (highest - lowest))
        else:
            value = self.low + fraction * (self.high - self.low)
        value = min(max(value, self.low), self.top)
        return round(value) if self.whole else float(value)

    def fraction(self, value: Value) -> float:
        """How far through the range `value` lies (0 to 1): the inverse of `at`."""
        assert not isinstance(value, str)
        value = min(max(value, self.low), self.top)
        if self.step is not None and not self.log:
            count = round((self.top - self.low) / self.step) + 1
            return (round((value - self.low) / self.step) + 0.5) / count
        if self.log:
            half = 0.5 if self.whole else 0.0
            lowest, highest = math.log(self.low - half), math.log(self.top + half)
            return (math.log(value) - lowest) / (highest - lowest)
        return (value - self.low) / (self.high - self.low)

    def entry(self) -> dict[str, Any]:
        """This range as a space file writes it."""
        entry: dict[str, Any] = {"low": self.low, "high": self.high, "log": self.log}
        return entry if self.step is None or self.log else {**entry, "step": self.step}


@dataclass(frozen=True)
class Choices:
    """One of a list of numbers, or of words."""

    choices: tuple[Value, ...]

    @property
    def distribution(self) -> BaseDistribution:
        """The distribution as Optuna knows it."""
        return CategoricalDistribution(self.choices)

    def suggest(self, name: str, trial: Trial) -> Value:
        """Ask `trial` for a value."""
        value = trial.suggest_categorical(name, self.choices)
        assert isinstance(value, int | float | str)
        return value

    def contains(self, value: Value) -> bool:
        """Whether `value` is one of the choices."""
        return value in self.choices

    def widened(self, value: Value) -> BaseDistribution | None:
        """The distribution, or None: a list of choices cannot grow within a study."""
        return self.distribution if self.contains(value) else None

    def at(self, fraction: float) -> Value:
        """The choice whose share of the unit interval holds `fraction`, in rising order."""
        ordered = self._ordered
        fraction = min(max(fraction, 0.0), 1.0)
        return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]

    def fraction(self, value: Value) -> float:
        """The middle of the share of the choice that is nearest to `value`."""
        ordered = self._ordered

        def distance(index: int) -> float:
            choice = ordered[index]
            if isinstance(choice, str) or isinstance(value, str):
                return float(choice != value)
            return abs(choice - value)

        nearest = min(range(len(ordered)), key=distance)
        return (nearest + 0.5) / len(ordered)

    @property
    def _ordered(self) -> list[Value]:
        """Numbers in rising order; words as they stand."""
        numbers = [choice for choice in self.choices if not isinstance(choice, str)]
        return [*sorted(numbers)] if len(numbers) == len(self.choices) else [*self.choices]

    def entry(self) -> dict[str, Any]:
        """These choices as a space file writes them."""
        return {"choices": list(self.choices)}


@dataclass(frozen=True)
class Fixed:
    """One value, which is not searched."""

    value: Value

    @property
    def distribution(self) -> None:
        """Nothing to draw from."""
        return

    def suggest(self, name: str, trial: Trial) -> Value:
        """Return the value; the trial is not asked."""
        return self.value

    def entry(self) -> Value:
        """This value as a space file writes it."""
        return self.value


@dataclass(frozen=True)
class Conditional:
    """A range or choices that are searched where a condition holds, one value elsewhere.

    Attributes
    ----------
    inner
        What is searched.
    when
        On the hyperparameters that come before this one.
    otherwise
        The value where it does not hold.
    """

    inner: Range | Choices
    when: Condition
    otherwise: Value

    def applies(self, configuration: Mapping[str, Any]) -> bool:
        """Whether this hyperparameter is searched beside those of `configuration`."""
        return self.when.holds(in_full(configuration))

    @property
    def distribution(self) -> BaseDistribution:
        """The distribution where it is searched."""
        return self.inner.distribution

    def suggest(self, name: str, trial: Trial) -> Value:
        """Ask `trial` for a value, where it is searched."""
        return self.inner.suggest(name, trial)

    def widened(self, value: Value) -> BaseDistribution | None:
        """The distribution, wide enough for `value`."""
        return self.inner.widened(value)

    def at(self, fraction: float) -> Value:
        """The value at `fraction` (0 to 1) of the way."""
        return self.inner.at(fraction)

    def fraction(self, value: Value) -> float:
        """How far through `value` lies."""
        return self.inner.fraction(value)

    def entry(self) -> dict[str, Any]:
        """This as a space file writes it."""
        return {**self.inner.entry(), "when": self.when.text, "otherwise": self.otherwise}


Parameter = Range | Choices | Fixed | Conditional
