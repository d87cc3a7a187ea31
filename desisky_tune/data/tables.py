"""Tables on disk, whatever their format: read as they stand, written whole or not at all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from desisky_tune.data.columns import TARGETS
from desisky_tune.data.fits import FITS_SUFFIXES, check_readable, read_fits_table
from desisky_tune.data.names import V_DERIVED_COLUMN
from desisky_tune.data.parquet import read_parquet
from desisky_tune.errors import DataError
from desisky_tune.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

_CSV_SUFFIXES = (".csv", ".csv.gz")
_ECSV_SUFFIXES = (".ecsv",)
_PARQUET_SUFFIXES = (".parquet", ".pq")
_WRITABLE = (".csv", ".ecsv", ".fits", ".fit", ".parquet", ".pq")


def is_fits(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's name says FITS."""
    return str(path).lower().endswith(FITS_SUFFIXES)


def read_raw_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a CSV, ECSV, FITS or Parquet table, columns named as they stand.

    Raises
    ------
    MissingFileError
        When the file does not exist or may not be read.
    DataError
        When the suffix is unknown, or the content is empty, truncated or malformed.
    """
    file = check_readable(path)
    name = file.name.lower()
    if name.endswith(_CSV_SUFFIXES):
        frame = _read_csv(file)
    elif name.endswith(_ECSV_SUFFIXES):
        frame = _read_ecsv(file)
    elif name.endswith(_PARQUET_SUFFIXES):
        frame = _read_parquet(file)
    elif is_fits(file):
        import pandas as pd

        frame = pd.DataFrame(read_fits_table(file))
    else:
        raise DataError(
            f"{file}: unknown kind of table; one of .csv, .ecsv, .fits, .fit, .parquet, .pq"
        )
    if frame.empty:
        raise DataError(f"{file}: the table has no rows")
    return frame


def write_table(frame: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write a table as CSV, ECSV, FITS or Parquet, chosen by the suffix.

    A V that was derived from g and r (``frame.attrs["v_derived"]``) is marked by a
    column ``V_DERIVED`` of ones, which :func:`read_table` understands.

    Parameters
    ----------
    frame
        The rows; the index is not written.
    path
        Where to; an existing file is replaced only when the new one is complete.

    Raises
    ------
    DataError
        When the suffix is unknown.
    StorageError
        When the file cannot be written.
    """
    target = Path(path).expanduser()
    suffix = target.suffix.lower()
    if suffix not in _WRITABLE:
        raise DataError(f"{target}: unknown kind of table; one of {', '.join(_WRITABLE)}")
    derived = frame.attrs.get("v_derived") and TARGETS[0] in frame
    if derived and V_DERIVED_COLUMN not in frame:
        frame = frame.assign(**{V_DERIVED_COLUMN: 1})
    # Attributes are notes of ours in memory; no format needs them.
    frame = frame.copy(deep=False)
    frame.attrs = {}
    with atomic_path(target) as temporary:
        if suffix == ".csv":
            frame.to_csv(temporary, index=False)
        elif suffix in _PARQUET_SUFFIXES:
            frame.to_parquet(temporary, index=False)
        else:
            from astropy.table import Table

            table = Table.from_pandas(frame)
            kind = "ascii.ecsv" if suffix == ".ecsv" else "fits"
            table.write(temporary, format=kind, overwrite=True)
    return target


def _read_csv(file: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_csv(file, skipinitialspace=True)
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{file}: the file is empty") from error
    except (pd.errors.ParserError, UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"{file}: not a CSV table ({_one_line(error)})") from error


def _read_ecsv(file: Path) -> pd.DataFrame:
    from astropy.table import Table

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Table.read(file, format="ascii.ecsv").to_pandas()
    except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
        raise DataError(f"{file}: not an ECSV table ({_one_line(error)})") from error


def _read_parquet(file: Path) -> pd.DataFrame:
    import pyarrow as pa

    try:
        return read_parquet(file).to_pandas()
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: not a Parquet table, or truncated ({_one_line(error)})"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
