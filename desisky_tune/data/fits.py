"""FITS files read by ranges of rows: the layout of the sky-spectra VAC.

Nothing here holds more of FLUX than the rows asked for, so that the memory of a reader
does not grow with the file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from desisky_tune.data.names import nearest_name, require_columns
from desisky_tune.errors import DataError, MissingFileError

#: Suffixes by which a file is taken for FITS.
FITS_SUFFIXES = (".fits", ".fit", ".fits.gz")

_SPECTRA_HDUS = ("WAVELENGTH", "FLUX", "METADATA")


def check_readable(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file that can be opened and is not empty.

    Raises
    ------
    MissingFileError
        When it does not exist, is a folder, or may not be read.
    DataError
        When it is empty.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise MissingFileError(f"{file}: no such file")
    if file.is_dir():
        raise MissingFileError(f"{file}: is a folder, not a file")
    try:
        with open(file, "rb") as stream:
            first = stream.read(1)
    except OSError as error:
        raise MissingFileError(f"{file}: cannot be read ({error.strerror})") from error
    if not first:
        raise DataError(f"{file}: the file is empty")
    return file


@contextmanager
def open_fits(path: Path, *, memmap: bool = False) -> Iterator[Any]:
    """Yield astropy's HDUList of a whole file; a truncated or foreign one is refused.

    Raises
    ------
    MissingFileError
        When the file cannot be opened.
    DataError
        When it is no FITS file, or shorter than its headers say.
    """
    from astropy.io import fits

    check_readable(path)
    try:
        with warnings.catch_warnings():
            # astropy warns of a truncated file and reads on; the check below refuses it.
            warnings.simplefilter("ignore")
            hdus = fits.open(path, memmap=memmap, lazy_load_hdus=False)
    except (OSError, ValueError, TypeError, IndexError, KeyError) as error:
        raise DataError(
            f"{path}: not a FITS file, or a damaged one ({_one_line(error)})"
        ) from error
    with hdus:
        if path.suffix != ".gz":
            _refuse_truncated(path, hdus)
        yield hdus


def _refuse_truncated(path: Path, hdus: Any) -> None:
    actual = path.stat().st_size
    info = [hdu.fileinfo() for hdu in hdus]
    needed = max((i["datLoc"] + i["datSpan"] for i in info if i is not None), default=0)
    # A file cut inside a header, or between two HDUs, ends at no multiple of 2880 or has
    # fewer HDUs; the latter shows as a missing HDU.
    if actual < needed or actual % 2880:
        raise DataError(
            f"{path}: truncated FITS: {actual} bytes are there, "
            f"its headers promise {max(needed, -(-actual // 2880) * 2880)}"
        )


def has_spectra_layout(path: Path) -> bool:
    """Return whether a FITS file has any of the VAC's named extensions."""
    with open_fits(path) as hdus:
        return any(hdu.name in _SPECTRA_HDUS for hdu in hdus[1:])


@dataclass(frozen=True)
class SpectraFile:
    """A file laid out like the VAC: WAVELENGTH, FLUX and METADATA.

    Attributes
    ----------
    path
        The file.
    wavelength
        Grid of the spectra in Angstrom, (n_w,) f8.
    rows
        Number of exposures.
    columns
        Scalar columns of METADATA.
    """

    path: Path
    wavelength: np.ndarray
    rows: int
    columns: tuple[str, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SpectraFile:
        """Read the layout and check that the parts fit together.

        Raises
        ------
        MissingFileError
            When the file cannot be opened.
        DataError
            When it is truncated, lacks an HDU, or its parts have different lengths.
        """
        file = Path(path).expanduser()
        with open_fits(file) as hdus:
            names = [hdu.name for hdu in hdus]
            for needed in _SPECTRA_HDUS:
                if needed not in names:
                    near = nearest_name(needed, [name for name in names if name])
                    hint = f" (nearest name there: {near})" if near else ""
                    raise DataError(f"{file}: missing HDU {needed}{hint}; it has {names}")
            if not hasattr(hdus["METADATA"], "columns"):
                raise DataError(f"{file}: HDU METADATA is no table")
            flux = hdus["FLUX"]
            if flux.is_image is False or len(flux.shape) != 2:
                raise DataError(f"{file}: HDU FLUX is no image of two axes")
            wavelength = hdus["WAVELENGTH"].data
            if wavelength is None or wavelength.ndim != 1:
                raise DataError(f"{file}: HDU WAVELENGTH is no image of one axis")
            wavelength = np.asarray(wavelength, dtype=np.float64)
            rows, width = flux.shape
            table_rows = int(hdus["METADATA"].header["NAXIS2"])
            if rows != table_rows:
                raise DataError(
                    f"{file}: FLUX has {rows} rows and METADATA {table_rows}: they must agree"
                )
            if width != len(wavelength):
                raise DataError(
                    f"{file}: FLUX has {width} pixels a row and WAVELENGTH {len(wavelength)}: "
                    "they must agree"
                )
            if rows == 0:
                raise DataError(f"{file}: FLUX has no rows")
            columns = _scalar_columns(hdus["METADATA"])
        return cls(path=file, wavelength=wavelength, rows=rows, columns=columns)

    def metadata(self, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Return the scalar columns of METADATA over a range of rows, native byte order."""
        # Mapped, so that a range of rows touches its own pages and no others.
        with open_fits(self.path, memmap=True) as hdus:
            return _native_columns(hdus["METADATA"].data[rows], self.columns)

    def structured_metadata(self) -> np.ndarray:
        """Return METADATA as it stands, as a structured array in native byte order."""
        with open_fits(self.path) as hdus:
            return structured_rows(hdus["METADATA"].data)

    def flux(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the spectra of some rows, (k, n_w) f4, reading no others.

        Parameters
        ----------
        rows
            Positions, ascending.
        """
        rows = np.asarray(rows, dtype=np.int64)
        flux = np.empty((len(rows), len(self.wavelength)), dtype=np.float32)
        with open_fits(self.path) as hdus:
            section = hdus["FLUX"].section
            for start, stop, into in _runs(rows):
                flux[into : into + stop - start] = section[start:stop]
        return flux

    def require(self, needed: Sequence[str]) -> None:
        """Raise a DataError when METADATA lacks a column, with the nearest name."""
        require_columns(needed, self.columns, where=f"{self.path}: METADATA")


#: Rows of FLUX read at a time: 8 MB of the VAC's.
_ROWS_PER_READ = 256


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, place in the result) of the contiguous runs in `rows`."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    begins = np.concatenate([[0], breaks])[: len(rows)]
    ends = np.concatenate([breaks, [len(rows)]])[: len(rows)]
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        for piece in range(begin, end, _ROWS_PER_READ):
            last = min(piece + _ROWS_PER_READ, end)
            yield int(rows[piece]), int(rows[last - 1]) + 1, piece


def read_fits_table(path: Path) -> dict[str, np.ndarray]:
    """Return the scalar columns of a file's first table extension, native byte order.

    Raises
    ------
    MissingFileError
        When the file cannot be opened.
    DataError
        When it is truncated or holds no table.
    """
    with open_fits(path) as hdus:
        tables = [hdu for hdu in hdus if hasattr(hdu, "columns")]
        if not tables:
            raise DataError(f"{path}: holds no table; its HDUs are {[h.name for h in hdus]}")
        return _native_columns(tables[0].data, _scalar_columns(tables[0]))


def _scalar_columns(table: Any) -> tuple[str, ...]:
    """Return the names of the columns with one value a row: others fit no data frame."""
    names = table.columns.names
    return tuple(n for n in names if table.columns[n].dtype.shape in ((), (1,)))


def _native_columns(table: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    columns = {}
    for name in names:
        values = np.asarray(table[name])
        columns[name] = values.astype(values.dtype.newbyteorder("=")).reshape(len(values))
    return columns


def structured_rows(table: Any) -> np.ndarray:
    """Return a FITS record array as a structured array in native byte order."""
    columns = {name: np.asarray(table[name]) for name in table.dtype.names}
    dtype = [(n, v.dtype.newbyteorder("="), v.shape[1:]) for n, v in columns.items()]
    rows = np.empty(len(table), dtype=dtype)
    for name, values in columns.items():
        rows[name] = values
    return rows


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
