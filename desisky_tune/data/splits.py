"""Train, validation and test rows, and folds: whole groups, seeded, disjoint.

Exposures of one night share aerosol, cloud and airglow, so a random split leaks: the
default keeps each night whole. Which rows go where depends on the exposures and the
seed alone, never on the order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import EXPOSURE_ID, NIGHT
from desisky_tune.data.names import require_columns
from desisky_tune.errors import DataError, InputError

if TYPE_CHECKING:
    import pandas as pd

#: Splitting by this draws single exposures.
BY_ROW = "row"
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Rows of a table for training, for choosing, and for one final test.

    Attributes
    ----------
    train, validation, test
        Positions of rows, ascending, int64; disjoint, together every row.
    by
        The column whose groups were kept whole, or ``"row"``.
    seed
        Seed of the draw.
    fractions
        The fractions of rows that were asked for, in the order of the parts.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    by: str
    seed: int
    fractions: tuple[float, float, float]

    def as_exposures(self, frame: pd.DataFrame) -> dict[str, Any]:
        """Return the split as JSON-able EXPIDs, which outlive the order of the rows."""
        exposures = frame[EXPOSURE_ID].to_numpy()
        parts = {name: np.sort(exposures[getattr(self, name)]).tolist() for name in PARTS}
        return {"by": self.by, "seed": self.seed, "fractions": list(self.fractions), **parts}

    @classmethod
    def from_exposures(cls, mapping: Mapping[str, Any], frame: pd.DataFrame) -> Split:
        """Find the rows of a recorded split again.

        Parameters
        ----------
        mapping
            What :meth:`as_exposures` returned.
        frame
            The table, in any order of rows.

        Raises
        ------
        DataError
            When the table's exposures are not those of the record.
        """
        missing_keys = [key for key in ("by", "seed", "fractions", *PARTS) if key not in mapping]
        if missing_keys:
            raise DataError(f"recorded split: missing {', '.join(missing_keys)}")
        position = {int(e): i for i, e in enumerate(frame[EXPOSURE_ID].to_numpy())}
        recorded = [int(e) for name in PARTS for e in mapping[name]]
        absent = [e for e in recorded if e not in position]
        if absent:
            raise DataError(
                f"recorded split: {len(absent)} of its exposures are not in the table, "
                f"EXPID {absent[0]} first: the data has changed"
            )
        if len(set(recorded)) != len(recorded):
            raise DataError("recorded split: an exposure stands in two of its parts")
        if len(recorded) != len(position):
            raise DataError(
                f"recorded split: it holds {len(recorded)} exposures and the table "
                f"{len(position)}: the data has changed"
            )
        rows = {
            name: np.sort(np.array([position[int(e)] for e in mapping[name]], dtype=np.int64))
            for name in PARTS
        }
        train, validation, test = (float(f) for f in mapping["fractions"])
        return cls(
            **rows,
            by=str(mapping["by"]),
            seed=int(mapping["seed"]),
            fractions=(train, validation, test),
        )


def make_split(
    frame: pd.DataFrame,
    by: str = NIGHT,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
) -> Split:
    """Split a table into train, validation and test rows.

    Parameters
    ----------
    frame
        Exposures, with EXPID and the column `by`.
    by
        A column whose groups are kept whole (default NIGHT), or ``"row"`` for single
        exposures.
    fractions
        Of the rows, for train, validation and test; positive, sum 1. Whole groups
        approach them; every part gets at least one.
    seed
        Seed of the draw, a non-negative integer.

    Raises
    ------
    InputError
        When the fractions or the seed are not as described.
    DataError
        When the column is missing or empty in places, or has fewer than three groups.
    """
    shares = _checked_fractions(fractions)
    _check_seed(seed)
    rows = np.arange(len(frame), dtype=np.int64)
    codes, groups = _groups(frame, rows, by)
    if groups < len(PARTS):
        raise DataError(
            f"a split by {by} needs at least {len(PARTS)} {_plural(by)} "
            f"for train, validation and test; the table has {groups} in {len(frame)} rows"
        )
    sizes = np.bincount(codes, minlength=groups)
    part_of_group = _fill_parts(sizes, np.array(shares) * len(frame), _shuffled(groups, seed))
    part = part_of_group[codes]
    train, validation, test = (rows[part == index] for index in range(len(PARTS)))
    return Split(train, validation, test, by=by, seed=int(seed), fractions=shares)


def make_folds(
    frame: pd.DataFrame,
    rows: np.ndarray | Sequence[int],
    by: str = NIGHT,
    folds: int = 5,
    seed: int = 0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide rows into folds of whole groups, each validated once.

    Parameters
    ----------
    frame
        The table that `rows` are positions in.
    rows
        The rows to divide (never the test rows).
    by
        A column whose groups stay whole, or ``"row"``.
    folds
        Number of folds, at least 2.
    seed
        Seed of the draw.

    Returns
    -------
    list of (train_rows, validation_rows)
        Positions in `frame`, ascending. Every row is validated in exactly one fold.

    Raises
    ------
    InputError
        When `folds` or `seed` is out of range.
    DataError
        When there are fewer groups than folds.
    """
    if isinstance(folds, bool) or not isinstance(folds, int | np.integer) or folds < 2:
        raise InputError(f"folds = {folds!r}: an integer of at least 2")
    _check_seed(seed)
    rows = np.sort(np.asarray(rows, dtype=np.int64))
    codes, groups = _groups(frame, rows, by)
    if groups < folds:
        raise DataError(
            f"{folds} folds by {by} need at least {folds} {_plural(by)}; "
            f"the {len(rows)} rows have {groups}"
        )
    sizes = np.bincount(codes, minlength=groups)
    targets = np.full(folds, len(rows) / folds)
    fold = _fill_parts(sizes, targets, _shuffled(groups, seed))[codes]
    return [(rows[fold != index], rows[fold == index]) for index in range(folds)]


def _fill_parts(sizes: np.ndarray, targets: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Give each group, in the drawn order, to the part that lacks most rows.

    When as many groups are left as parts are empty, the empty ones come first: none
    may stay without a group.
    """
    lacking = targets.astype(float).copy()
    empty = np.ones(len(targets), dtype=bool)
    part_of_group = np.empty(len(sizes), dtype=np.int64)
    for done, group in enumerate(order):
        must_be_empty = len(order) - done <= np.count_nonzero(empty)
        candidates = np.where(empty, lacking, -np.inf) if must_be_empty else lacking
        part = int(np.argmax(candidates))
        part_of_group[group] = part
        lacking[part] -= sizes[group]
        empty[part] = False
    return part_of_group


def _groups(frame: pd.DataFrame, rows: np.ndarray, by: str) -> tuple[np.ndarray, int]:
    """Return the group of each row, numbered in the order of the groups' values."""
    column = EXPOSURE_ID if by == BY_ROW else by
    require_columns([column], frame.columns, where=f"a split by {by}")
    chosen = frame[column].iloc[rows]
    empty = np.flatnonzero(chosen.isna().to_numpy())
    if len(empty):
        raise DataError(
            f"a split by {by}: {len(empty)} rows have no {column}, row {rows[empty[0]]} first"
        )
    values = chosen.to_numpy()
    if values.dtype == object:
        values = values.astype(str)
    unique, codes = np.unique(values, return_inverse=True)
    if by == BY_ROW and len(unique) != len(values):
        raise DataError(f"a split by row: {len(values) - len(unique)} rows repeat an {column}")
    return codes.reshape(-1), len(unique)


def _shuffled(groups: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(groups)


def _checked_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    shares = tuple(float(share) for share in fractions)
    if (
        len(shares) != len(PARTS)
        or not all(math.isfinite(share) and share > 0 for share in shares)
        or abs(sum(shares) - 1) > 1e-6
    ):
        raise InputError(
            f"fractions = {list(fractions)}: three positive numbers with sum 1 "
            "(train, validation, test)"
        )
    return shares[0], shares[1], shares[2]


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed = {seed!r}: a non-negative integer")


def _plural(by: str) -> str:
    return {NIGHT: "nights", BY_ROW: "rows"}.get(by, f"values of {by}")
