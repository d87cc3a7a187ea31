"""Magnitudes of sky spectra: all spectra and bands in one matrix product.

The weights are those of speclite's AB magnitudes, written out once per wavelength
grid, so that a spectrum costs four dot products. Beyond the ends of the grid the flux
counts as zero (z loses 9.5 % of its weight on the VAC's grid).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from desisky_tune.data.columns import BANDS
from desisky_tune.errors import DataError

Array = NDArray[np.float64]

#: speclite's name of each band's filter curve.
FILTERS: dict[str, str] = {
    "V": "bessell-V",
    "g": "decam2014-g",
    "r": "decam2014-r",
    "z": "decam2014-z",
}

#: Unit of the VAC's flux in erg/s/cm2/A/arcsec2.
FLUX_UNIT = 1e-17
#: h c in erg A, to the digits that speclite's zero points carry.
HC = 1.98644586e-8

#: V = 0.454 g + 0.526 r + 0.40 (AB): scatter 0.010 mag over simulated moonlit spectra.
V_FROM_G, V_FROM_R, V_OFFSET = 0.454, 0.526, 0.40

#: Spectra converted to float64 at a time: 512 x 7781 x 8 bytes = 32 MB.
_CHUNK = 512


def band_weights(wavelength: ArrayLike) -> Array:
    """Return the weights that turn a flux into V, g, r, z, shape ``(n_w, 4)``.

    ``-2.5 log10(flux @ weights)`` is the AB magnitude, flux in 1e-17
    erg/s/cm2/A/arcsec2. Computed once per grid and kept; the array is read-only.

    Parameters
    ----------
    wavelength
        Strictly increasing, shape ``(n_w,)``, Angstrom.

    Raises
    ------
    DataError
        When the grid is not a strictly increasing vector of two wavelengths or more.
    """
    grid = np.ascontiguousarray(wavelength, dtype=np.float64)
    if grid.ndim != 1 or grid.size < 2 or not (np.diff(grid) > 0).all():
        raise DataError(
            f"wavelength has shape {grid.shape}: photometry needs a vector of at least 2 "
            "finite, strictly increasing values (Angstrom)"
        )
    return _weights_of(grid.tobytes())


def magnitudes(flux: ArrayLike, wavelength: ArrayLike, bands: Sequence[str] = BANDS) -> Array:
    """Return AB magnitudes of spectra, shape ``(n, len(bands))``, in mag/arcsec2.

    Parameters
    ----------
    flux
        Shape ``(n, n_w)`` or ``(n_w,)`` (then ``n = 1``), any float type or byte order,
        in 1e-17 erg/s/cm2/A/arcsec2. Products are summed in float64, in chunks of rows.
    wavelength
        Shape ``(n_w,)``, Angstrom.
    bands
        Some of V, g, r, z, in the order of the columns wanted.

    Returns
    -------
    array
        NaN where the flux in a band is not positive, or not finite.

    Raises
    ------
    DataError
        On an unknown band, or a flux whose rows do not fit the grid.
    """
    unknown = [band for band in bands if band not in BANDS]
    if unknown:
        raise DataError(f"unknown band {unknown[0]!r}: the bands are {', '.join(BANDS)}")
    spectra = np.atleast_2d(np.asarray(flux))
    weights = band_weights(wavelength)[:, [BANDS.index(band) for band in bands]]
    if spectra.ndim != 2 or spectra.shape[1] != len(weights):
        raise DataError(
            f"flux has shape {spectra.shape}, but there are {len(weights)} wavelengths: "
            "it must be (exposures, wavelengths)"
        )
    weights = np.ascontiguousarray(weights)
    collected = np.empty((len(spectra), len(bands)))
    for start in range(0, len(spectra), _CHUNK):
        rows = slice(start, start + _CHUNK)
        np.matmul(spectra[rows].astype(np.float64), weights, out=collected[rows])
    collected[~(collected > 0) | ~np.isfinite(collected)] = np.nan
    return -2.5 * np.log10(collected)


def derived_v(g: ArrayLike, r: ArrayLike) -> Array:
    """Return V made from g and r (AB mag/arcsec2), for tables that have no V.

    A V made this way is to be marked as derived wherever it is shown.
    """
    g, r = np.asarray(g, dtype=np.float64), np.asarray(r, dtype=np.float64)
    return V_FROM_G * g + V_FROM_R * r + V_OFFSET


@lru_cache(maxsize=8)
def _weights_of(grid_bytes: bytes) -> Array:
    from speclite.filters import load_filter

    grid = np.frombuffer(grid_bytes, dtype=np.float64)
    cell = np.empty_like(grid)
    cell[1:-1] = 0.5 * (grid[2:] - grid[:-2])
    cell[0], cell[-1] = 0.5 * (grid[1] - grid[0]), 0.5 * (grid[-1] - grid[-2])
    weights = np.empty((grid.size, len(BANDS)))
    for column, band in enumerate(BANDS):
        curve = load_filter(FILTERS[band])
        response = np.interp(grid, curve.wavelength, curve.response, left=0.0, right=0.0)
        zeropoint = float(curve.ab_zeropoint.value)
        weights[:, column] = response * grid * cell * (FLUX_UNIT / HC / zeropoint)
    weights.setflags(write=False)
    return weights
