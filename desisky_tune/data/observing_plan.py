"""Which exposures a season would have brought: real nights, sensible pointings.

A plan is drawn from the nights of DESI's first data release. Every night is cut into
exposures from dusk to dawn; each points where a telescope would point (airmass < 2,
mostly near the meridian, off the galactic plane, not too close to the Moon); then as
many exposures of each kind are kept as the real catalogue holds. The Moon and the Sun
are interpolated here, to 0.3 deg; the catalogue's columns are computed by
`desisky_tune.data.geometry` once the plan stands.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from desisky_tune.data import geometry
from desisky_tune.errors import DataError

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

#: First and last night of DESI's first data release, as MJD of the evening's local date.
FIRST_NIGHT, LAST_NIGHT = 59197, 59743  # 2020-12-14 to 2022-06-13
#: Summer shutdown of 2021 (monsoon): 2021-07-10 to 2021-09-14.
SHUTDOWN = (59405, 59471)
#: Nights with a lunar eclipse over Kitt Peak: 2021-05-25, 2021-11-18, 2022-05-15.
ECLIPSE_NIGHTS: tuple[int, ...] = (59359, 59536, 59714)

#: Share of the real catalogue's 9,176 rows: its subsets (1,931, 3,364 and 298 rows with a
#: usable transparency, which 84 % have) and a handful of eclipsed exposures. The Moon's
#: share is rounded up, so that the real number of moonlit rows exists.
SHARES: dict[str, float] = {
    "eclipsed": 0.0014,
    "moon": 0.2600,
    "dark": 0.4360,
    "twilight": 0.0390,
}
#: So many exposures of each kind are kept however small the plan is.
LEAST_OF_A_KIND = 3
#: The smallest plan in which every subset has a few rows.
MINIMUM_EXPOSURES = 20

EXPOSURES_PER_NIGHT = 24.0
FEWEST_NIGHTS, MOST_NIGHTS = 36, 420
DUSK_SUN_ALTITUDE = -13.0
OVERHEAD_S = 120.0
LOWEST_ALTITUDE = 30.9
CLOSEST_TO_MOON = 32.0
#: Distance from the Moon (deg) that moonlit pointings prefer, and how loosely. The real
#: moonlit rows lie at 31.5 to 90 deg, with a median of 54.9.
MOON_SEPARATION, MOON_SCATTER = 53.0, 18.0
#: Above this illuminated fraction fewer and fewer exposures are kept: nights around full
#: Moon go to engineering, and the real catalogue's moonlit magnitudes want it so.
BRIGHT_MOON, BRIGHT_MOON_SCALE = 0.89, 0.05
_SLOTS = 60
_CANDIDATES = 48
#: Local civil midnight at Kitt Peak (UTC-7) lies 7 h after 0 h UTC.
_MIDNIGHT = 7.0 / 24.0


@dataclass(frozen=True)
class ObservingPlan:
    """Exposures in order of time; each field has shape ``(n,)``.

    `mjd` is UTC at the start of the exposure (days), `exptime` s, `ra` and `dec` ICRS
    (deg), `night` the local date of the evening as YYYYMMDD, `night_index` the same date
    as an MJD.
    """

    mjd: Array
    exptime: Array
    ra: Array
    dec: Array
    night: Integers
    night_index: Integers

    def __len__(self) -> int:
        return len(self.mjd)

    @property
    def middle(self) -> Array:
        """UTC at mid-exposure (MJD)."""
        return self.mjd + 0.5 * self.exptime / 86400.0

    def take(self, rows: Integers) -> ObservingPlan:
        """Return the plan of some rows, in the order given."""
        return ObservingPlan(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def plan_exposures(exposures: int, rng: np.random.Generator) -> ObservingPlan:
    """Draw a plan of `exposures` exposures from a random generator.

    Raises
    ------
    DataError
        When fewer than 20 exposures, or more than the season's nights hold, are wanted.
    """
    if exposures < MINIMUM_EXPOSURES:
        raise DataError(
            f"exposures is {exposures}: a simulated season needs at least {MINIMUM_EXPOSURES}"
        )
    nights = _choose_nights(exposures, rng)
    sky = _Ephemeris(nights)
    everything, kinds, weights = _all_exposures(nights, sky, rng)
    if exposures > len(everything):
        raise DataError(
            f"exposures is {exposures}: the season's nights hold {len(everything)} at most"
        )
    return everything.take(_keep(kinds, weights, exposures, rng))


def night_of(mjd: Array) -> Integers:
    """Return the night (YYYYMMDD) of UTC times: the local date at the noon before."""
    days = np.floor(np.asarray(mjd) - _MIDNIGHT - 0.5).astype(np.int64)
    dates = np.datetime64("1858-11-17", "D") + days.astype("timedelta64[D]")
    years = dates.astype("datetime64[Y]").astype(np.int64) + 1970
    months = dates.astype("datetime64[M]").astype(np.int64) % 12 + 1
    day = (dates - dates.astype("datetime64[M]")).astype(np.int64) + 1
    return years * 10000 + months * 100 + day


def _choose_nights(exposures: int, rng: np.random.Generator) -> Integers:
    season = np.arange(FIRST_NIGHT, LAST_NIGHT + 1)
    season = season[(season < SHUTDOWN[0]) | (season > SHUTDOWN[1])]
    eclipses = np.asarray(ECLIPSE_NIGHTS)
    others = np.setdiff1d(season, eclipses)
    count = int(np.clip(np.ceil(exposures / EXPOSURES_PER_NIGHT), FEWEST_NIGHTS, MOST_NIGHTS))
    # One night of each stretch of the season: all phases of the Moon occur in a small plan.
    stretches = np.array_split(others, count - eclipses.size)
    drawn = [rng.choice(stretch) for stretch in stretches]
    return np.sort(np.concatenate([eclipses, drawn])).astype(np.int64)


def _all_exposures(
    nights: Integers, sky: _Ephemeris, rng: np.random.Generator
) -> tuple[ObservingPlan, NDArray[np.str_], Array]:
    """Fill the nights with exposures; return their kinds and relative weights, too."""
    shape = (nights.size, _SLOTS)
    exptime = np.round(np.clip(rng.lognormal(np.log(620.0), 0.45, shape), 120.0, 1800.0), 3)
    offset = np.cumsum(exptime + OVERHEAD_S, axis=1) - exptime
    dusk = sky.dusk(nights, DUSK_SUN_ALTITUDE)[:, np.newaxis]
    start = dusk + offset / 86400.0
    middle = start + 0.5 * exptime / 86400.0
    dark_enough = (sky.sun(middle)[2] < DUSK_SUN_ALTITUDE) & (middle < nights[:, np.newaxis] + 1.7)
    start, exptime, middle = start[dark_enough], exptime[dark_enough], middle[dark_enough]
    row_night = np.broadcast_to(nights[:, np.newaxis], shape)[dark_enough]

    ra, dec, moon_separation, sun_separation, found = _point(middle, sky, rng)
    eclipse = geometry.eclipse_fraction(middle)
    moon_altitude, sun_altitude = sky.moon(middle)[2], sky.sun(middle)[2]
    moonlit = (
        (sun_altitude < -20.3)
        & (moon_altitude > 5.3)
        & (sky.illumination(middle) > 0.502)
        & (moon_separation <= 89.5)
    )
    kinds = np.full(middle.size, "other", dtype="<U8")
    kinds[moonlit] = "moon"
    kinds[moonlit & (eclipse > 0)] = "eclipsed"
    kinds[(sun_altitude < -20.3) & (moon_altitude < -5.3)] = "dark"
    twilight = (sun_altitude > -19.7) & (moon_altitude <= -5.3) & (sun_separation <= 109.5)
    kinds[twilight] = "twilight"

    keep = np.flatnonzero(found)
    keep = keep[np.argsort(start[keep], kind="stable")]
    plan = ObservingPlan(
        mjd=start[keep],
        exptime=exptime[keep],
        ra=ra[keep],
        dec=dec[keep],
        night=night_of(start[keep]),
        night_index=row_night[keep],
    )
    excess = np.maximum(sky.illumination(middle) - BRIGHT_MOON, 0.0)
    weights = np.where(moon_altitude > 0, np.exp(-excess / BRIGHT_MOON_SCALE), 1.0)
    return plan, kinds[keep], weights[keep]


def _point(
    mjd: Array, sky: _Ephemeris, rng: np.random.Generator
) -> tuple[Array, Array, Array, Array, NDArray[np.bool_]]:
    """Choose where each exposure points.

    Of 48 directions near the meridian one is drawn: rather high than low, and clear
    of the Moon when it is up, but no farther from it than the season's tiles allow.
    """
    shape = (mjd.size, _CANDIDATES)
    latitude = np.radians(geometry.MAYALL_LATITUDE)
    hour_angle = np.clip(rng.normal(0.0, 25.0, shape), -65.0, 65.0)
    sin_dec = rng.uniform(np.sin(np.radians(-20.0)), np.sin(np.radians(80.0)), shape)
    ra = (sky.sidereal(mjd)[:, np.newaxis] - hour_angle) % 360.0
    dec = np.degrees(np.arcsin(sin_dec))
    altitude = np.degrees(
        np.arcsin(
            np.sin(latitude) * sin_dec
            + np.cos(latitude) * np.sqrt(1 - sin_dec**2) * np.cos(np.radians(hour_angle))
        )
    )
    direction = _unit(ra, dec)
    moon_ra, moon_dec, moon_altitude = sky.moon(mjd)
    sun_ra, sun_dec, sun_altitude = sky.sun(mjd)
    from_moon = _angle(direction, _unit(moon_ra, moon_dec)[:, :, np.newaxis])
    from_sun = _angle(direction, _unit(sun_ra, sun_dec)[:, :, np.newaxis])
    moon_up = (moon_altitude > 0)[:, np.newaxis]
    galactic = np.abs(_galactic_latitude(direction))

    preference = -0.5 * np.square((90.0 - altitude) / 45.0)
    preference -= np.where(
        moon_up, 0.5 * np.square((from_moon - MOON_SEPARATION) / MOON_SCATTER), 0.0
    )
    preference -= np.where((sun_altitude > -20.0)[:, np.newaxis], from_sun / 40.0, 0.0)
    allowed = (altitude > LOWEST_ALTITUDE + 0.5) & (galactic > 15.0)
    allowed &= ~moon_up | (from_moon > CLOSEST_TO_MOON)
    # Adding Gumbel noise to log-weights and taking the largest draws by weight.
    score = np.where(allowed, preference + rng.gumbel(size=shape), -np.inf)
    best = np.argmax(score, axis=1)
    rows = np.arange(mjd.size)
    return (
        np.round(ra[rows, best], 3),
        np.round(dec[rows, best], 3),
        from_moon[rows, best],
        from_sun[rows, best],
        allowed.any(axis=1),
    )


def _keep(
    kinds: NDArray[np.str_], weights: Array, exposures: int, rng: np.random.Generator
) -> Integers:
    """Choose rows so that each kind has its share; what one kind lacks others make up."""

    def draw(rows: Integers, count: int) -> Integers:
        chance = weights[rows] / weights[rows].sum()
        return rng.choice(rows, count, replace=False, p=chance)

    kept: list[Integers] = []
    for kind, share in SHARES.items():
        rows = np.flatnonzero(kinds == kind)
        wanted = min(rows.size, max(LEAST_OF_A_KIND, round(share * exposures)))
        kept.append(draw(rows, wanted))
    chosen = np.concatenate(kept)
    rest = np.setdiff1d(np.flatnonzero(kinds == "other"), chosen)
    missing = exposures - chosen.size
    if missing > rest.size:
        surplus = np.setdiff1d(np.arange(kinds.size), np.concatenate([chosen, rest]))
        rest = np.concatenate([rest, draw(surplus, missing - rest.size)])
    chosen = np.concatenate([chosen, draw(rest, missing)])
    return np.sort(chosen)


class _Ephemeris:
    """Moon, Sun and sidereal time over Kitt Peak, interpolated over some nights.

    Angles in deg, of date minus precession (below 0.3 deg): good for planning only.
    """

    def __init__(self, nights: Integers) -> None:
        # Positions every 3 h from 17 h to 8 h local time: 0 h UTC falls in the evening.
        self._nights = nights
        self._step = 0.125
        knots = nights[:, np.newaxis] + 1.0 + np.arange(6) * self._step
        moon, sun, fraction = _equatorial(knots.ravel())
        self._knots = knots
        self._moon = moon.reshape(3, *knots.shape)
        self._sun = sun.reshape(3, *knots.shape)
        self._fraction = fraction.reshape(knots.shape)

    def sidereal(self, mjd: Array) -> Array:
        """Local mean sidereal time (Meeus 1998, eq. 12.4), deg."""
        days = mjd - 51544.5
        angle: Array = (280.46061837 + 360.98564736629 * days + geometry.MAYALL_LONGITUDE) % 360.0
        return angle

    def moon(self, mjd: Array) -> tuple[Array, Array, Array]:
        """RA, Dec and altitude of the Moon."""
        return self._position(self._moon, mjd)

    def sun(self, mjd: Array) -> tuple[Array, Array, Array]:
        """RA, Dec and altitude of the Sun."""
        return self._position(self._sun, mjd)

    def illumination(self, mjd: Array) -> Array:
        """Illuminated fraction of the Moon."""
        return self._interpolate(self._fraction[np.newaxis], mjd)[0]

    def dusk(self, nights: Integers, sun_altitude: float) -> Array:
        """MJD at which the Sun sinks to an altitude in the evening, by bisection."""
        early: Array = nights.astype(np.float64) + 1.0
        late: Array = early + _MIDNIGHT
        for _ in range(24):
            middle = 0.5 * (early + late)
            above = self.sun(middle)[2] > sun_altitude
            early, late = np.where(above, middle, early), np.where(above, late, middle)
        return late

    def _position(self, vectors: Array, mjd: Array) -> tuple[Array, Array, Array]:
        x, y, z = self._interpolate(vectors, mjd)
        ra = np.degrees(np.arctan2(y, x)) % 360.0
        dec = np.degrees(np.arctan2(z, np.hypot(x, y)))
        hour_angle = np.radians(self.sidereal(mjd) - ra)
        latitude = np.radians(geometry.MAYALL_LATITUDE)
        sine = np.sin(latitude) * np.sin(np.radians(dec))
        sine += np.cos(latitude) * np.cos(np.radians(dec)) * np.cos(hour_angle)
        return ra, dec, np.degrees(np.arcsin(np.clip(sine, -1.0, 1.0)))

    def _interpolate(self, values: Array, mjd: Array) -> Array:
        """Interpolate with the parabola through the three knots around each time."""
        night = np.clip(np.searchsorted(self._nights + 1.0, mjd, side="right") - 1, 0, None)
        place = (mjd - self._nights[night] - 1.0) / self._step
        centre = np.clip(np.rint(place).astype(np.int64), 1, self._knots.shape[1] - 2)
        u = place - centre
        before, here, after = (values[:, night, centre + shift] for shift in (-1, 0, 1))
        return here + 0.5 * u * (after - before) + 0.5 * u**2 * (after - 2 * here + before)


def _equatorial(mjd: Array) -> tuple[Array, Array, Array]:
    """Topocentric unit vectors (3, n) of Moon and Sun, and the illuminated fraction."""
    from astropy.coordinates import get_body

    time, site = geometry.utc(mjd), geometry.mayall()
    moon, sun = get_body("moon", time, site), get_body("sun", time, site)
    to_moon, to_sun = _unit(moon.ra.deg, moon.dec.deg), _unit(sun.ra.deg, sun.dec.deg)
    fraction = geometry.illuminated_fraction(
        np.radians(_angle(to_moon, to_sun)),
        moon.distance.to_value("km"),
        sun.distance.to_value("km"),
    )
    return to_moon, to_sun, fraction


def _unit(ra: Array, dec: Array) -> Array:
    ra, dec = np.radians(ra), np.radians(dec)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])


def _angle(a: Array, b: Array) -> Array:
    return np.degrees(np.arccos(np.clip((a * b).sum(axis=0), -1.0, 1.0)))


def _galactic_latitude(direction: Array) -> Array:
    """Galactic latitude (deg) of ICRS unit vectors; the pole is at 192.85948, 27.12825 deg."""
    pole = _unit(np.asarray(192.85948), np.asarray(27.12825))
    return np.degrees(np.arcsin(np.clip(np.tensordot(pole, direction, axes=(0, 0)), -1.0, 1.0)))
