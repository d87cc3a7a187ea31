"""Scattered moonlight as a spectrum: single scattering in a plane-parallel atmosphere.

The Moon's own light is the Sun's spectrum times the ROLO disc reflectance (Kieffer &
Stone 2005, AJ 129, 2887, eq. 10); air, aerosol and thin cloud scatter it once into the
line of sight. Multiple scattering and the cloud's phase function are effective values
fitted to real DESI exposures: against those the model is 0.06 mag off in the mean and
scatters by 0.13, 0.14 and 0.24 mag in g, r and z.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: Solid angle of the Moon at its mean distance (sr), and that distance (km).
MOON_SOLID_ANGLE = 6.4177e-5
MOON_MEAN_DISTANCE = 384400.0
STERADIAN_PER_ARCSEC2 = 2.3504e-11

#: Pressure at the Mayall telescope and at sea level (hPa).
SITE_PRESSURE, SEA_LEVEL_PRESSURE = 790.0, 1013.25

#: Effective values fitted to real exposures.
MULTIPLE_SCATTERING = 8.2
AEROSOL_ALBEDO, AEROSOL_ASYMMETRY, AEROSOL_EXPONENT = 0.95, 0.70, -1.0
CLOUD_WEIGHT, CLOUD_ASYMMETRY = 2.3, 0.26
CLOUD_DEPTH_PER_DIMMING = 0.2


@dataclass(frozen=True)
class MoonlitRows:
    """The conditions of some exposures, each field of shape ``(n,)``.

    Angles in deg, `moon_distance` in km, `transparency` 1 when clear, `aerosol_depth`
    the optical depth at 5000 A, `eclipse_fraction` 0-1.
    """

    moon_fraction: Array
    moon_altitude: Array
    moon_separation: Array
    moon_distance: Array
    altitude: Array
    transparency: Array
    aerosol_depth: Array
    eclipse_fraction: Array


def airmass(altitude: ArrayLike) -> Array:
    """Return the scattering airmass (Krisciunas & Schaefer 1991, eq. 3) of altitudes in deg."""
    cos_altitude = np.cos(np.radians(altitude))
    return (1.0 - 0.96 * cos_altitude**2) ** -0.5


def phase_angle(moon_fraction: ArrayLike) -> Array:
    """Return the Moon's phase angle (deg, 0 = full) from its illuminated fraction."""
    return np.degrees(np.arccos(np.clip(2.0 * np.asarray(moon_fraction) - 1.0, -1.0, 1.0)))


def rayleigh_depth(wavelength: ArrayLike) -> Array:
    """Return the zenith optical depth of the air over the site; wavelength in Angstrom."""
    micron2 = (np.asarray(wavelength, dtype=np.float64) / 1e4) ** 2
    sea_level = 0.008569 / micron2**2 * (1.0 + 0.0113 / micron2 + 0.00013 / micron2**2)
    return sea_level * SITE_PRESSURE / SEA_LEVEL_PRESSURE


def ozone_depth(wavelength: ArrayLike) -> Array:
    """Return the zenith optical depth of ozone's Chappuis band; wavelength in Angstrom."""
    return 0.035 * np.exp(-0.5 * ((np.asarray(wavelength, dtype=np.float64) - 5950.0) / 550.0) ** 2)


def rayleigh_phase(separation: ArrayLike) -> Array:
    """Return Rayleigh's phase function of a scattering angle in deg (mean 1 over the sphere)."""
    return 0.75 * (1.0 + np.cos(np.radians(separation)) ** 2)


def henyey_greenstein(separation: ArrayLike, asymmetry: float) -> Array:
    """Return Henyey and Greenstein's phase function (mean 1 over the sphere); deg."""
    cosine = np.cos(np.radians(separation))
    return (1.0 - asymmetry**2) / (1.0 + asymmetry**2 - 2.0 * asymmetry * cosine) ** 1.5


def path_function(depth: ArrayLike, x_moon: ArrayLike, x: ArrayLike) -> Array:
    """Return the geometry factor G of single scattering, per unit of optical depth.

    ``G = X (exp(-t Xm) - exp(-t X)) / ((X - Xm) t)``, with its limit ``X exp(-t X)``
    where the two airmasses agree; written with expm1, so that it is smooth there.
    """
    depth, x_moon, x = (np.asarray(a, dtype=np.float64) for a in (depth, x_moon, x))
    step = depth * (x - x_moon)
    safe = np.where(np.abs(step) > 1e-12, step, 1.0)
    factor = np.where(np.abs(step) > 1e-12, -np.expm1(-safe) / safe, 1.0)
    return x * np.exp(-depth * x_moon) * factor


@lru_cache(maxsize=1)
def _rolo_table() -> tuple[Array, Array]:
    text = resources.files("desisky_tune.data.sample") / "rolo-kieffer-stone-2005-table4.csv"
    with resources.as_file(text) as path:
        table = np.loadtxt(path, delimiter=",", skiprows=1)
    wavelength = table[:, 0] * 10.0
    # a0..a3, d1..d3; b1..b3 (waxing or waning) are left out, as in the fit.
    return wavelength, table[:, [1, 2, 3, 4, 8, 9, 10]]


def rolo_terms(moon_fraction: ArrayLike) -> Array:
    """Return the seven phase terms of ROLO's ln A, shape ``(n, 7)``."""
    degrees = np.atleast_1d(phase_angle(moon_fraction))
    radians = np.radians(degrees)
    return np.stack(
        [
            np.ones_like(radians),
            radians,
            radians**2,
            radians**3,
            np.exp(-degrees / 4.06054),
            np.exp(-degrees / 12.8802),
            np.cos((degrees + 30.5858) / 16.7498),
        ],
        axis=1,
    )


def rolo_coefficients(wavelength: ArrayLike) -> Array:
    """Return ROLO's coefficients interpolated to wavelengths in Angstrom, shape ``(7, n_w)``."""
    bands, coefficients = _rolo_table()
    grid = np.asarray(wavelength, dtype=np.float64)
    return np.stack([np.interp(grid, bands, column) for column in coefficients.T])


def lunar_reflectance(moon_fraction: ArrayLike, wavelength: ArrayLike) -> Array:
    """Return the disc-equivalent reflectance A of the Moon, shape ``(n, n_w)``."""
    return np.exp(_sum_of_products(rolo_terms(moon_fraction), rolo_coefficients(wavelength)))


def solar_spectrum(wavelength: ArrayLike) -> Array:
    """Return the Sun's flux above the atmosphere (ASTM G173-03), erg/s/cm2/A."""
    text = resources.files("desisky_tune.data.sample") / "solar-extraterrestrial.csv"
    with resources.as_file(text) as path:
        grid, flux = np.loadtxt(path, delimiter=",", skiprows=1, unpack=True)
    return np.interp(np.asarray(wavelength, dtype=np.float64), grid, flux)


class Moonlight:
    """Scattered moonlight on one wavelength grid (Angstrom, shape ``(n_w,)``)."""

    def __init__(self, wavelength: ArrayLike) -> None:
        self.wavelength = np.asarray(wavelength, dtype=np.float64)
        self._rayleigh = rayleigh_depth(self.wavelength)
        self._ozone = ozone_depth(self.wavelength)
        self._aerosol = (self.wavelength / 5000.0) ** AEROSOL_EXPONENT
        self._reflectance = rolo_coefficients(self.wavelength)
        self._full_moon = (
            solar_spectrum(self.wavelength)
            * (MOON_SOLID_ANGLE / np.pi)
            / (4.0 * np.pi)
            * STERADIAN_PER_ARCSEC2
            * 1e17
        )

    def spectra(self, rows: MoonlitRows) -> Array:
        """Return moonlight in 1e-17 erg/s/cm2/A/arcsec2, shape ``(n, n_w)``.

        0 where the Moon is below the horizon. An eclipse dims the Moon to 1e-4.
        """
        result = np.zeros((len(rows.altitude), self.wavelength.size))
        up = rows.moon_altitude > 0
        if up.any():
            result[up] = self._scattered(
                MoonlitRows(**{name: values[up] for name, values in vars(rows).items()})
            )
        return result

    def _scattered(self, rows: MoonlitRows) -> Array:
        def column(values: Array) -> Array:
            return values[:, np.newaxis]

        cloud = CLOUD_DEPTH_PER_DIMMING * np.maximum(0.0, -np.log(rows.transparency))
        aerosol = column(rows.aerosol_depth) * self._aerosol
        depth = self._rayleigh + self._ozone + aerosol + column(cloud)
        separation = rows.moon_separation
        scattered = column(rayleigh_phase(separation)) * (
            self._rayleigh * (1.0 + MULTIPLE_SCATTERING * self._rayleigh)
        )
        scattered += column(AEROSOL_ALBEDO * henyey_greenstein(separation, AEROSOL_ASYMMETRY)) * (
            aerosol * (1.0 + MULTIPLE_SCATTERING * aerosol)
        )
        scattered += column(CLOUD_WEIGHT * cloud * henyey_greenstein(separation, CLOUD_ASYMMETRY))
        scattered *= path_function(
            depth, column(airmass(rows.moon_altitude)), column(airmass(rows.altitude))
        )
        scattered *= np.exp(_sum_of_products(rolo_terms(rows.moon_fraction), self._reflectance))
        near = (MOON_MEAN_DISTANCE / rows.moon_distance) ** 2
        scattered *= column(near * (1.0 - rows.eclipse_fraction * (1.0 - 1e-4)))
        scattered *= self._full_moon
        return scattered


def _sum_of_products(left: Array, right: Array) -> Array:
    """Multiply ``(n, k)`` by ``(k, n_w)`` term by term, in one order on any number of threads."""
    total = left[:, :1] * right[0]
    for term in range(1, right.shape[0]):
        total += left[:, term : term + 1] * right[term]
    return total
