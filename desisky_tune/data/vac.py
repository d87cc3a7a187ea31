"""The DESI DR1 sky-spectra VAC: where it lies, how it comes, what it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import TARGETS
from desisky_tune.data.download import fetch, progress_bar
from desisky_tune.data.exposures import eclipse_column
from desisky_tune.data.fits import SpectraFile
from desisky_tune.data.names import POINTING
from desisky_tune.data.subsets import (
    KNOWN_BAD_NIGHTS,
    Conditions,
    OutsideNights,
    condition_columns,
    count_removed,
    first_failure,
    refuse_empty,
    subset_conditions,
)
from desisky_tune.errors import InputError, MissingFileError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Release:
    """One published version of the VAC."""

    url: str
    folder: str
    filename: str
    sha256: str


#: The versions that are known.
RELEASES: Mapping[str, Release] = {
    "v1.0": Release(
        url=("https://data.desi.lbl.gov/public/dr1/vac/dr1/skyspec/v1.0/sky_spectra_vac_v1.fits"),
        folder="dr1",
        filename="sky_spectra_vac_v1.fits",
        sha256="e943bcf046965090c4566b2b132bd48aba4646f0e2c49a53eb6904e98c471a1b",
    ),
}

#: Environment variable that names the folder of downloaded data.
DATA_DIR_VARIABLE = "DESISKY_DATA_DIR"


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of downloaded data: `root`, DESISKY_DATA_DIR or ~/.desisky/data."""
    chosen = root or os.environ.get(DATA_DIR_VARIABLE) or "~/.desisky/data"
    return Path(chosen).expanduser()


class SkySpecVAC:
    """The sky-spectra value-added catalogue: spectra and observing conditions.

    Parameters
    ----------
    root
        Folder of downloaded data; by default DESISKY_DATA_DIR or ``~/.desisky/data``.
        The file lies at ``<root>/dr1/sky_spectra_vac_v1.fits``.
    version
        One of :data:`RELEASES`.
    download
        Fetch the file when it is missing (about 274 MiB), with a progress bar.
    verify
        Check the SHA-256 of what is downloaded. A file that is already there is
        accepted as it is, a simulated one included.
    exclude_known_bad
        Leave out the nights of :data:`KNOWN_BAD_NIGHTS` (smoke over Kitt Peak).

    Attributes
    ----------
    path
        The FITS file.
    version, exclude_known_bad
        As given.

    Raises
    ------
    InputError
        When the version is unknown.
    MissingFileError
        When the file is missing and `download` is False.
    DownloadError
        When it cannot be fetched, or has the wrong checksum.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        version: str = "v1.0",
        download: bool = False,
        verify: bool = True,
        exclude_known_bad: bool = True,
    ) -> None:
        if version not in RELEASES:
            raise InputError(f"version {version!r} is unknown: one of {', '.join(RELEASES)}")
        release = RELEASES[version]
        self.version = version
        self.exclude_known_bad = exclude_known_bad
        self.path = data_root(root) / release.folder / release.filename
        if self.path.exists():
            return
        if not download:
            raise MissingFileError(
                f"{self.path}: no such file; fetch it with SkySpecVAC(download=True) or "
                "`desisky-tune data fetch`, or place it there"
            )
        with progress_bar(release.filename) as progress:
            fetch(
                release.url,
                self.path,
                sha256=release.sha256 if verify else None,
                progress=progress,
            )

    def filepath(self) -> Path:
        """Return the path of the FITS file."""
        return self.path

    def load(
        self, *, as_dataframe: bool = True
    ) -> tuple[np.ndarray, np.ndarray, pd.DataFrame | np.ndarray]:
        """Read the whole catalogue.

        Parameters
        ----------
        as_dataframe
            ``True``: metadata as a DataFrame with the columns of METADATA and, where
            the file does not have them already, SKY_MAG_V_SPEC (from FLUX),
            ECLIPSE_FRAC (exact, at mid-exposure), GALLON, GALLAT, ECLLON, ECLLAT
            (deg). SOLFLUX is there only where the file holds it: the daily solar
            flux comes from a catalogue that is neither shipped nor fetched.
            ``False``: a structured array of METADATA as it stands.

        Returns
        -------
        wavelength : (n_w,) f8, Angstrom
        flux : (n, n_w) f4, 1e-17 erg/s/cm2/A/arcsec2
        metadata : n rows, row i belonging to flux[i]

        Raises
        ------
        DataError
            When the file is truncated, lacks an HDU or column, or its parts disagree.
        """
        nights = (OutsideNights(*KNOWN_BAD_NIGHTS),) if self.exclude_known_bad else ()
        file = SpectraFile.open(self.path)
        rows = self._rows(file, nights, "the catalogue")
        flux = file.flux(rows)
        if as_dataframe:
            return file.wavelength, flux, _enriched(file, rows, flux)
        return file.wavelength, flux, file.structured_metadata()[rows]

    def load_moon_contaminated(self) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        """Read the moonlit exposures; see :meth:`load` and ``SUBSETS["moon"]``."""
        return self._load_subset("moon")

    def load_dark_time(self) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        """Read the dark exposures; see :meth:`load` and ``SUBSETS["dark"]``."""
        return self._load_subset("dark")

    def load_sun_contaminated(self) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        """Read the twilight exposures; see :meth:`load` and ``SUBSETS["twilight"]``."""
        return self._load_subset("twilight")

    def _load_subset(self, subset: str) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        conditions = subset_conditions(subset, exclude_known_bad=self.exclude_known_bad)
        file = SpectraFile.open(self.path)
        rows = self._rows(file, conditions, f"the cut {subset!r}")
        flux = file.flux(rows)
        return file.wavelength, flux, _enriched(file, rows, flux)

    def _rows(self, file: SpectraFile, conditions: Conditions, what: str) -> np.ndarray:
        """Return the rows that pass, known before a spectrum is read."""
        file.require(condition_columns(conditions))
        failed = first_failure(file.metadata(), conditions, file.rows)
        rows = np.flatnonzero(failed < 0)
        refuse_empty(
            len(rows), file.rows, count_removed(failed, conditions), f"{self.path}: {what}"
        )
        return rows


def _enriched(file: SpectraFile, rows: np.ndarray, flux: np.ndarray) -> pd.DataFrame:
    """Return the metadata of some rows with the columns that follow from them."""
    import pandas as pd

    from desisky_tune.data.geometry import galactic_ecliptic
    from desisky_tune.data.photometry import magnitudes

    columns: dict[str, Any] = {name: values[rows] for name, values in file.metadata().items()}
    if TARGETS[0] not in columns:
        columns[TARGETS[0]] = magnitudes(flux, file.wavelength, bands=("V",))[:, 0]
    if "ECLIPSE_FRAC" not in columns:
        file.require(["MJD"])
        columns["ECLIPSE_FRAC"] = eclipse_column(columns)
    if any(name not in columns for name in ("GALLON", "GALLAT", "ECLLON", "ECLLAT")):
        file.require([name for name in POINTING if name.startswith("TILE")])
        sky = galactic_ecliptic(columns["TILERA"], columns["TILEDEC"])
        columns |= {name: values for name, values in sky.items() if name not in columns}
    return pd.DataFrame(columns)
