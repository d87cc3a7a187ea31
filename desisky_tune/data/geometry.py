"""Where the Moon, the Sun and the pointing stood: vectorised, and without a network.

Angles are topocentric for the Mayall telescope; the eclipse is geocentric, as an
eclipse is the same for every observer on the night side. Ephemerides are astropy's
built-in ones (Moon to about 5 arcsec), so that nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: The Mayall 4 m telescope on Kitt Peak: longitude and latitude (deg), height (m).
MAYALL_LONGITUDE = -111.59989
MAYALL_LATITUDE = 31.96403
MAYALL_HEIGHT = 2097.0

#: Columns that `observing_geometry` returns, in the order of the VAC's table.
GEOMETRY_COLUMNS: tuple[str, ...] = (
    "MOONFRAC",
    "MOONALT",
    "MOONSEP",
    "SUNALT",
    "SUNSEP",
    "OBSALT",
    "OBSAZ",
)

EARTH_RADIUS_KM = 6378.137
SUN_RADIUS_KM = 696000.0
MOON_RADIUS_IN_EARTH_RADII = 0.272488
#: Danjon's rule: the atmosphere enlarges the Earth's shadow by 1 % of the Moon's parallax.
UMBRA_ENLARGEMENT = 1.01

_J2000_MJD = 51544.5
_DAYS_PER_CENTURY = 36525.0
#: Largest angle (deg) between the Moon's mean and true elongation, with room to spare:
#: equation of the centre 6.3, evection 1.3, variation 0.7, annual 0.2, the Sun's own 1.9.
_ELONGATION_SLACK = 12.0
#: Beyond |sin F| = 0.36 the Moon passes even the penumbra by (Meeus 1998, ch. 54).
_NODE_LIMIT = 0.36


def configure_offline_iers() -> None:
    """Let astropy use the Earth-rotation tables it ships, for any date.

    To be called in every process that computes geometry, Ray workers included:
    without it astropy wants a download, and refuses dates of the last month.
    """
    from astropy.utils import iers

    iers.conf.auto_download = False
    iers.conf.auto_max_age = None
    iers.conf.iers_degraded_accuracy = "warn"


def mayall() -> Any:
    """Return the Mayall telescope as an astropy `EarthLocation`."""
    import astropy.units as u
    from astropy.coordinates import EarthLocation

    return EarthLocation.from_geodetic(
        MAYALL_LONGITUDE * u.deg, MAYALL_LATITUDE * u.deg, MAYALL_HEIGHT * u.m
    )


def observing_geometry(
    mjd: ArrayLike, ra: ArrayLike, dec: ArrayLike, *, moon_distance: bool = False
) -> dict[str, Array]:
    """Compute the Moon, Sun and pointing columns of the VAC's table.

    Parameters
    ----------
    mjd
        UTC at **mid-exposure**, shape ``(n,)``, days. Where a table gives the start
        of an exposure (as DESI's MJD does), add ``EXPTIME / 86400 / 2``.
    ra, dec
        Pointing, ICRS, shape ``(n,)``, deg.
    moon_distance
        Add MOONDIST, the Moon's distance from the telescope (km).

    Returns
    -------
    dict of arrays ``(n,)``, float64
        MOONFRAC (illuminated fraction, 0-1), MOONALT, MOONSEP, SUNALT, SUNSEP, OBSALT
        and OBSAZ (deg), topocentric, without refraction. NaN where an input is not
        finite.
    """
    mjd, ra, dec = np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in (mjd, ra, dec)))
    names = GEOMETRY_COLUMNS + (("MOONDIST",) if moon_distance else ())
    columns = {name: np.full(mjd.shape, np.nan) for name in names}
    known = np.isfinite(mjd) & np.isfinite(ra) & np.isfinite(dec) & (np.abs(dec) <= 90)
    if known.any():
        computed = _topocentric(mjd[known], ra[known], dec[known])
        for name in names:
            columns[name][known] = computed[name]
    return columns


def illuminated_fraction(elongation: ArrayLike, d_moon: ArrayLike, d_sun: ArrayLike) -> Array:
    """Return the Moon's illuminated fraction (Meeus 1998, eqs. 48.1 and 48.3).

    Parameters
    ----------
    elongation
        Angle between Moon and Sun, rad.
    d_moon, d_sun
        Their distances, in one unit.
    """
    phase = np.arctan2(
        np.asarray(d_sun) * np.sin(elongation), np.asarray(d_moon) - d_sun * np.cos(elongation)
    )
    return 0.5 * (1.0 + np.cos(phase))


def umbral_magnitude(mjd: ArrayLike) -> Array:
    """Return the fraction of the Moon's diameter inside the umbra, shape ``(n,)``.

    Negative away from an eclipse, 0 at first and last contact, 1 where totality begins
    and ends. `mjd` is UTC, days.
    """
    separation, umbra, moon = _shadow(np.atleast_1d(np.asarray(mjd, dtype=np.float64)))
    return (umbra + moon - separation) / (2.0 * moon)


def eclipse_fraction(mjd: ArrayLike) -> Array:
    """Return the fraction of the Moon's disc (area) inside the umbra, shape ``(n,)``.

    Danjon's umbra, geocentric, exact overlap of the two circles. Times far from a full
    Moon near its node are 0 by mean elements, without an ephemeris. NaN stays NaN.

    Parameters
    ----------
    mjd
        UTC at mid-exposure, days.
    """
    mjd = np.atleast_1d(np.asarray(mjd, dtype=np.float64))
    fraction = np.where(np.isfinite(mjd), 0.0, np.nan)
    near = _near_eclipse(mjd)
    if near.any():
        separation, umbra, moon = _shadow(mjd[near])
        area = disc_overlap(separation, umbra, moon)
        fraction[near] = np.clip(area / (np.pi * moon**2), 0.0, 1.0)
    return fraction


def disc_overlap(separation: ArrayLike, radius_a: ArrayLike, radius_b: ArrayLike) -> Array:
    """Return the area common to two discs whose centres are `separation` apart.

    All three in one unit, broadcast together; the area is in its square. Disjoint
    discs give 0, a disc inside the other its whole area.
    """
    d, a, b = np.broadcast_arrays(
        *(np.asarray(value, dtype=np.float64) for value in (separation, radius_a, radius_b))
    )
    smaller = np.minimum(a, b)
    # Centres closer than rounding can tell: the formula below would divide by nothing.
    inside = (d <= np.abs(a - b)) | (d <= 1e-12 * smaller)
    area = np.where(inside, np.pi * smaller**2, 0.0)
    crossing = ~inside & (d < a + b)
    if crossing.any():
        d, a, b = d[crossing], a[crossing], b[crossing]
        half_a = np.arccos(np.clip((d**2 + a**2 - b**2) / (2 * d * a), -1.0, 1.0))
        half_b = np.arccos(np.clip((d**2 + b**2 - a**2) / (2 * d * b), -1.0, 1.0))
        kite = 0.5 * np.sqrt(
            np.maximum((-d + a + b) * (d + a - b) * (d - a + b) * (d + a + b), 0.0)
        )
        area[crossing] = a**2 * half_a + b**2 * half_b - kite
    return area


def galactic_ecliptic(ra: ArrayLike, dec: ArrayLike) -> dict[str, Array]:
    """Return GALLON, GALLAT, ECLLON, ECLLAT (deg) of ICRS positions in deg, shape ``(n,)``.

    The ecliptic is the mean one of J2000 at the barycentre. NaN where an input is not
    finite.
    """
    import astropy.units as u
    from astropy.coordinates import BarycentricMeanEcliptic, SkyCoord

    ra = np.atleast_1d(np.asarray(ra, dtype=np.float64))
    dec = np.atleast_1d(np.asarray(dec, dtype=np.float64))
    known = np.isfinite(ra) & np.isfinite(dec) & (np.abs(dec) <= 90)
    columns = {name: np.full(ra.shape, np.nan) for name in ("GALLON", "GALLAT", "ECLLON", "ECLLAT")}
    sky = SkyCoord(ra[known] * u.deg, dec[known] * u.deg)
    galactic = sky.galactic
    ecliptic = sky.transform_to(BarycentricMeanEcliptic())
    columns["GALLON"][known] = galactic.l.deg
    columns["GALLAT"][known] = galactic.b.deg
    columns["ECLLON"][known] = ecliptic.lon.deg
    columns["ECLLAT"][known] = ecliptic.lat.deg
    return columns


def utc(mjd: ArrayLike) -> Any:
    """Return UTC days as an astropy `Time`, with astropy kept off the network."""
    from astropy.time import Time

    configure_offline_iers()
    return Time(np.asarray(mjd, dtype=np.float64), format="mjd", scale="utc")


def _topocentric(mjd: Array, ra: Array, dec: Array) -> dict[str, Array]:
    import astropy.units as u
    from astropy.coordinates import AltAz, SkyCoord, get_body

    time, site = utc(mjd), mayall()
    frame = AltAz(obstime=time, location=site)
    moon = get_body("moon", time, site)
    sun = get_body("sun", time, site)
    moon_sky, sun_sky = moon.transform_to(frame), sun.transform_to(frame)
    pointing = SkyCoord(ra * u.deg, dec * u.deg).transform_to(frame)
    moon_km = moon.distance.to_value(u.km)
    elongation = _separation(moon, sun)
    return {
        "MOONFRAC": illuminated_fraction(elongation, moon_km, sun.distance.to_value(u.km)),
        "MOONALT": moon_sky.alt.deg,
        "MOONSEP": np.degrees(_separation(pointing, moon_sky)),
        "SUNALT": sun_sky.alt.deg,
        "SUNSEP": np.degrees(_separation(pointing, sun_sky)),
        "OBSALT": pointing.alt.deg,
        "OBSAZ": pointing.az.deg,
        "MOONDIST": moon_km,
    }


def _separation(a: Any, b: Any) -> Array:
    """Return the angle (rad) between coordinates of one frame.

    SkyCoord.separation compares the frames' times one by one first, which takes as long
    as the ephemeris.
    """
    from astropy.coordinates import angular_separation

    lon_a, lat_a = a.spherical.lon.rad, a.spherical.lat.rad
    return np.asarray(angular_separation(lon_a, lat_a, b.spherical.lon.rad, b.spherical.lat.rad))


def _near_eclipse(mjd: Array) -> NDArray[np.bool_]:
    """Tell where the umbra can touch the Moon at all, by its mean elements.

    Mean elongation D and argument of latitude F: Meeus 1998, eqs. 47.2 and 47.5.
    """
    centuries = (mjd - _J2000_MJD) / _DAYS_PER_CENTURY
    elongation = (297.8501921 + 445267.1114034 * centuries) % 360.0
    latitude = np.radians((93.2720950 + 483202.0175233 * centuries) % 360.0)
    full = np.abs(elongation - 180.0) < _ELONGATION_SLACK
    return full & (np.abs(np.sin(latitude)) < _NODE_LIMIT)


def _shadow(mjd: Array) -> tuple[Array, Array, Array]:
    """Return the Moon's distance from the shadow's axis, and the radii of umbra and Moon (rad)."""
    import astropy.units as u
    from astropy.coordinates import get_body

    time = utc(mjd)
    moon, sun = get_body("moon", time), get_body("sun", time)
    d_moon, d_sun = moon.distance.to_value(u.km), sun.distance.to_value(u.km)
    separation = np.pi - _separation(moon, sun)
    moon_parallax = np.arcsin(EARTH_RADIUS_KM / d_moon)
    sun_parallax = np.arcsin(EARTH_RADIUS_KM / d_sun)
    umbra = UMBRA_ENLARGEMENT * moon_parallax + sun_parallax - np.arcsin(SUN_RADIUS_KM / d_sun)
    moon_radius = np.arcsin(MOON_RADIUS_IN_EARTH_RADII * EARTH_RADIUS_KM / d_moon)
    return separation, umbra, moon_radius
