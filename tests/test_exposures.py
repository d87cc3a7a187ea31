"""Tables of exposures: any format and order of columns, what is missing computed, faults told."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.data import FEATURES, TARGETS, night_of, read_table, write_table
from desisky_tune.data.exposures import complete_table, set_eclipse
from desisky_tune.data.features import source_path
from desisky_tune.data.geometry import GEOMETRY_COLUMNS
from desisky_tune.errors import DataError, MissingFileError, StorageError

SUFFIXES = (".csv", ".ecsv", ".fits", ".parquet")


@pytest.fixture(scope="module")
def shipped() -> pd.DataFrame:
    """The shipped exposures as pandas reads them."""
    return pd.read_csv(source_path("sv1"))


@pytest.fixture
def some(shipped: pd.DataFrame) -> pd.DataFrame:
    return shipped.dropna(subset=["TRANSPARENCY_GFA", "SKY_MAG_Z_SPEC"])[::150].reset_index(
        drop=True
    )


def refused(frame: pd.DataFrame, tmp_path: Path, match: str, **options: bool) -> None:
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False)
    with pytest.raises(DataError, match=match) as caught:
        read_table(path, **options)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


class TestReading:
    def test_the_shipped_table_comes_as_it_stands(self, shipped: pd.DataFrame) -> None:
        frame = read_table(source_path("sv1"))
        pd.testing.assert_frame_equal(frame[shipped.columns], shipped, check_dtype=False)
        assert set(FEATURES) | set(TARGETS) <= set(frame.columns)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_every_format_gives_the_same_table(
        self, some: pd.DataFrame, tmp_path: Path, suffix: str
    ) -> None:
        some = some.assign(PROGRAM="bright", FIELD=3)
        path = write_table(some, tmp_path / f"t{suffix}")
        frame = read_table(path)
        pd.testing.assert_frame_equal(frame[some.columns], some, check_dtype=False)
        assert frame["EXPID"].dtype == np.int64
        assert all(np.dtype(frame[name].dtype).isnative for name in FEATURES)

    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_order_and_case_of_the_columns_do_not_matter(
        self, shipped: pd.DataFrame, data: st.DataObject
    ) -> None:
        part = shipped.head(3)
        order = data.draw(st.permutations(list(part.columns)))
        lower = data.draw(st.sets(st.sampled_from(order)))
        given_frame = part[order].rename(columns={name: name.lower() for name in lower})
        frame = complete_table(given_frame, where="t")
        pd.testing.assert_frame_equal(frame[part.columns], part, check_dtype=False)

    def test_short_names_of_the_magnitudes_are_accepted(self, some: pd.DataFrame) -> None:
        short = some.assign(V=21.0).rename(
            columns={f"SKY_MAG_{b.upper()}_SPEC": b for b in ("g", "r", "z")}
        )
        frame = complete_table(short, where="t")
        for name in ("SKY_MAG_G_SPEC", "SKY_MAG_R_SPEC", "SKY_MAG_Z_SPEC"):
            np.testing.assert_array_equal(frame[name], some[name])
        assert (frame["SKY_MAG_V_SPEC"] == 21).all()
        assert frame.attrs["v_derived"] is False

    def test_the_given_frame_is_left_alone(self, some: pd.DataFrame) -> None:
        before = some.copy()
        complete_table(some, where="t")
        pd.testing.assert_frame_equal(some, before)


class TestWhatIsMissing:
    def test_geometry_is_computed_at_mid_exposure(self, shipped: pd.DataFrame) -> None:
        """The shipped columns were computed from the middle: MJD is the start."""
        some = shipped[::100].reset_index(drop=True)
        frame = complete_table(some.drop(columns=list(GEOMETRY_COLUMNS)), where="t")
        for name in GEOMETRY_COLUMNS:
            np.testing.assert_allclose(frame[name], some[name], atol=2e-5)

    def test_columns_that_are_there_are_not_replaced(self, some: pd.DataFrame) -> None:
        frame = complete_table(some.drop(columns="MOONSEP").assign(MOONALT=1.5), where="t")
        assert (frame["MOONALT"] == 1.5).all()
        np.testing.assert_allclose(frame["MOONSEP"], some["MOONSEP"], atol=2e-5)

    def test_the_night_follows_from_the_time(self, shipped: pd.DataFrame) -> None:
        frame = complete_table(shipped.drop(columns="NIGHT"), where="t")
        np.testing.assert_array_equal(frame["NIGHT"], shipped["NIGHT"])

    @settings(max_examples=50, deadline=None)
    @given(when=st.datetimes(datetime(2019, 1, 1), datetime(2035, 1, 1)))
    def test_a_night_begins_at_noon_in_arizona(self, when: datetime) -> None:
        mjd = 40587 + (when - datetime(1970, 1, 1)) / timedelta(days=1)
        local = when - timedelta(hours=7)
        noon_before = local if local.hour >= 12 else local - timedelta(days=1)
        assert night_of(np.array([mjd]))[0] == int(noon_before.strftime("%Y%m%d"))

    def test_a_derived_v_is_marked(self, some: pd.DataFrame) -> None:
        frame = complete_table(some, where="t")
        expected = 0.454 * some["SKY_MAG_G_SPEC"] + 0.526 * some["SKY_MAG_R_SPEC"] + 0.40
        np.testing.assert_allclose(frame["SKY_MAG_V_SPEC"], expected)
        assert frame.attrs["v_derived"] is True

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_the_mark_survives_writing_and_reading(
        self, some: pd.DataFrame, tmp_path: Path, suffix: str
    ) -> None:
        path = write_table(complete_table(some, where="t"), tmp_path / f"t{suffix}")
        assert read_table(path).attrs["v_derived"] is True
        own = complete_table(some.assign(V=20.0), where="t")
        path = write_table(own, tmp_path / f"own{suffix}")
        assert read_table(path).attrs["v_derived"] is False

    def test_no_shipped_exposure_is_eclipsed(self, shipped: pd.DataFrame) -> None:
        assert (read_table(source_path("sv1"))["ECLIPSE_FRAC"] == 0).all()

    def test_an_eclipse_is_seen_at_mid_exposure(self, some: pd.DataFrame) -> None:
        """2022-05-16 was total from 03:29:03 to 04:53:56 UTC."""
        third = 59715 + 3.4 / 24
        frame = complete_table(some.assign(MJD=third, EXPTIME=1200.0), where="t")
        assert (frame["ECLIPSE_FRAC"] == 1).all()
        frame = complete_table(some.assign(MJD=third, EXPTIME=0.0), where="t")
        assert ((frame["ECLIPSE_FRAC"] > 0.9) & (frame["ECLIPSE_FRAC"] < 1)).all()

    def test_a_table_to_predict_for_needs_the_features_alone(
        self, some: pd.DataFrame, tmp_path: Path
    ) -> None:
        frame = complete_table(some, where="t")[[*reversed(FEATURES)]]
        path = write_table(frame, tmp_path / "t.csv")
        pd.testing.assert_frame_equal(
            read_table(path, require_magnitudes=False), frame, check_dtype=False
        )

    def test_a_plan_of_pointings_is_enough_to_predict_for(self, some: pd.DataFrame) -> None:
        plan = some[["MJD", "EXPTIME", "TILERA", "TILEDEC", "TRANSPARENCY_GFA"]]
        frame = complete_table(plan, where="t", require_magnitudes=False)
        assert np.isfinite(frame[list(FEATURES)]).all(axis=None)


class TestFaults:
    def test_a_column_that_cannot_be_computed_is_named(
        self, some: pd.DataFrame, tmp_path: Path
    ) -> None:
        frame = some.rename(columns={"TRANSPARENCY_GFA": "TRANSPARENCY"})
        refused(frame, tmp_path, r"missing column TRANSPARENCY_GFA \(nearest .*: TRANSPARENCY\)")

    def test_geometry_without_a_pointing_names_both(
        self, some: pd.DataFrame, tmp_path: Path
    ) -> None:
        frame = some.drop(columns=["MOONSEP", "SUNSEP"]).rename(columns={"TILERA": "TILE_RA"})
        refused(frame, tmp_path, r"missing column MOONSEP.* compute that TILERA \(near.*TILE_RA\)")

    def test_magnitudes_are_needed_where_they_are_asked_for(
        self, some: pd.DataFrame, tmp_path: Path
    ) -> None:
        frame = some.rename(columns={"SKY_MAG_Z_SPEC": "SKY_MAG_Z"})
        refused(frame, tmp_path, r"missing column SKY_MAG_Z_SPEC \(nearest name .*SKY_MAG_Z\)")
        path = tmp_path / "t.csv"
        assert len(read_table(path, require_magnitudes=False)) == len(frame)

    @pytest.mark.parametrize("name", ["EXPID", "NIGHT"])
    def test_an_exposure_needs_a_number_and_a_night(
        self, some: pd.DataFrame, tmp_path: Path, name: str
    ) -> None:
        refused(some.drop(columns=[name, "MJD"]), tmp_path, f"missing column {name}")

    def test_no_eclipse_without_a_time(self, some: pd.DataFrame, tmp_path: Path) -> None:
        frame = some.drop(columns="MJD")
        refused(frame, tmp_path, "missing column ECLIPSE_FRAC.* and no MJD to compute it from")

    def test_repeated_exposures_are_told_with_their_rows(
        self, some: pd.DataFrame, tmp_path: Path
    ) -> None:
        number = some["EXPID"][2]
        frame = some.assign(EXPID=some["EXPID"].where(some.index != 4, number))
        refused(frame, tmp_path, f"EXPID {number} stands in rows 3, 5: once only")

    def test_one_name_twice_is_refused(self, some: pd.DataFrame, tmp_path: Path) -> None:
        refused(some.assign(moonsep=1.0), tmp_path, "MOONSEP stands there twice, as MOONSEP and mo")
        refused(some.assign(g=1.0), tmp_path, "SKY_MAG_G_SPEC stands there twice, as .* and g")

    def test_text_in_a_column_of_numbers_is_told_with_its_row(
        self, some: pd.DataFrame, tmp_path: Path
    ) -> None:
        frame = some.astype({"MOONALT": object})
        frame.loc[3, "MOONALT"] = "high"
        refused(frame, tmp_path, "column MOONALT, row 4: 'high' is no number")

    def test_an_exposure_number_is_an_integer(self, some: pd.DataFrame, tmp_path: Path) -> None:
        frame = some.astype({"EXPID": float})
        frame.loc[1, "EXPID"] = 7.5
        refused(frame, tmp_path, r"column EXPID, row 2: .*7\.5.* is no integer")
        frame.loc[1, "EXPID"] = np.nan
        refused(frame, tmp_path, "column EXPID has no value in row 2: an integer is needed")

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_empty_and_foreign_files_are_refused(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"t{suffix}"
        path.write_bytes(b"")
        with pytest.raises(DataError, match="the file is empty"):
            read_table(path)
        path.write_bytes(b"\x00\xff\xfe nonsense \x80" * 20)
        with pytest.raises(DataError) as caught:
            read_table(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("suffix", [".fits", ".parquet"])
    @pytest.mark.parametrize("keep", [0.2, 0.7, 0.98])
    def test_truncated_files_are_refused(
        self, shipped: pd.DataFrame, tmp_path: Path, suffix: str, keep: float
    ) -> None:
        path = write_table(shipped, tmp_path / f"t{suffix}")
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        with pytest.raises(DataError, match="truncated"):
            read_table(path)

    def test_a_header_alone_is_no_table(self, some: pd.DataFrame, tmp_path: Path) -> None:
        refused(some.head(0), tmp_path, "the table has no rows")

    def test_an_image_is_no_table(self, tmp_path: Path) -> None:
        from astropy.io import fits

        fits.PrimaryHDU(np.zeros((3, 3))).writeto(tmp_path / "t.fits")
        with pytest.raises(DataError, match=r"holds no table; its HDUs are \['PRIMARY'\]"):
            read_table(tmp_path / "t.fits")

    def test_missing_and_unreadable_files(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFileError, match=r"x\.csv: no such file"):
            read_table(tmp_path / "x.csv")
        with pytest.raises(MissingFileError, match="is a folder"):
            read_table(tmp_path)
        with pytest.raises(MissingFileError, match="cannot be read"):
            read_table("/proc/self/mem")

    def test_an_unknown_format_is_refused(self, some: pd.DataFrame, tmp_path: Path) -> None:
        (tmp_path / "t.xlsx").write_text("x")
        with pytest.raises(DataError, match=r"unknown kind of table; one of \.csv, \.ecsv"):
            read_table(tmp_path / "t.xlsx")
        with pytest.raises(DataError, match="unknown kind of table"):
            write_table(some, tmp_path / "t.txt")

    def test_a_table_that_cannot_be_written_leaves_nothing(
        self, some: pd.DataFrame, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StorageError, match="cannot write"):
            write_table(some, tmp_path / "file" / "t.csv")
        assert list(tmp_path.iterdir()) == [tmp_path / "file"]
        assert (tmp_path / "file").read_text() == "in the way"

    def test_an_eclipse_comes_from_a_known_place(self, some: pd.DataFrame) -> None:
        with pytest.raises(DataError, match="eclipse = 'ramp': one of exact, none, table"):
            set_eclipse(some, "ramp", rows=len(some))
        with pytest.raises(DataError, match="missing column ECLIPSE_FRAC"):
            set_eclipse(some, "table", rows=len(some))
