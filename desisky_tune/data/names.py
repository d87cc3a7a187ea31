"""Column names: what is there, what is missing, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from desisky_tune.data.columns import EXPOSURE_ID, FEATURES, NIGHT, TARGETS
from desisky_tune.data.geometry import GEOMETRY_COLUMNS
from desisky_tune.errors import DataError

#: What the geometry is computed from. MJD is the start of the exposure, EXPTIME in s.
POINTING: tuple[str, ...] = ("MJD", "EXPTIME", "TILERA", "TILEDEC")

#: Written beside a V that was derived from g and r, because a CSV keeps no other note.
V_DERIVED_COLUMN = "V_DERIVED"

#: Further columns of the sky-spectra VAC, and those that are added to it.
_OTHER_COLUMNS = (
    EXPOSURE_ID,
    NIGHT,
    "TILEID",
    "AIRMASS",
    "EBV",
    "SEEING_ETC",
    "SEEING_GFA",
    "SOLFLUX",
    "GALLON",
    "GALLAT",
    "ECLLON",
    "ECLLAT",
    V_DERIVED_COLUMN,
)

#: Every column that has a meaning here.
KNOWN_COLUMNS: tuple[str, ...] = tuple(
    dict.fromkeys((*FEATURES, *TARGETS, *GEOMETRY_COLUMNS, *POINTING, *_OTHER_COLUMNS))
)


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `name` was probably meant to be, if any is near."""
    by_folded = {str(known).casefold(): str(known) for known in names}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[near[0]] if near else None


def describe_missing(missing: Iterable[str], present: Iterable[str]) -> str:
    """Return the missing names as text, each with the nearest name that is there."""
    present = [str(name) for name in present]
    foreign = [name for name in present if name not in KNOWN_COLUMNS]
    words = []
    for name in missing:
        # A column of ours that is there was not meant to be another of ours.
        near = nearest_name(name, foreign if name in KNOWN_COLUMNS else present)
        words.append(f"{name} (nearest name there: {near})" if near else name)
    return ", ".join(words)


def require_columns(needed: Iterable[str], present: Iterable[str], *, where: str) -> None:
    """Raise when a column is missing.

    Parameters
    ----------
    needed, present
        Names of columns.
    where
        The file or table, as the message shall call it.

    Raises
    ------
    DataError
        Naming every missing column, and the nearest name that is there.
    """
    present = [str(name) for name in present]
    missing = [name for name in dict.fromkeys(needed) if name not in present]
    if missing:
        noun = "column" if len(missing) == 1 else "columns"
        raise DataError(f"{where}: missing {noun} {describe_missing(missing, present)}")
