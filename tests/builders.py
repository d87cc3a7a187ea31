"""Small catalogues and tables that several tests build on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from astropy.io import fits

#: Covers V, g, r and z like the VAC's grid, in 195 pixels.
COARSE_WAVELENGTH = np.linspace(3600.0, 9824.0, 195)

#: Integer columns of the VAC's METADATA; all others are floats.
INTEGER_COLUMNS = ("NIGHT", "EXPID", "TILEID")

_NIGHTS = (20210101, 20210330, 20210604, 20210612, 20210613, 20220516)


def catalogue_metadata(exposures: int = 60, seed: int = 0) -> pd.DataFrame:
    """Return METADATA of made-up exposures, with rows in every subset and unusable ones."""
    draw = np.random.default_rng(seed)
    n = exposures
    transparency = draw.uniform(0.5, 1.1, n)
    transparency[::7] = 0.0
    transparency[3::17] = np.nan
    return pd.DataFrame(
        {
            "NIGHT": draw.choice(_NIGHTS, n),
            "EXPID": draw.permutation(np.arange(80000, 80000 + n)),
            "TILEID": draw.integers(1, 9999, n),
            "TILERA": draw.uniform(0, 360, n),
            "TILEDEC": draw.uniform(-20, 80, n),
            "MJD": draw.uniform(59215.0, 59700.0, n),
            "EXPTIME": draw.uniform(300, 1200, n),
            "AIRMASS": draw.uniform(1, 2, n),
            "EBV": draw.uniform(0, 0.2, n),
            "SEEING_ETC": draw.uniform(0.7, 2, n),
            "TRANSPARENCY_GFA": transparency,
            "SEEING_GFA": draw.uniform(0.7, 2, n),
            "SKY_MAG_G_SPEC": draw.uniform(18, 22, n),
            "SKY_MAG_R_SPEC": draw.uniform(18, 21, n),
            "SKY_MAG_Z_SPEC": draw.uniform(17, 20, n),
            "MOONFRAC": draw.uniform(0.3, 1, n),
            "MOONALT": draw.choice([-30.0, -5.0, 5.0, 20.0, 60.0], n),
            "MOONSEP": draw.choice([40.0, 90.0, 120.0], n, p=[0.6, 0.3, 0.1]),
            "SUNALT": draw.choice([-50.0, -20.0, -15.0], n, p=[0.7, 0.1, 0.2]),
            "SUNSEP": draw.choice([80.0, 110.0, 150.0], n),
            "OBSALT": draw.uniform(31, 89, n),
            "OBSAZ": draw.uniform(0, 360, n),
        }
    )


def marked_flux(metadata: pd.DataFrame, wavelength: np.ndarray = COARSE_WAVELENGTH) -> np.ndarray:
    """Return spectra whose first pixel is the exposure's number, so that rows can be told."""
    level = np.linspace(1.0, 5.0, len(metadata))
    flux = np.repeat(level[:, np.newaxis], len(wavelength), axis=1).astype(np.float32)
    flux[:, 0] = metadata["EXPID"]
    flux[:, -1] = 0
    return flux


def write_catalogue(
    path: Path,
    metadata: pd.DataFrame,
    flux: np.ndarray | None = None,
    wavelength: np.ndarray = COARSE_WAVELENGTH,
    *,
    float_type: str = "f8",
    omit: Sequence[str] = (),
    rename: dict[str, str] | None = None,
) -> Path:
    """Write a file with the VAC's layout.

    `omit` leaves HDUs out, `rename` gives HDUs another name.
    """
    types = {c: "i4" if c in INTEGER_COLUMNS else float_type for c in metadata.columns}
    records = metadata.to_records(index=False, column_dtypes=types)
    hdus = [
        fits.ImageHDU(wavelength, name="WAVELENGTH"),
        fits.ImageHDU(marked_flux(metadata, wavelength) if flux is None else flux, name="FLUX"),
        fits.BinTableHDU(np.asarray(records), name="METADATA"),
    ]
    kept = [hdu for hdu in hdus if hdu.name not in omit]
    for hdu in kept:
        hdu.name = (rename or {}).get(hdu.name, hdu.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    fits.HDUList([fits.PrimaryHDU(), *kept]).writeto(path, overwrite=True)
    return path


def place_catalogue(root: Path, metadata: pd.DataFrame, **how: object) -> Path:
    """Write a catalogue where a downloaded VAC would lie below `root`."""
    return write_catalogue(root / "dr1" / "sky_spectra_vac_v1.fits", metadata, **how)  # type: ignore[arg-type]
