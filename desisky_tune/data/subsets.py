"""The cuts that select moonlit, dark and twilight exposures, and who removed what."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import NIGHT
from desisky_tune.data.names import require_columns
from desisky_tune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

#: First and last of the nights with smoke over Kitt Peak (June 2021), both inclusive.
KNOWN_BAD_NIGHTS: tuple[int, int] = (20210604, 20210612)

_RELATIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """One comparison of a column with a number; a NaN never satisfies it."""

    column: str
    relation: str
    limit: float

    def __str__(self) -> str:
        return f"{self.column} {self.relation} {self.limit:g}"

    def holds(self, columns: Mapping[str, Any]) -> np.ndarray:
        """Return where the condition is satisfied, as booleans (n,)."""
        return np.asarray(_RELATIONS[self.relation](np.asarray(columns[self.column]), self.limit))


@dataclass(frozen=True)
class OutsideNights:
    """The night is none of the known bad ones."""

    first: int
    last: int
    column: str = NIGHT

    def __str__(self) -> str:
        return f"{self.column} outside {self.first}-{self.last}"

    def holds(self, columns: Mapping[str, Any]) -> np.ndarray:
        """Return where the condition is satisfied, as booleans (n,)."""
        night = np.asarray(columns[self.column])
        return (night < self.first) | (night > self.last)


_USABLE_TRANSPARENCY = Condition("TRANSPARENCY_GFA", ">", 0)

#: The conditions of each subset, in the order in which they are applied. ``all`` keeps
#: every exposure whose transparency can serve as a feature.
SUBSETS: Mapping[str, tuple[Condition, ...]] = {
    "moon": (
        Condition("SUNALT", "<", -20),
        Condition("MOONALT", ">", 5),
        Condition("MOONFRAC", ">", 0.5),
        Condition("MOONSEP", "<=", 90),
        _USABLE_TRANSPARENCY,
    ),
    "dark": (
        Condition("SUNALT", "<", -20),
        Condition("MOONALT", "<", -5),
        _USABLE_TRANSPARENCY,
    ),
    "twilight": (
        Condition("SUNALT", ">", -20),
        Condition("MOONALT", "<=", -5),
        Condition("SUNSEP", "<=", 110),
        _USABLE_TRANSPARENCY,
    ),
    "all": (_USABLE_TRANSPARENCY,),
}

Conditions = tuple[Condition | OutsideNights, ...]


def subset_conditions(subset: str, *, exclude_known_bad: bool = False) -> Conditions:
    """Return the conditions of a subset, the known bad nights first if they are to go.

    Raises
    ------
    DataError
        When `subset` is none of :data:`SUBSETS`.
    """
    if subset not in SUBSETS:
        raise DataError(f"subset {subset!r} is unknown: one of {', '.join(SUBSETS)}")
    nights = (OutsideNights(*KNOWN_BAD_NIGHTS),) if exclude_known_bad else ()
    return (*nights, *SUBSETS[subset])


def first_failure(columns: Mapping[str, Any], conditions: Conditions, rows: int) -> np.ndarray:
    """Return for each row the place of the first condition that it fails, -1 for none.

    Parameters
    ----------
    columns
        Arrays (n,) by column name; a DataFrame will do.
    conditions
        Applied in turn: a row is charged to the first that removes it.
    rows
        The number n of rows.
    """
    failed = np.full(rows, -1, dtype=np.int8)
    for place, condition in enumerate(conditions):
        failed[(failed < 0) & ~condition.holds(columns)] = place
    return failed


def count_removed(failed: np.ndarray, conditions: Conditions) -> dict[str, int]:
    """Return how many rows each condition removed, in the order of the conditions."""
    return {
        str(condition): int(np.count_nonzero(failed == place))
        for place, condition in enumerate(conditions)
    }


def cut(
    frame: pd.DataFrame, subset: str, *, exclude_known_bad: bool = False
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Keep the rows of one subset.

    Parameters
    ----------
    frame
        Exposures with the columns that the conditions compare.
    subset
        One of :data:`SUBSETS`.
    exclude_known_bad
        Also drop the nights of :data:`KNOWN_BAD_NIGHTS`.

    Returns
    -------
    frame, removed
        The rows that pass, with a fresh index, and by condition the number of rows
        that it was the first to remove.

    Raises
    ------
    DataError
        When the subset is unknown or a column is missing (named, with the nearest name).
    """
    conditions = subset_conditions(subset, exclude_known_bad=exclude_known_bad)
    require_columns(
        [c.column for c in conditions], frame.columns, where=f"the cut {subset!r} of a table"
    )
    failed = first_failure(frame, conditions, len(frame))
    return frame[failed < 0].reset_index(drop=True), count_removed(failed, conditions)


def refuse_empty(kept: int, rows: int, removed: Mapping[str, int], where: str) -> None:
    """Raise when no row is left, and say how many each condition removed.

    Raises
    ------
    DataError
        When `kept` is 0.
    """
    if kept == 0:
        counts = "; ".join(f"{name} removed {count}" for name, count in removed.items())
        raise DataError(f"{where}: none of {rows} rows is left: {counts or 'nothing was removed'}")


def condition_columns(conditions: Sequence[Condition | OutsideNights]) -> tuple[str, ...]:
    """Return the columns that the conditions compare, each once."""
    return tuple(dict.fromkeys(condition.column for condition in conditions))
