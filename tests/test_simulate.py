"""A simulated VAC: its layout, its sky, and that a seed says everything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from desisky_tune.data import geometry
from desisky_tune.data.darksky import DarkSky, twilight_brightening
from desisky_tune.data.moonlight import (
    MOON_SOLID_ANGLE,
    Moonlight,
    MoonlitRows,
    henyey_greenstein,
    lunar_reflectance,
    path_function,
    phase_angle,
    rayleigh_depth,
    rayleigh_phase,
    solar_spectrum,
)
from desisky_tune.data.observing_plan import night_of
from desisky_tune.data.photometry import magnitudes
from desisky_tune.data.simulate import simulate_vac, vac_wavelength
from desisky_tune.data.simulated_table import simulated_table
from desisky_tune.errors import DataError

#: METADATA as the real file has it.
COLUMNS = [
    "NIGHT",
    "EXPID",
    "TILEID",
    "TILERA",
    "TILEDEC",
    "MJD",
    "EXPTIME",
    "AIRMASS",
    "EBV",
    "SEEING_ETC",
    "TRANSPARENCY_GFA",
    "SEEING_GFA",
    "SKY_MAG_G_SPEC",
    "SKY_MAG_R_SPEC",
    "SKY_MAG_Z_SPEC",
    "MOONFRAC",
    "MOONALT",
    "MOONSEP",
    "SUNALT",
    "SUNSEP",
    "OBSALT",
    "OBSAZ",
]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_vac(tmp_path_factory.mktemp("vac") / "small.fits", exposures=150, seed=7)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = simulate_vac(tmp_path_factory.mktemp("vac") / "full.fits")
    yield path
    path.unlink()  # 274 MiB


def subsets(table: Table) -> dict[str, np.ndarray]:
    """The reference package's cuts, known bad nights excluded."""
    usable = np.nan_to_num(np.ma.filled(table["TRANSPARENCY_GFA"], np.nan)) > 0
    bad_night = (table["NIGHT"] >= 20210604) & (table["NIGHT"] <= 20210612)
    night = usable & ~bad_night
    moon_up, moon_down = table["MOONALT"] > 5, table["MOONALT"] < -5
    near_moon = table["MOONSEP"] <= 90
    bright = table["MOONFRAC"] > 0.5
    cuts = {
        "moon": night & (table["SUNALT"] < -20) & moon_up & bright & near_moon,
        "dark": night & (table["SUNALT"] < -20) & moon_down,
        "twilight": night
        & (table["SUNALT"] > -20)
        & (table["MOONALT"] <= -5)
        & (table["SUNSEP"] <= 110),
    }
    return {name: np.asarray(rows) for name, rows in cuts.items()}


def eclipsed(table: Table) -> np.ndarray:
    middle = np.asarray(table["MJD"]) + np.asarray(table["EXPTIME"]) / 86400 / 2
    return geometry.eclipse_fraction(middle) > 0


def test_layout_is_that_of_the_vac(small: Path) -> None:
    with fits.open(small) as hdus:
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "WAVELENGTH", "FLUX", "METADATA"]
        assert hdus[0].data is None
        wavelength, flux = hdus["WAVELENGTH"], hdus["FLUX"]
        assert (wavelength.header["BITPIX"], flux.header["BITPIX"]) == (-64, -32)
        assert flux.shape == (150, 7781)
        np.testing.assert_allclose(wavelength.data, np.linspace(3600, 9824, 7781), atol=1e-9)
        assert flux.header["BUNIT"] == "1e-17 erg/s/cm2/A/arcsec2"
        metadata = hdus["METADATA"]
        assert metadata.columns.names == COLUMNS
        formats = dict(zip(COLUMNS, metadata.columns.formats, strict=True))
        assert {name for name in COLUMNS if formats[name] == "J"} == {"NIGHT", "EXPID", "TILEID"}
        assert not any("DATE" in hdu.header for hdu in hdus)


def test_units_are_read_by_astropy(small: Path) -> None:
    table = Table.read(small, hdu="METADATA")
    assert table["TILERA"].unit == "deg"
    assert table["EXPTIME"].unit == "s"
    assert table["SKY_MAG_G_SPEC"].unit == "mag / arcsec2"


def test_rows_are_plausible_exposures(small: Path) -> None:
    table = Table.read(small, hdu="METADATA")
    assert (np.diff(table["EXPID"]) > 0).all()
    assert (np.diff(table["MJD"]) > 0).all()
    np.testing.assert_array_equal(table["NIGHT"], night_of(np.asarray(table["MJD"])))
    assert (table["AIRMASS"] < 2).all()
    assert (table["SUNALT"] < -12).all()
    np.testing.assert_allclose(
        table["AIRMASS"], 1 / np.cos(np.radians(90 - np.asarray(table["OBSALT"]))), rtol=1e-9
    )
    middle = np.asarray(table["MJD"]) + np.asarray(table["EXPTIME"]) / 86400 / 2
    again = geometry.observing_geometry(middle, table["TILERA"], table["TILEDEC"])
    for name, values in again.items():
        np.testing.assert_allclose(table[name], values, atol=1e-8)


def test_nights_turn_at_local_noon() -> None:
    # 19 h UTC is noon at Kitt Peak: 2021-11-19 18:59 still belongs to the evening before.
    day = 59537.0
    before, after = day + 19 / 24 - 1e-3, day + 19 / 24 + 1e-3
    np.testing.assert_array_equal(night_of(np.array([before, after])), [20211118, 20211119])


def test_flux_is_positive_and_its_last_pixel_zero(small: Path) -> None:
    flux = fits.getdata(small, "FLUX")
    assert (flux[:, -1] == 0).all()
    assert (flux[:, :-1] > 0).all()
    assert np.isfinite(flux).all()


def test_tabulated_magnitudes_are_those_of_the_flux_with_a_little_scatter(small: Path) -> None:
    table = Table.read(small, hdu="METADATA")
    from_flux = magnitudes(fits.getdata(small, "FLUX"), vac_wavelength(), ("g", "r", "z"))
    for column, band in enumerate("GRZ"):
        difference = np.asarray(table[f"SKY_MAG_{band}_SPEC"]) - from_flux[:, column]
        assert 0.01 < np.std(difference) < 0.02
        assert abs(np.mean(difference)) < 0.005


@pytest.mark.parametrize("exposures", [20, 150])
def test_a_small_file_has_rows_of_every_kind(exposures: int, small: Path, tmp_path: Path) -> None:
    path = small
    if exposures != 150:
        path = simulate_vac(tmp_path / "tiny.fits", exposures=exposures, seed=1)
    table = Table.read(path, hdu="METADATA")
    assert len(table) == exposures
    cuts = subsets(table)
    assert all(rows.any() for rows in cuts.values()), {k: v.sum() for k, v in cuts.items()}
    assert (cuts["moon"] & eclipsed(table)).sum() >= 3


def test_the_same_seed_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    again = simulate_vac(tmp_path / "again.fits", exposures=150, seed=7)
    other = simulate_vac(tmp_path / "other.fits", exposures=150, seed=8)
    assert digest(again) == digest(small)
    assert digest(other) != digest(small)


def test_progress_is_told_and_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if done > 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_vac(tmp_path / "vac.fits", exposures=150, progress=stop)
    assert told == [(64, 150), (128, 150)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("exposures", "seed", "message"),
    [(5, 0, "at least 20"), (10**6, 0, "at most"), (50, -1, "seed is -1")],
)
def test_impossible_orders_are_refused(
    tmp_path: Path, exposures: int, seed: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        simulate_vac(tmp_path / "vac.fits", exposures=exposures, seed=seed)
    assert list(tmp_path.iterdir()) == []


def test_full_size_file_resembles_the_real_vac(full: Path) -> None:
    table = Table.read(full, hdu="METADATA")
    assert len(table) == 9176
    cuts = subsets(table)
    # Real counts: 1931, 3364, 298; about 16 % of the transparencies unusable.
    assert 1931 <= cuts["moon"].sum() < 2150
    assert cuts["dark"].sum() == pytest.approx(3364, rel=0.08)
    assert cuts["twilight"].sum() == pytest.approx(298, rel=0.2)
    transparency = np.ma.filled(table["TRANSPARENCY_GFA"], np.nan)
    assert np.mean(~(np.nan_to_num(transparency) > 0)) == pytest.approx(0.16, abs=0.02)
    assert (transparency == 0).any()
    assert (transparency < 0).any()
    assert np.isnan(transparency).any()
    assert 5 <= (cuts["moon"] & eclipsed(table)).sum() <= 30

    rows = np.flatnonzero(cuts["moon"])[:1931]
    with fits.open(full, memmap=True) as hdus:
        v = magnitudes(hdus["FLUX"].data[rows], vac_wavelength(), ("V",))[:, 0]
    bands = [v, *(np.asarray(table[f"SKY_MAG_{band}_SPEC"])[rows] for band in "GRZ")]
    np.testing.assert_allclose(np.median(bands, axis=1), [19.44, 19.41, 19.51, 18.90], atol=0.15)
    np.testing.assert_allclose(np.std(bands, axis=1), [0.70, 0.74, 0.70, 0.48], atol=0.15)

    moon = table[rows]
    assert np.median(moon["MOONSEP"]) == pytest.approx(54.9, abs=4)
    assert np.median(moon["OBSALT"]) == pytest.approx(61.7, abs=4)
    assert moon["MOONSEP"].min() > 31
    assert moon["OBSALT"].min() > 30.5


def test_the_dark_zenith_has_its_known_magnitudes() -> None:
    one = np.ones(1)
    flux = DarkSky(vac_wavelength()).spectra(90 * one, -40 * one, one, one)
    expected = [21.70, 22.25, 21.47, 19.59]
    np.testing.assert_allclose(magnitudes(flux, vac_wavelength())[0], expected, atol=0.03)


def test_twilight_fades_as_the_sun_sinks() -> None:
    altitude = np.linspace(-20, -9, 200)
    brightening = twilight_brightening(altitude)
    assert (brightening[altitude <= -18] == 0).all()
    assert (np.diff(brightening[altitude > -17.9]) > 0).all()
    assert brightening[-1] == pytest.approx(6.132725)  # the polynomial's constant, at -9 deg


def test_phase_functions_have_mean_one_over_the_sphere() -> None:
    angle = (np.arange(20000) + 0.5) * 180 / 20000
    weight = 0.5 * np.sin(np.radians(angle)) * np.pi / 20000
    for phase in (
        rayleigh_phase(angle),
        henyey_greenstein(angle, 0.70),
        henyey_greenstein(angle, 0.26),
    ):
        assert (phase * weight).sum() == pytest.approx(1.0, abs=1e-5)


def test_path_function_is_the_integral_over_the_line_of_sight() -> None:
    # Light enters at depth t along Xm, is scattered, and leaves along X.
    for depth, x_moon, x in ((0.15, 1.1, 1.6), (0.4, 3.0, 1.0), (0.05, 1.2, 1.2)):
        t = (np.arange(20000) + 0.5) * depth / 20000
        along = np.exp(-t * x_moon) * np.exp(-(depth - t) * x) * x
        assert float(path_function(depth, x_moon, x)) == pytest.approx(along.mean(), rel=1e-7)
    near = float(path_function(0.2, 1.3, 1.3 + 1e-9))
    assert near == pytest.approx(1.3 * np.exp(-0.2 * 1.3), rel=1e-7)


def test_rayleigh_depth_is_the_standard_atmospheres() -> None:
    # At sea level and 5500 A the air's optical depth is 0.097 (Hansen & Travis 1974).
    assert float(rayleigh_depth(5500.0)) * 1013.25 / 790 == pytest.approx(0.097, abs=0.001)


def test_the_full_moon_is_as_bright_as_it_is() -> None:
    # V = -12.74 at full (Allen 1976); the half Moon at 90 deg is about -10.2.
    wavelength = vac_wavelength()
    sunlight = solar_spectrum(wavelength)
    moon = sunlight * lunar_reflectance([0.9985, 0.5], wavelength) * MOON_SOLID_ANGLE / np.pi
    v = magnitudes(moon * 1e17, wavelength, ("V",))[:, 0]
    assert v[0] == pytest.approx(-12.74, abs=0.25)
    assert v[1] == pytest.approx(-10.2, abs=0.3)
    np.testing.assert_allclose(phase_angle([1.0, 0.5, 0.0]), [0, 90, 180], atol=1e-6)


def moonlit(**changes: float) -> np.ndarray:
    """One spectrum of moonlight at a common place in the sky."""
    usual = {
        "moon_fraction": 0.8,
        "moon_altitude": 40.0,
        "moon_separation": 60.0,
        "moon_distance": 384400.0,
        "altitude": 60.0,
        "transparency": 1.0,
        "aerosol_depth": 0.06,
        "eclipse_fraction": 0.0,
    }
    rows = MoonlitRows(**{name: np.array([value]) for name, value in (usual | changes).items()})
    return Moonlight(vac_wavelength()).spectra(rows)[0]


def test_moonlight_follows_the_moon() -> None:
    usual = moonlit()
    assert (moonlit(moon_altitude=-1.0) == 0).all()
    np.testing.assert_allclose(moonlit(eclipse_fraction=1.0), 1e-4 * usual)
    np.testing.assert_allclose(moonlit(eclipse_fraction=0.5), 0.50005 * usual)
    np.testing.assert_allclose(moonlit(moon_distance=2 * 384400.0), usual / 4)
    assert (moonlit(moon_fraction=0.99) > usual).all()
    assert (moonlit(moon_separation=35.0) > usual).all()
    assert (moonlit(transparency=0.6) > usual).all()
    np.testing.assert_array_equal(moonlit(transparency=1.1), usual)


def test_the_table_is_what_the_file_holds(small: Path, tmp_path: Path) -> None:
    with fits.open(small) as file:
        wavelength, flux = file["WAVELENGTH"].data, file["FLUX"].data
        metadata = Table(file["METADATA"].data)
    rows = subsets(metadata)["moon"]
    table = simulated_table(150, 7, "moon", cache_dir=tmp_path)
    assert len(table) == rows.sum() > 20
    for name in COLUMNS:
        np.testing.assert_array_equal(table[name], metadata[name][rows], err_msg=name)
    expected = magnitudes(flux[rows], wavelength, ("V",))[:, 0]
    np.testing.assert_allclose(table["SKY_MAG_V_SPEC"], expected, atol=1e-12)
    again = simulated_table(150, 7, "moon", cache_dir=tmp_path)
    assert again.equals(table)
    assert len(list(tmp_path.iterdir())) == 1
