"""The sky without the Moon: continuum, airglow lines and twilight, as spectra.

Continuum and scale of the lines were fitted to dark DESI exposures; at the zenith they
give V 21.70, g 22.25, r 21.47, z 19.59 (AB mag/arcsec2).
"""

from __future__ import annotations

from importlib import resources

import numpy as np
from numpy.typing import ArrayLike, NDArray

from desisky_tune.data.moonlight import airmass, solar_spectrum

Array = NDArray[np.float64]

#: Control points of the zenith continuum: Angstrom, 1e-17 erg/s/cm2/A/arcsec2.
CONTINUUM: tuple[tuple[float, float], ...] = (
    (3600, 0.62),
    (3900, 0.50),
    (4100, 0.58),
    (4300, 0.56),
    (4450, 0.74),
    (4600, 0.66),
    (4800, 0.59),
    (5100, 0.58),
    (5300, 0.66),
    (5550, 0.78),
    (5750, 0.92),
    (5900, 1.10),
    (6050, 1.02),
    (6200, 0.85),
    (6400, 0.72),
    (6700, 0.60),
    (7000, 0.56),
    (7600, 0.55),
    (8200, 0.58),
    (8700, 0.60),
    (9200, 0.55),
    (9824, 0.65),
)
#: The continuum is multiplied by a factor that is a straight line in magnitudes.
CONTINUUM_TILT = ((4500.0, 1.02), (9000.0, 0.268))

#: Scale of the Kitt Peak line list: oxygen's green line and red doublet, and the rest.
OXYGEN_LINES = ((5578.9, 0.55), (6302.1, 0.35), (6365.5, 0.35))  # vacuum, as in the list
OTHER_LINES = 0.783
_LINE_HALF_WINDOW = 6.0
LINE_FWHM = 1.8
DARK_AIRMASS_EXPONENT = 0.8

#: Where the twilight's spectrum is scaled to the dark continuum (A).
_TWILIGHT_PIVOT = 5500.0
#: Twilight is bluer than the Sun: the high air scatters it.
_TWILIGHT_BLUENESS = -2.0


def continuum(wavelength: ArrayLike) -> Array:
    """Return the dark zenith continuum on a grid in Angstrom."""
    grid = np.asarray(wavelength, dtype=np.float64)
    points, values = np.transpose(CONTINUUM)
    (blue, at_blue), (red, at_red) = CONTINUUM_TILT
    slope = np.log(at_red / at_blue) / (red - blue)
    return np.interp(grid, points, values) * at_blue * np.exp(slope * (grid - blue))


def airglow_lines(wavelength: ArrayLike) -> tuple[Array, Array]:
    """Return the dark zenith's oxygen lines, and its other lines (mostly OH).

    Broadened to an FWHM of 1.8 A on the line list's own grid, then interpolated.
    """
    text = resources.files("desisky_tune.data.sample") / "kpno-airglow-lines.csv"
    with resources.as_file(text) as path:
        grid, lines = np.loadtxt(path, delimiter=",", skiprows=1, unpack=True)
    step = grid[1] - grid[0]
    offsets = np.arange(-6, 7) * step
    kernel = np.exp(-4.0 * np.log(2.0) * (offsets / LINE_FWHM) ** 2)
    kernel /= kernel.sum()
    scale = np.zeros_like(grid)
    for centre, strength in OXYGEN_LINES:
        scale[np.abs(grid - centre) < _LINE_HALF_WINDOW] = strength
    oxygen = np.convolve(lines * scale, kernel, mode="same")
    others = np.convolve(lines * np.where(scale > 0, 0.0, OTHER_LINES), kernel, mode="same")
    wanted = np.asarray(wavelength, dtype=np.float64)
    return np.interp(wanted, grid, oxygen), np.interp(wanted, grid, others)


def twilight_brightening(sun_altitude: ArrayLike) -> Array:
    """Return by how many magnitudes twilight brightens a dark zenith in V.

    Thorstensen's polynomial (skycalc), for a Sun 9 to 18 deg below the horizon; 0
    beyond, and its value at 9 deg above that.
    """
    depression = np.clip(-np.asarray(sun_altitude, dtype=np.float64), 9.0, 18.0)
    y = (depression - 9.0) / 9.0
    value = ((2.0635175 * y + 1.246602) * y - 9.4084495) * y + 6.132725
    return np.where(depression >= 18.0, 0.0, np.maximum(value, 0.0))


class DarkSky:
    """Night sky without moonlight on one wavelength grid (Angstrom, shape ``(n_w,)``)."""

    def __init__(self, wavelength: ArrayLike) -> None:
        self.wavelength = np.asarray(wavelength, dtype=np.float64)
        self.continuum = continuum(self.wavelength)
        self.oxygen, self.hydroxyl = airglow_lines(self.wavelength)
        sunlight = solar_spectrum(self.wavelength) * (
            (self.wavelength / _TWILIGHT_PIVOT) ** _TWILIGHT_BLUENESS
        )
        level = np.interp(_TWILIGHT_PIVOT, self.wavelength, self.continuum)
        self._twilight = sunlight * (level / float(solar_spectrum(_TWILIGHT_PIVOT)))

    def spectra(
        self,
        altitude: Array,
        sun_altitude: Array,
        continuum_scale: Array,
        line_scale: Array,
    ) -> Array:
        """Return the sky in 1e-17 erg/s/cm2/A/arcsec2, shape ``(n, n_w)``.

        Parameters
        ----------
        altitude, sun_altitude
            Of the pointing and of the Sun, deg, shape ``(n,)``.
        continuum_scale, line_scale
            How strong continuum and lines are, 1 = as usual, shape ``(n,)``.
        """
        dark = continuum_scale[:, np.newaxis] * self.continuum
        dark += line_scale[:, np.newaxis] * (self.oxygen + self.hydroxyl)
        twilight = 10.0 ** (0.4 * twilight_brightening(sun_altitude)) - 1.0
        dark += twilight[:, np.newaxis] * self._twilight
        dark *= airmass(altitude)[:, np.newaxis] ** DARK_AIRMASS_EXPONENT
        return dark
