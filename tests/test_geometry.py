"""Moon, Sun and eclipses against published values and independent computations."""

from __future__ import annotations

import socket
import warnings
from importlib import resources

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar

from desisky_tune.data.geometry import (
    GEOMETRY_COLUMNS,
    MAYALL_LATITUDE,
    MAYALL_LONGITUDE,
    configure_offline_iers,
    disc_overlap,
    eclipse_fraction,
    galactic_ecliptic,
    illuminated_fraction,
    observing_geometry,
    umbral_magnitude,
)

SECOND = 1.0 / 86400.0

#: Published umbral magnitude and contacts (UTC): first and last contact, and the beginning
#: and end of totality where the eclipse is total.
ECLIPSES = {
    "2019-01-21": (1.1953, ("03:33:54", "04:41:17", "05:43:16", "06:50:39")),
    "2021-05-26": (1.0095, ("09:44:58", "11:11:25", "11:25:55", "12:52:22")),
    "2021-11-19": (0.9742, ("07:18:41", None, None, "10:47:04")),
    "2022-05-16": (1.4137, ("02:27:53", "03:29:03", "04:53:56", "05:55:07")),
    "2022-11-08": (1.3589, ("09:09:12", "10:16:39", "11:41:37", "12:49:03")),
}


def utc(date: str, clock: str) -> float:
    """MJD of a UTC instant, without astropy."""
    since = np.datetime64(f"{date}T{clock}") - np.datetime64("1858-11-17T00:00:00")
    return float(since / np.timedelta64(1, "s")) * SECOND


def magnitude_at(mjd: float) -> float:
    return float(umbral_magnitude(mjd)[0])


@pytest.mark.parametrize("date", ECLIPSES)
def test_eclipses_agree_with_the_published_contacts_and_magnitudes(date: str) -> None:
    magnitude, contacts = ECLIPSES[date]
    for clock, level in zip(contacts, (0.0, 1.0, 1.0, 0.0), strict=True):
        if clock is None:
            continue
        published = utc(date, clock)
        bracket = (published - 120 * SECOND, published + 120 * SECOND)
        found = brentq(lambda mjd, level=level: magnitude_at(mjd) - level, *bracket, xtol=SECOND)
        assert abs(found - published) < 30 * SECOND
    first, last = utc(date, contacts[0]), utc(date, contacts[3])
    greatest = minimize_scalar(
        lambda mjd: -magnitude_at(mjd), bounds=(first, last), options={"xatol": SECOND}
    )
    assert -greatest.fun == pytest.approx(magnitude, abs=0.002)


@pytest.mark.parametrize(
    ("date", "clock"), [("2021-05-26", "11:18:40"), ("2021-11-19", "09:02:55")]
)
def test_greatest_eclipse_falls_at_the_published_time(date: str, clock: str) -> None:
    published = utc(date, clock)
    before, after = magnitude_at(published - 0.02), magnitude_at(published + 0.02)
    assert magnitude_at(published) > max(before, after)
    # Equal heights on both sides put the maximum of a parabola in the middle.
    curvature = before + after - 2 * magnitude_at(published)
    assert abs(0.5 * 0.02 * (before - after) / curvature) < 30 * SECOND


def test_a_partial_eclipse_covers_what_its_circles_say() -> None:
    middle = eclipse_fraction([utc("2021-11-19", "09:02:55")])[0]
    late = eclipse_fraction([utc("2021-11-19", "10:40:00")])[0]
    assert middle == pytest.approx(0.99, abs=0.005)
    assert 0 < late < 0.05


def test_totality_is_a_fraction_of_one() -> None:
    assert eclipse_fraction([utc("2022-05-16", "04:11:00")])[0] == 1.0


def test_the_quick_cut_loses_no_eclipse() -> None:
    hours = np.arange(utc("2021-04-01", "00:00:00"), utc("2022-12-01", "00:00:00"), 1.5 / 24)
    fraction = eclipse_fraction(hours)
    np.testing.assert_array_equal(fraction > 0, umbral_magnitude(hours) > 0)
    eclipsed_days = {str(np.datetime64("1858-11-17") + int(day)) for day in hours[fraction > 0]}
    assert eclipsed_days == set(ECLIPSES) - {"2019-01-21"}


def test_an_unknown_time_has_an_unknown_eclipse_fraction() -> None:
    np.testing.assert_array_equal(eclipse_fraction([np.nan, 59300.0]), [np.nan, 0.0])


@settings(max_examples=30, deadline=None)
@given(
    d=st.floats(0.0, 3.0),
    a=st.floats(0.05, 2.0),
    b=st.floats(0.05, 2.0),
)
def test_overlap_of_two_discs_is_the_integral_of_their_common_chord(
    d: float, a: float, b: float
) -> None:
    low, high = max(-a, d - b), min(a, d + b)
    expected = 0.0
    if high > low:
        # The substitution x = m - h cos(t) removes the square roots' infinite slopes.
        t = (np.arange(20000) + 0.5) * np.pi / 20000
        half = 0.5 * (high - low)
        x = 0.5 * (high + low) - half * np.cos(t)
        heights = np.minimum(
            np.sqrt(np.maximum(a**2 - x**2, 0)), np.sqrt(np.maximum(b**2 - (x - d) ** 2, 0))
        )
        expected = float((2 * heights * half * np.sin(t)).sum() * np.pi / 20000)
    assert float(disc_overlap(d, a, b)) == pytest.approx(expected, abs=2e-6)


@settings(max_examples=20, deadline=None)
@given(d=st.floats(0.0, 3.0), a=st.floats(0.05, 2.0), b=st.floats(0.05, 2.0))
def test_overlap_is_symmetric_and_never_beyond_the_smaller_disc(
    d: float, a: float, b: float
) -> None:
    area = float(disc_overlap(d, a, b))
    assert area == pytest.approx(float(disc_overlap(d, b, a)), abs=1e-9)
    assert 0 <= area <= np.pi * min(a, b) ** 2 * (1 + 1e-9)


def test_illuminated_fraction_of_meeus_worked_example() -> None:
    # Meeus 1998, example 48.a: 1992 April 12, 0h TD.
    elongation = np.radians(110.7929)
    assert illuminated_fraction(elongation, 368410.0, 149971520.0) == pytest.approx(
        0.6786, abs=2e-4
    )


def test_geometry_of_the_sv1_table_at_mid_exposure() -> None:
    path = resources.files("desisky_tune.data.sample") / "desi-sv1-exposures.csv"
    with resources.as_file(path) as csv:
        table = pd.read_csv(csv).iloc[::12]
    geometry = observing_geometry(
        table["MJD"] + 0.5 * table["EXPTIME"] / 86400.0, table["TILERA"], table["TILEDEC"]
    )
    for name in GEOMETRY_COLUMNS:
        difference = np.abs(geometry[name] - table[name])
        if name == "OBSAZ":  # an azimuth near the zenith: as an arc on the sky
            difference = np.minimum(difference, 360 - difference) * np.cos(
                np.radians(table["OBSALT"])
            )
        assert difference.max() < 2e-5, name


def test_at_the_zenith_a_separation_is_the_complement_of_an_altitude() -> None:
    mjd = np.array([59300.3, 59450.25])
    sidereal = (280.46061837 + 360.98564736629 * (mjd - 51544.5) + MAYALL_LONGITUDE) % 360
    geometry = observing_geometry(mjd, sidereal, np.full(2, MAYALL_LATITUDE))
    # Precession since J2000 keeps the pointing within 0.4 deg of the zenith.
    np.testing.assert_allclose(geometry["OBSALT"], 90, atol=0.4)
    np.testing.assert_allclose(geometry["MOONSEP"], 90 - geometry["MOONALT"], atol=0.4)
    np.testing.assert_allclose(geometry["SUNSEP"], 90 - geometry["SUNALT"], atol=0.4)


def test_rows_without_a_position_have_no_geometry() -> None:
    geometry = observing_geometry([59300.3, np.nan], [10.0, 10.0], [20.0, 20.0])
    for name, values in geometry.items():
        assert np.isfinite(values[0]), name
        assert np.isnan(values[1]), name


def test_the_moons_distance_stays_between_its_extremes() -> None:
    # Geocentric 356,400 to 406,700 km; the telescope is at most an Earth radius off.
    mjd = 59300.0 + np.arange(0, 60, 2.5)
    distance = observing_geometry(mjd, 0 * mjd, 0 * mjd, moon_distance=True)["MOONDIST"]
    assert (distance > 356400 - 6400).all()
    assert (distance < 406700 + 6400).all()


def test_dates_beyond_the_tables_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from astropy.utils import iers

    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("geometry asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    configure_offline_iers()
    assert iers.conf.auto_download is False
    assert iers.conf.auto_max_age is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # astropy says that 2050 is less accurate
        geometry = observing_geometry([70000.0], [10.0], [20.0])
    assert np.isfinite(geometry["OBSALT"]).all()


def test_galactic_and_ecliptic_poles() -> None:
    # IAU 1958 pole and centre in J2000; obliquity 23.4392911 deg.
    sky = galactic_ecliptic(
        [192.85948, 266.40510, 90.0, np.nan], [27.12825, -28.936175, 23.4392911, 0]
    )
    assert sky["GALLAT"][0] == pytest.approx(90, abs=1e-3)
    assert sky["GALLAT"][1] == pytest.approx(0, abs=1e-3)
    assert min(sky["GALLON"][1], 360 - sky["GALLON"][1]) < 1e-3
    assert sky["ECLLON"][2] == pytest.approx(90, abs=1e-3)
    assert sky["ECLLAT"][2] == pytest.approx(0, abs=1e-3)
    assert all(np.isnan(values[3]) for values in sky.values())
