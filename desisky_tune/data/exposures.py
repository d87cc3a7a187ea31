"""Tables of exposures: one name per column, and what is missing computed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import EXPOSURE_ID, FEATURES, NIGHT, TARGETS
from desisky_tune.data.geometry import GEOMETRY_COLUMNS, eclipse_fraction, observing_geometry
from desisky_tune.data.names import (
    KNOWN_COLUMNS,
    POINTING,
    V_DERIVED_COLUMN,
    describe_missing,
    require_columns,
)
from desisky_tune.data.tables import read_raw_table, write_table
from desisky_tune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["night_of", "read_table", "write_table"]

#: Short names under which the magnitudes may stand, upper and lower case as written.
SHORT_NAMES = dict(zip(("V", "g", "r", "z"), TARGETS, strict=True))

#: Where ECLIPSE_FRAC may come from.
ECLIPSE_CHOICES: tuple[str, ...] = ("exact", "none", "table")

_V, _G, _R, _Z = TARGETS


def read_table(path: str | os.PathLike[str], *, require_magnitudes: bool = True) -> pd.DataFrame:
    """Read a table of exposures and complete it.

    Columns may stand in any order and in any case; V, g, r and z are accepted for
    the magnitudes; columns of the user's stay as they are. What is missing is
    computed where it can be: Moon, Sun and pointing from MJD (start of the exposure,
    UTC), EXPTIME, TILERA and TILEDEC; NIGHT from MJD; ECLIPSE_FRAC from MJD; V from g
    and r, which is then marked by ``frame.attrs["v_derived"] = True``. A column that
    is there is never replaced.

    Parameters
    ----------
    path
        CSV, ECSV, FITS table or Parquet, by suffix.
    require_magnitudes
        ``False`` for a table of conditions to predict for: EXPID, NIGHT and magnitudes
        may then be missing.

    Returns
    -------
    DataFrame
        All rows, in the order of the file.

    Raises
    ------
    MissingFileError
        When there is no such file, or it may not be read.
    DataError
        When it cannot be parsed, lacks a column (named, with the nearest name), has
        a value that is no number, or an EXPID twice.
    """
    return complete_table(
        read_raw_table(path), where=str(path), require_magnitudes=require_magnitudes
    )


def complete_table(
    frame: pd.DataFrame, *, where: str, require_magnitudes: bool = True, eclipse: bool = True
) -> pd.DataFrame:
    """Do to a frame what :func:`read_table` does to a file's.

    Parameters
    ----------
    frame
        The table as it stands.
    where
        What errors shall call it.
    require_magnitudes
        As in :func:`read_table`.
    eclipse
        Compute a missing ECLIPSE_FRAC, or leave that to the caller.
    """
    frame = normalise_names(frame, where=where)
    for column in frame.columns:
        if column in KNOWN_COLUMNS:
            frame[column] = _numbers(frame[column], where=where)
    if EXPOSURE_ID in frame:
        frame[EXPOSURE_ID] = _integers(frame[EXPOSURE_ID], where=where)
        _refuse_repeated(frame[EXPOSURE_ID], where=where)
    elif require_magnitudes:
        require_columns([EXPOSURE_ID], frame.columns, where=where)
    frame = _add_night(frame, where=where, needed=require_magnitudes)
    frame = _add_geometry(frame, where=where)
    if eclipse and "ECLIPSE_FRAC" not in frame:
        if "MJD" not in frame:
            raise DataError(
                f"{where}: missing column {describe_missing(['ECLIPSE_FRAC'], frame.columns)}, "
                "and no MJD to compute it from"
            )
        frame = frame.assign(ECLIPSE_FRAC=eclipse_column(frame))
    require_columns([f for f in FEATURES if f != "ECLIPSE_FRAC"], frame.columns, where=where)
    return _add_v(frame, where=where, needed=require_magnitudes)


def normalise_names(frame: pd.DataFrame, *, where: str) -> pd.DataFrame:
    """Rename known columns to their own spelling; refuse a name that stands twice."""
    by_folded = {name.casefold(): name for name in KNOWN_COLUMNS}
    renamed = [
        SHORT_NAMES.get(str(name), by_folded.get(str(name).casefold(), str(name)))
        for name in frame.columns
    ]
    twice = [name for name, count in Counter(renamed).items() if count > 1]
    if twice:
        given = [str(old) for old, new in zip(frame.columns, renamed, strict=True) if new in twice]
        raise DataError(f"{where}: {twice[0]} stands there twice, as {' and '.join(given)}")
    frame = frame.copy()
    frame.columns = renamed
    return frame


def night_of(mjd: np.ndarray) -> np.ndarray:
    """Return DESI's night, YYYYMMDD: the date at Kitt Peak on the noon before.

    Parameters
    ----------
    mjd
        Times, UTC, (n,).

    Returns
    -------
    (n,) int64
    """
    # Local noon is 19 h UTC (Arizona keeps UTC-7 all year).
    days = np.floor(np.asarray(mjd, dtype=np.float64) - 19 / 24).astype(np.int64)
    dates = np.datetime64("1858-11-17", "D") + days.astype("timedelta64[D]")
    months = dates.astype("datetime64[M]")
    year = dates.astype("datetime64[Y]").astype(np.int64) + 1970
    month = months.astype(np.int64) % 12 + 1
    day = (dates - months).astype(np.int64) + 1
    return year * 10000 + month * 100 + day


def mid_exposure(columns: Any) -> np.ndarray:
    """Return the middle of each exposure as MJD (UTC), (n,) f8, from MJD and EXPTIME.

    MJD is the start: with it so, astropy's positions agree with the geometry columns
    of the shipped exposures to 1e-5 deg, and by degrees otherwise. Without EXPTIME
    the start itself is returned.
    """
    start = np.asarray(columns["MJD"], dtype=np.float64)
    if "EXPTIME" not in columns:
        return start
    seconds = np.nan_to_num(np.asarray(columns["EXPTIME"], dtype=np.float64))
    return start + seconds / 2 / 86400


def eclipse_column(columns: Any) -> np.ndarray:
    """Return ECLIPSE_FRAC at mid-exposure, (n,) f8; NaN where MJD is missing."""
    return eclipse_fraction(mid_exposure(columns))


def set_eclipse(columns: Any, eclipse: str, *, rows: int, where: str = "the table") -> str:
    """Set ECLIPSE_FRAC in place, and return which way it was done.

    Parameters
    ----------
    columns
        DataFrame, or arrays by column name.
    eclipse
        ``"exact"``: computed at mid-exposure; a table without MJD keeps its own
        column. ``"none"``: 0 everywhere. ``"table"``: the table's own column.
    rows
        Number of rows.
    where
        What errors shall call the table.

    Returns
    -------
    "exact", "none" or "table"

    Raises
    ------
    DataError
        When the choice is unknown, or neither MJD nor ECLIPSE_FRAC is there.
    """
    if eclipse not in ECLIPSE_CHOICES:
        raise DataError(f"eclipse = {eclipse!r}: one of {', '.join(ECLIPSE_CHOICES)}")
    if eclipse == "none":
        columns["ECLIPSE_FRAC"] = np.zeros(rows)
        return "none"
    if eclipse == "exact" and "MJD" in columns:
        columns["ECLIPSE_FRAC"] = eclipse_column(columns)
        return "exact"
    needed = "ECLIPSE_FRAC" if eclipse == "table" else "MJD"
    if "ECLIPSE_FRAC" not in columns:
        raise DataError(f"{where}: missing column {describe_missing([needed], columns)}")
    return "table"


def geometry_columns(columns: Any) -> dict[str, np.ndarray]:
    """Return the Moon, Sun and pointing columns, (n,) f8, from those of :data:`POINTING`."""
    return observing_geometry(mid_exposure(columns), columns["TILERA"], columns["TILEDEC"])


def _add_geometry(frame: pd.DataFrame, *, where: str) -> pd.DataFrame:
    absent = [name for name in GEOMETRY_COLUMNS if name not in frame]
    if not absent:
        return frame
    lacking = [name for name in POINTING if name not in frame]
    if lacking:
        demanded = [name for name in absent if name in FEATURES]
        if demanded:
            raise DataError(
                f"{where}: missing {_noun(demanded)} "
                f"{describe_missing(demanded, frame.columns)}, and to compute that "
                f"{describe_missing(lacking, frame.columns)}"
            )
        return frame
    computed = geometry_columns(frame)
    return frame.assign(**{name: computed[name] for name in absent})


def _add_night(frame: pd.DataFrame, *, where: str, needed: bool) -> pd.DataFrame:
    if NIGHT in frame:
        frame[NIGHT] = _integers(frame[NIGHT], where=where)
        return frame
    if "MJD" in frame:
        _refuse_missing(frame["MJD"], where=where, why=f"{NIGHT} cannot be derived")
        return frame.assign(**{NIGHT: night_of(frame["MJD"].to_numpy())})
    if needed:
        raise DataError(
            f"{where}: missing column {describe_missing([NIGHT], frame.columns)}, "
            "and no MJD to derive it from"
        )
    return frame


def _add_v(frame: pd.DataFrame, *, where: str, needed: bool) -> pd.DataFrame:
    missing = [name for name in (_G, _R, _Z) if name not in frame]
    if needed and missing:
        raise DataError(
            f"{where}: missing {_noun(missing)} {describe_missing(missing, frame.columns)}"
        )
    derived = V_DERIVED_COLUMN in frame and bool((frame[V_DERIVED_COLUMN] > 0).any())
    if _V not in frame and _G in frame and _R in frame:
        from desisky_tune.data.photometry import derived_v

        frame = frame.assign(**{_V: derived_v(frame[_G].to_numpy(), frame[_R].to_numpy())})
        derived = True
    frame.attrs["v_derived"] = derived
    return frame


def _numbers(column: pd.Series, *, where: str) -> pd.Series:
    """Return a column as numbers; a text that is none is refused with its row."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_extension_array_dtype(
        column.dtype
    ):
        return column
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = np.flatnonzero(numbers.isna().to_numpy() & column.notna().to_numpy())
    if len(wrong):
        raise DataError(
            f"{where}: column {column.name}, row {wrong[0] + 1}: "
            f"{column.iloc[wrong[0]]!r} is no number"
        )
    return numbers.astype("float64")


def _integers(column: pd.Series, *, where: str) -> pd.Series:
    _refuse_missing(column, where=where, why="an integer is needed")
    values = column.to_numpy()
    wrong = np.flatnonzero(values != np.floor(values))
    if len(wrong):
        raise DataError(
            f"{where}: column {column.name}, row {wrong[0] + 1}: {values[wrong[0]]!r} is no integer"
        )
    return column.astype(np.int64)


def _refuse_missing(column: pd.Series, *, where: str, why: str) -> None:
    values = column.to_numpy(dtype=np.float64)
    missing = np.flatnonzero(~np.isfinite(values))
    if len(missing):
        raise DataError(f"{where}: column {column.name} has no value in {_rows(missing)}: {why}")


def _refuse_repeated(column: pd.Series, *, where: str) -> None:
    repeated = np.flatnonzero(column.duplicated(keep=False).to_numpy())
    if len(repeated):
        first = int(column.iloc[repeated[0]])
        rows = np.flatnonzero(column.to_numpy() == first)
        others = column.iloc[repeated].nunique() - 1
        more = f", and {others} more" if others else ""
        raise DataError(f"{where}: {column.name} {first} stands in {_rows(rows)}{more}: once only")


def _rows(positions: Sequence[int] | np.ndarray) -> str:
    """Name rows as a person counts them: the first row of data is row 1."""
    shown = ", ".join(str(int(p) + 1) for p in positions[:5])
    noun = "row" if len(positions) == 1 else "rows"
    return f"{noun} {shown}" + (", ..." if len(positions) > 5 else "")


def _noun(names: Iterable[str]) -> str:
    return "column" if len(list(names)) == 1 else "columns"
