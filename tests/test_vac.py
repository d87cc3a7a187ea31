"""The catalogue: rows stay aligned, columns are added, and damaged files are refused."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from builders import (
    COARSE_WAVELENGTH,
    catalogue_metadata,
    marked_flux,
    place_catalogue,
    write_catalogue,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_subsets import QUERIES

from desisky_tune.data import SkySpecVAC, SpectraFile
from desisky_tune.data import vac as vac_module
from desisky_tune.data.vac import RELEASES, Release
from desisky_tune.errors import DataError, DownloadError, InputError, MissingFileError

LOADERS = {
    "moon": "load_moon_contaminated",
    "dark": "load_dark_time",
    "twilight": "load_sun_contaminated",
    "all": "load",
}


@pytest.fixture
def metadata() -> pd.DataFrame:
    return catalogue_metadata(400)


@pytest.fixture
def root(tmp_path: Path, metadata: pd.DataFrame) -> Path:
    place_catalogue(tmp_path, metadata)
    return tmp_path


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 9999), subset=st.sampled_from(sorted(LOADERS)), bad=st.booleans())
def test_every_spectrum_stays_with_its_metadata(
    tmp_path: Path, seed: int, subset: str, bad: bool
) -> None:
    metadata = catalogue_metadata(120, seed=seed)
    place_catalogue(tmp_path, metadata)
    catalogue = SkySpecVAC(tmp_path, exclude_known_bad=bad)
    _, flux, kept = getattr(catalogue, LOADERS[subset])()
    np.testing.assert_array_equal(flux[:, 0], kept["EXPID"])
    assert kept.index.equals(pd.RangeIndex(len(flux)))
    expected = metadata if subset == "all" else metadata.query(QUERIES[subset])
    if bad:
        expected = expected.query("NIGHT < 20210604 or NIGHT > 20210612")
    pd.testing.assert_frame_equal(
        kept[metadata.columns], expected.reset_index(drop=True), check_dtype=False
    )


def test_the_whole_catalogue_comes_with_its_own_columns_and_ours(
    root: Path, metadata: pd.DataFrame
) -> None:
    wavelength, flux, frame = SkySpecVAC(root, exclude_known_bad=False).load()
    np.testing.assert_array_equal(wavelength, COARSE_WAVELENGTH)
    np.testing.assert_array_equal(flux, marked_flux(metadata))
    assert flux.dtype == np.float32
    assert flux.dtype.isnative
    added = ["SKY_MAG_V_SPEC", "ECLIPSE_FRAC", "GALLON", "GALLAT", "ECLLON", "ECLLAT"]
    assert list(frame.columns) == [*metadata.columns, *added]
    assert all(dtype.isnative for dtype in frame.dtypes)


def test_added_columns_are_those_of_other_computations(root: Path) -> None:
    from speclite import filters

    _, flux, frame = SkySpecVAC(root).load()
    band = filters.load_filters("bessell-V")
    for row in (0, 17, len(frame) - 1):
        spectrum = flux[row] * 1e-17 * u.erg / (u.s * u.cm**2 * u.AA)
        v = band.get_ab_magnitudes(spectrum, COARSE_WAVELENGTH * u.AA)["bessell-V"][0]
        assert frame["SKY_MAG_V_SPEC"][row] == pytest.approx(v, abs=0.02)  # a coarse grid
    sky = SkyCoord(frame["TILERA"].to_numpy() * u.deg, frame["TILEDEC"].to_numpy() * u.deg)
    np.testing.assert_allclose(frame["GALLON"], sky.galactic.l.deg)
    np.testing.assert_allclose(frame["GALLAT"], sky.galactic.b.deg)
    obliquity = np.radians(23.4392911)  # of J2000
    ra, dec = np.radians(frame["TILERA"]), np.radians(frame["TILEDEC"])
    latitude = np.sin(dec) * np.cos(obliquity) - np.cos(dec) * np.sin(obliquity) * np.sin(ra)
    np.testing.assert_allclose(np.sin(np.radians(frame["ECLLAT"])), latitude, atol=1e-6)


def test_the_eclipse_is_that_of_the_middle_of_the_exposure(tmp_path: Path) -> None:
    # 2021-11-19: greatest 09:02:55 UTC, magnitude 0.9742 (NASA's catalogue). At 07:18:41,
    # first contact, the Moon is still whole; an exposure of 2 h from then reaches 08:18:41.
    metadata = catalogue_metadata(3).assign(
        NIGHT=20211118,
        MJD=[59537 + 32575 / 86400, 59537 + 26321 / 86400, 59500.3],
        EXPTIME=[0.0, 7200.0, 900.0],
    )
    place_catalogue(tmp_path, metadata)
    _, _, frame = SkySpecVAC(tmp_path).load()
    assert frame["ECLIPSE_FRAC"][0] == pytest.approx(0.99, abs=0.005)
    assert 0.3 < frame["ECLIPSE_FRAC"][1] < 0.8
    assert frame["ECLIPSE_FRAC"][2] == 0


def test_columns_that_the_file_has_are_left_as_they_are(
    tmp_path: Path, metadata: pd.DataFrame
) -> None:
    own = {"SKY_MAG_V_SPEC": 21.0, "ECLIPSE_FRAC": 0.5, "SOLFLUX": 70.0, "GALLON": 1.0}
    place_catalogue(tmp_path, metadata.assign(**own))
    _, _, frame = SkySpecVAC(tmp_path).load()
    for name, value in own.items():
        assert (frame[name] == value).all()
    assert "GALLAT" in frame


def test_the_solar_flux_is_there_only_where_the_file_has_it(root: Path) -> None:
    assert "SOLFLUX" not in SkySpecVAC(root).load()[2]


def test_metadata_can_come_as_a_structured_array(root: Path, metadata: pd.DataFrame) -> None:
    _, flux, records = SkySpecVAC(root, exclude_known_bad=False).load(as_dataframe=False)
    assert isinstance(records, np.ndarray)
    assert records.dtype.names == tuple(metadata.columns)
    assert all(records.dtype[name].isnative for name in records.dtype.names)
    np.testing.assert_array_equal(records["EXPID"], flux[:, 0])
    _, fewer, excluded = SkySpecVAC(root).load(as_dataframe=False)
    assert len(fewer) == len(excluded) == (~metadata["NIGHT"].between(20210604, 20210612)).sum()


def test_single_and_double_precision_columns_with_units_are_read_alike(
    tmp_path: Path, metadata: pd.DataFrame
) -> None:
    path = place_catalogue(tmp_path, metadata, float_type="f4")
    with fits.open(path, mode="update") as hdus:
        hdus["METADATA"].columns["MOONALT"].unit = "deg"
    _, _, moon = SkySpecVAC(tmp_path, exclude_known_bad=False).load_moon_contaminated()
    expected = metadata.query(QUERIES["moon"])
    assert moon["EXPID"].tolist() == expected["EXPID"].tolist()


def test_the_place_is_the_argument_the_variable_or_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("argument", "variable", "home/.desisky/data"):
        place_catalogue(tmp_path / folder, catalogue_metadata(10))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DESISKY_DATA_DIR", str(tmp_path / "variable"))
    below = Path("dr1/sky_spectra_vac_v1.fits")
    assert SkySpecVAC(tmp_path / "argument").filepath() == tmp_path / "argument" / below
    assert SkySpecVAC().path == tmp_path / "variable" / below
    monkeypatch.delenv("DESISKY_DATA_DIR")
    assert SkySpecVAC().path == tmp_path / "home/.desisky/data" / below


def test_a_missing_catalogue_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such file; fetch it with SkySpecVAC\(downl"):
        SkySpecVAC(tmp_path)
    with pytest.raises(FileNotFoundError):
        SkySpecVAC(tmp_path)


def test_an_unknown_version_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r"version 'v2' is unknown: one of v1\.0"):
        SkySpecVAC(root, version="v2")


def test_the_published_release_is_the_documented_one() -> None:
    release = RELEASES["v1.0"]
    assert release.sha256 == "e943bcf046965090c4566b2b132bd48aba4646f0e2c49a53eb6904e98c471a1b"
    assert release.url.endswith("/public/dr1/vac/dr1/skyspec/v1.0/sky_spectra_vac_v1.fits")


class TestDownload:
    @pytest.fixture
    def published(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
        """A release that a server on the loopback address holds."""
        file = write_catalogue(tmp_path / "served" / "vac.fits", catalogue_metadata(50))
        handler = functools.partial(QuietHandler, directory=str(file.parent))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            release = Release(
                url=f"http://127.0.0.1:{server.server_address[1]}/vac.fits",
                folder="dr1",
                filename="sky_spectra_vac_v1.fits",
                sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
            )
            monkeypatch.setattr(vac_module, "RELEASES", {"v1.0": release, "bad": release})
            yield release
            server.shutdown()
            thread.join()

    def test_a_missing_file_is_fetched_once(self, published: Release, tmp_path: Path) -> None:
        catalogue = SkySpecVAC(tmp_path, download=True, exclude_known_bad=False)
        assert len(catalogue.load()[1]) == 50
        written = catalogue.path.stat().st_mtime_ns
        assert SkySpecVAC(tmp_path, download=True).path.stat().st_mtime_ns == written

    def test_a_wrong_checksum_is_refused_unless_not_verified(
        self, published: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wrong = Release(published.url, "dr1", "vac.fits", sha256="f" * 64)
        monkeypatch.setattr(vac_module, "RELEASES", {"v1.0": wrong})
        with pytest.raises(DownloadError, match="wrong checksum"):
            SkySpecVAC(tmp_path, download=True)
        assert list((tmp_path / "dr1").iterdir()) == []
        assert SkySpecVAC(tmp_path, download=True, verify=False).path.exists()

    def test_a_file_that_is_there_is_accepted_as_it_is(
        self, published: Release, tmp_path: Path
    ) -> None:
        path = place_catalogue(tmp_path, catalogue_metadata(7))
        assert SkySpecVAC(tmp_path, download=True).path == path
        assert len(SkySpecVAC(tmp_path, exclude_known_bad=False).load()[1]) == 7


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


class TestDamagedFiles:
    def refused(self, path: Path, match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            SpectraFile.open(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("keep", [0.3, 0.6, 0.9, 0.999])
    def test_a_truncated_file(self, root: Path, keep: float) -> None:
        path = SkySpecVAC(root).path
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        self.refused(path, r"truncated FITS|missing HDU")

    def test_a_file_cut_to_whole_records_inside_the_spectra(self, root: Path) -> None:
        path = SkySpecVAC(root).path
        content = path.read_bytes()
        path.write_bytes(content[: 2880 * 50])
        self.refused(path, r"truncated FITS: 144000 bytes are there, its headers promise \d+")

    def test_a_file_that_is_no_fits(self, tmp_path: Path) -> None:
        path = tmp_path / "x.fits"
        path.write_text("hello")
        self.refused(path, "not a FITS file")
        path.write_text("")
        self.refused(path, "the file is empty")

    @pytest.mark.parametrize("name", ["WAVELENGTH", "FLUX", "METADATA"])
    def test_a_missing_hdu_is_named(self, tmp_path: Path, name: str) -> None:
        path = write_catalogue(tmp_path / "x.fits", catalogue_metadata(9), omit=[name])
        self.refused(path, f"missing HDU {name}")

    def test_a_misnamed_hdu_is_named_with_the_nearest(self, tmp_path: Path) -> None:
        path = write_catalogue(
            tmp_path / "x.fits", catalogue_metadata(9), rename={"METADATA": "METADAT"}
        )
        self.refused(path, r"missing HDU METADATA \(nearest name there: METADAT\)")

    def test_row_counts_that_disagree(self, tmp_path: Path) -> None:
        metadata = catalogue_metadata(9)
        path = write_catalogue(tmp_path / "x.fits", metadata, marked_flux(metadata)[:8])
        self.refused(path, "FLUX has 8 rows and METADATA 9: they must agree")

    def test_grids_that_disagree(self, tmp_path: Path) -> None:
        metadata = catalogue_metadata(9)
        flux = marked_flux(metadata)[:, :-1].copy()
        path = write_catalogue(tmp_path / "x.fits", metadata, flux)
        self.refused(path, "FLUX has 194 pixels a row and WAVELENGTH 195: they must agree")

    def test_a_missing_column_is_named_with_the_nearest(self, tmp_path: Path) -> None:
        metadata = catalogue_metadata(60).rename(columns={"MOONALT": "MOON_ALT"})
        place_catalogue(tmp_path, metadata)
        with pytest.raises(DataError, match=r"missing column MOONALT \(nearest .* MOON_ALT\)"):
            SkySpecVAC(tmp_path).load_moon_contaminated()

    def test_a_cut_that_leaves_no_row_says_why(self, tmp_path: Path) -> None:
        metadata = catalogue_metadata(60).assign(MOONALT=-40.0, SUNALT=-30.0, NIGHT=20210101)
        place_catalogue(tmp_path, metadata)
        message = r"'moon': none of 60 rows is left: .*< -20 removed 0; MOONALT > 5 removed 60"
        with pytest.raises(DataError, match=message):
            SkySpecVAC(tmp_path).load_moon_contaminated()

    def test_a_folder_and_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFileError, match="is a folder"):
            SpectraFile.open(tmp_path)
        with pytest.raises(MissingFileError, match="no such file"):
            SpectraFile.open(tmp_path / "x.fits")


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.sets(st.integers(0, 399)))
def test_any_rows_of_the_spectra_can_be_read_alone(root: Path, rows: set[int]) -> None:
    file = SpectraFile.open(root / "dr1" / "sky_spectra_vac_v1.fits")
    chosen = np.array(sorted(rows), dtype=int)
    np.testing.assert_array_equal(file.flux(chosen), marked_flux(catalogue_metadata(400))[chosen])
