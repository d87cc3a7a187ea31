"""A simulated sky-spectra VAC: the real file's layout, by physics fitted to real exposures.

Real nights, the real Moon and Sun, a plan of pointings (`observing_plan`), moonlight
(`moonlight`) over a dark sky (`darksky`), and scatter by night and by exposure. Spectra
are computed and written block by block: memory does not grow with the file. The same
seed gives the same bytes on one machine with one set of library versions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from desisky_tune.data import geometry
from desisky_tune.data.darksky import DarkSky
from desisky_tune.data.moonlight import Moonlight, MoonlitRows
from desisky_tune.data.observing_plan import FIRST_NIGHT, LAST_NIGHT, ObservingPlan, plan_exposures
from desisky_tune.data.photometry import magnitudes
from desisky_tune.errors import DataError
from desisky_tune.files import atomic_path

Array = NDArray[np.float64]

#: The VAC's wavelength grid: first value, step (A), number of pixels.
WAVELENGTH_START, WAVELENGTH_STEP, WAVELENGTH_PIXELS = 3600.0, 0.8, 7781
#: Rows of the real catalogue.
VAC_EXPOSURES = 9176

#: Columns of METADATA in order: name, FITS format, unit.
METADATA_COLUMNS: tuple[tuple[str, str, str | None], ...] = (
    ("NIGHT", "J", None),
    ("EXPID", "J", None),
    ("TILEID", "J", None),
    ("TILERA", "D", "deg"),
    ("TILEDEC", "D", "deg"),
    ("MJD", "D", "d"),
    ("EXPTIME", "D", "s"),
    ("AIRMASS", "D", None),
    ("EBV", "D", "mag"),
    ("SEEING_ETC", "D", "arcsec"),
    ("TRANSPARENCY_GFA", "D", None),
    ("SEEING_GFA", "D", "arcsec"),
    ("SKY_MAG_G_SPEC", "D", "mag/arcsec2"),
    ("SKY_MAG_R_SPEC", "D", "mag/arcsec2"),
    ("SKY_MAG_Z_SPEC", "D", "mag/arcsec2"),
    ("MOONFRAC", "D", None),
    ("MOONALT", "D", "deg"),
    ("MOONSEP", "D", "deg"),
    ("SUNALT", "D", "deg"),
    ("SUNSEP", "D", "deg"),
    ("OBSALT", "D", "deg"),
    ("OBSAZ", "D", "deg"),
)
FLUX_UNIT_NAME = "1e-17 erg/s/cm2/A/arcsec2"

#: Scatter in ln of the airglow lines and of the continuum: by night, and within one.
LINES_BY_NIGHT, LINES_WITHIN = 0.27, 0.13
CONTINUUM_BY_NIGHT, CONTINUUM_WITHIN = 0.10, 0.08
#: Aerosol optical depth at 5000 A: median, and the sd of its ln below and above it, which
#: give 0.018, 0.062 and 0.137 at 5, 50 and 95 %; correlation from one night to the next.
AEROSOL_MEDIAN, AEROSOL_BELOW, AEROSOL_ABOVE, AEROSOL_MEMORY = 0.062, 0.75, 0.482, 0.6
#: Clear transparency, share of cloudy nights, and the cloud's mean dimming there.
CLEAR_TRANSPARENCY, CLEAR_SCATTER = 0.99, 0.035
CLOUDY_NIGHTS, CLOUD_SHAPE, CLOUD_SCALE = 0.30, 1.2, 0.15
LOWEST_TRANSPARENCY = 0.06
#: Share of rows whose transparency is missing: as NaN, as 0, as -1.
UNUSABLE = (0.10, 0.04, 0.02)
#: Measurement: a grey error of the flux (ln), and one of each tabulated magnitude.
FLUX_ERROR, MAGNITUDE_ERROR = 0.010, 0.015

FIRST_EXPID = 67710
_BLOCK = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Weather:
    """What the sky was like in each exposure, fields of shape ``(n,)``."""

    transparency: Array
    aerosol_depth: Array
    continuum: Array
    lines: Array


@dataclass(frozen=True)
class Season:
    """Exposures as they were taken, without their spectra.

    Attributes
    ----------
    plan
        When and where to.
    columns
        METADATA but the magnitudes, and MOONDIST (km), each of shape ``(n,)``.
    weather
        What the sky was like.
    eclipse
        Eclipsed fraction of the Moon's disc, shape ``(n,)``.
    grey, magnitude_error
        What was measured wrongly: a factor of the flux, shape ``(n,)``, and mag of g, r and
        z, shape ``(n, 3)``.
    """

    plan: ObservingPlan
    columns: dict[str, Any]
    weather: Weather
    eclipse: Array
    grey: Array
    magnitude_error: Array


def draw_season(exposures: int, seed: int) -> Season:
    """Draw the exposures of a simulated VAC.

    Raises
    ------
    DataError
        When the number of exposures or the seed is not allowed.
    """
    if seed < 0:
        raise DataError(f"seed is {seed}: it must be 0 or more")
    streams = np.random.default_rng(seed).spawn(4)
    plan = plan_exposures(exposures, streams[0])
    columns = _pointing_columns(plan)
    eclipse = geometry.eclipse_fraction(plan.middle)
    weather = draw_weather(plan.night_index, streams[1])
    columns.update(_site_columns(plan, columns, weather, eclipse, streams[2]))
    grey = np.exp(FLUX_ERROR * streams[3].standard_normal(len(plan)))
    error = MAGNITUDE_ERROR * streams[3].standard_normal((len(plan), 3))
    return Season(plan, columns, weather, eclipse, grey, error)


def vac_wavelength() -> Array:
    """Return the VAC's wavelengths, shape ``(7781,)``, Angstrom."""
    return WAVELENGTH_START + WAVELENGTH_STEP * np.arange(WAVELENGTH_PIXELS, dtype=np.float64)


def simulate_vac(
    path: str | os.PathLike[str],
    exposures: int = VAC_EXPOSURES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a simulated sky-spectra VAC.

    Parameters
    ----------
    path
        The FITS file to write (about 31 kB per exposure). It appears when complete.
    exposures
        Number of rows, 20 to about 18,000. Each subset (moon, dark, twilight) has its
        real share, and at least a few rows; some moonlit rows are eclipsed.
    seed
        Of every draw. The same seed gives the same bytes.
    progress
        Called as ``progress(rows_written, exposures)`` after each block.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    DataError
        When the number of exposures or the seed is not allowed.
    StorageError
        When the file cannot be written.
    """
    season = draw_season(exposures, seed)
    columns = season.columns
    target = Path(path)
    with atomic_path(target) as temporary:
        _write_head(temporary)
        bands = _write_flux(temporary, season, progress)
        for name, values in zip("GRZ", bands.T, strict=True):
            columns[f"SKY_MAG_{name}_SPEC"] = values
        _write_metadata(temporary, columns)
    return target


def draw_weather(night_index: NDArray[np.int64], rng: np.random.Generator) -> Weather:
    """Draw transparency, aerosol and airglow for exposures of given nights.

    Parameters
    ----------
    night_index
        MJD of each exposure's night, between the season's first and last, shape ``(n,)``.
    """
    nights = LAST_NIGHT - FIRST_NIGHT + 1
    of_row = np.asarray(night_index) - FIRST_NIGHT
    rows = of_row.size

    aerosol = np.empty(nights)
    shocks = rng.standard_normal(nights)
    aerosol[0] = shocks[0]
    for night in range(1, nights):
        fresh = np.sqrt(1.0 - AEROSOL_MEMORY**2) * shocks[night]
        aerosol[night] = AEROSOL_MEMORY * aerosol[night - 1] + fresh
    spread = np.where(aerosol < 0, AEROSOL_BELOW, AEROSOL_ABOVE)
    depth = AEROSOL_MEDIAN * np.exp(spread * aerosol)

    lines_night = LINES_BY_NIGHT * rng.standard_normal(nights)
    continuum_night = CONTINUUM_BY_NIGHT * rng.standard_normal(nights)
    cloudy = rng.random(nights) < CLOUDY_NIGHTS
    thickness = rng.gamma(CLOUD_SHAPE, CLOUD_SCALE, nights)  # the night's mean ln-dimming
    within = rng.gamma(2.0, 0.5, rows)
    clear = CLEAR_TRANSPARENCY + CLEAR_SCATTER * rng.standard_normal(rows)
    transparency = clear * np.exp(-np.where(cloudy, thickness, 0.0)[of_row] * within)
    return Weather(
        transparency=np.clip(transparency, LOWEST_TRANSPARENCY, None),
        aerosol_depth=depth[of_row],
        continuum=np.exp(continuum_night[of_row] + CONTINUUM_WITHIN * rng.standard_normal(rows)),
        lines=np.exp(lines_night[of_row] + LINES_WITHIN * rng.standard_normal(rows)),
    )


class Sky:
    """Moonlight over the dark sky on one wavelength grid (Angstrom, shape ``(n_w,)``)."""

    def __init__(self, wavelength: Array) -> None:
        self._moonlight = Moonlight(wavelength)
        self._dark = DarkSky(wavelength)

    def spectra(self, columns: dict[str, Array], weather: Weather, eclipse: Array) -> Array:
        """Return noiseless spectra in 1e-17 erg/s/cm2/A/arcsec2, shape ``(n, n_w)``.

        `columns` are those of `geometry.observing_geometry`, MOONDIST included; `eclipse`
        is the eclipsed fraction of the Moon's disc.
        """
        flux = self._dark.spectra(
            columns["OBSALT"], columns["SUNALT"], weather.continuum, weather.lines
        )
        flux += self._moonlight.spectra(
            MoonlitRows(
                moon_fraction=columns["MOONFRAC"],
                moon_altitude=columns["MOONALT"],
                moon_separation=columns["MOONSEP"],
                moon_distance=columns["MOONDIST"],
                altitude=columns["OBSALT"],
                transparency=weather.transparency,
                aerosol_depth=weather.aerosol_depth,
                eclipse_fraction=eclipse,
            )
        )
        return flux


def _pointing_columns(plan: ObservingPlan) -> dict[str, Any]:
    """Return the columns that follow from the plan alone, and MOONDIST (km)."""
    return {
        "NIGHT": plan.night,
        "TILERA": plan.ra,
        "TILEDEC": plan.dec,
        "MJD": plan.mjd,
        "EXPTIME": plan.exptime,
        **geometry.observing_geometry(plan.middle, plan.ra, plan.dec, moon_distance=True),
    }


def _site_columns(
    plan: ObservingPlan,
    columns: dict[str, Any],
    weather: Weather,
    eclipse: Array,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return identifiers, airmass, dust, seeing and the tabulated transparency."""
    count = len(plan)
    airmass = 1.0 / np.sin(np.radians(columns["OBSALT"]))
    seeing = 1.1 * airmass**0.6 * np.exp(0.25 * rng.standard_normal(count))
    transparency = np.round(weather.transparency, 5)
    draw = rng.random(count)
    as_nan, as_zero, as_negative = np.cumsum(UNUSABLE)
    # The few eclipsed exposures keep theirs: a feature that is 0 elsewhere needs every row.
    missing = (draw < as_negative) & (eclipse == 0)
    value = np.where(draw < as_nan, np.nan, np.where(draw < as_zero, 0.0, -1.0))
    bright = columns["MOONALT"] > 0
    tiles = np.where(bright, 20000, 1000) + rng.permutation(count) % 10000
    latitude = np.abs(geometry.galactic_ecliptic(plan.ra, plan.dec)["GALLAT"])
    dust = 0.016 / np.sin(np.radians(np.maximum(latitude, 10.0)))
    return {
        "EXPID": FIRST_EXPID + np.cumsum(rng.integers(1, 9, count)),
        "TILEID": tiles,
        "AIRMASS": airmass,
        "EBV": np.round(dust * np.exp(0.4 * rng.standard_normal(count)), 4),
        "SEEING_ETC": np.round(seeing * np.exp(0.05 * rng.standard_normal(count)), 4),
        "SEEING_GFA": np.round(seeing, 4),
        "TRANSPARENCY_GFA": np.where(missing, value, transparency),
    }


def _write_head(path: Path) -> None:
    """Write the empty primary HDU and WAVELENGTH."""
    from astropy.io import fits

    wavelength = fits.ImageHDU(vac_wavelength(), name="WAVELENGTH")
    wavelength.header["BUNIT"] = "Angstrom"
    fits.HDUList([fits.PrimaryHDU(), wavelength]).writeto(path)


def measured_flux(sky: Sky, season: Season, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the spectra of some exposures as the catalogue holds them, ``(k, n_w)``."""
    conditions = (*geometry.GEOMETRY_COLUMNS, "MOONDIST")
    flux = sky.spectra(
        {name: season.columns[name][rows] for name in conditions},
        Weather(**{name: values[rows] for name, values in vars(season.weather).items()}),
        season.eclipse[rows],
    )
    flux *= season.grey[rows, np.newaxis]
    flux[:, -1] = 0.0  # as in the real file
    return flux.astype(np.float32)


def tabulated(bands: Array, error: Array) -> Array:
    """Return magnitudes as METADATA has them.

    Five decimals: the table does not depend on how many threads summed a magnitude.
    """
    return np.round(bands + error, 5)


def _write_flux(path: Path, season: Season, progress: Progress | None) -> Array:
    """Append FLUX block by block; return the tabulated magnitudes g, r, z, ``(n, 3)``."""
    from astropy.io import fits

    wavelength = vac_wavelength()
    sky = Sky(wavelength)
    count = len(season.plan)
    bands = np.empty((count, 3))
    header = fits.Header()
    header["XTENSION"] = "IMAGE"
    header["BITPIX"] = -32
    header["NAXIS"] = 2
    header["NAXIS1"] = wavelength.size
    header["NAXIS2"] = count
    header["PCOUNT"] = 0
    header["GCOUNT"] = 1
    header["EXTNAME"] = "FLUX"
    header["BUNIT"] = FLUX_UNIT_NAME
    stream = fits.StreamingHDU(str(path), header)
    try:
        for start in range(0, count, _BLOCK):
            rows = slice(start, min(start + _BLOCK, count))
            stored = measured_flux(sky, season, rows)
            bands[rows] = magnitudes(stored, wavelength, ("g", "r", "z"))
            stream.write(stored)
            if progress is not None:
                progress(rows.stop, count)
    finally:
        stream.close()
    return tabulated(bands, season.magnitude_error)


def _write_metadata(path: Path, columns: dict[str, Any]) -> None:
    """Append METADATA."""
    from astropy.io import fits

    table = fits.BinTableHDU.from_columns(
        [
            fits.Column(name=name, format=form, unit=unit, array=columns[name])
            for name, form, unit in METADATA_COLUMNS
        ],
        name="METADATA",
    )
    fits.append(str(path), table.data, table.header)
