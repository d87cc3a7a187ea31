"""The feature table: what is in it, what was dropped and why, and what signs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import catalogue_metadata, write_catalogue
from test_subsets import QUERIES

from desisky_tune.data import FEATURES, TARGETS, load_features, write_table
from desisky_tune.data.cache import cache_folder, cache_key, code_version, read_cached, write_cached
from desisky_tune.data.features import fingerprint, needs_ray, source_path
from desisky_tune.errors import DataError, MissingFileError
from desisky_tune.files import sha256_file


@pytest.fixture(scope="module")
def shipped() -> pd.DataFrame:
    return pd.read_csv(source_path("sv1"))


class TestShippedExposures:
    def test_327_moonlit_exposures_have_magnitudes_and_one_is_absurd(self) -> None:
        """The counts that the data's own notes give: 350 pass, 327 complete, z = 28.2 once."""
        table = load_features()
        assert len(table.frame) == table.provenance["rows"] == 326
        assert table.frame["NIGHT"].nunique() <= 26
        removed = table.provenance["removed"]
        cut_rows = sum(n for name, n in removed.items() if "magnitude" not in name)
        assert table.provenance["rows_read"] - cut_rows == 350
        assert removed["magnitude missing"] == 350 - 327
        assert removed["magnitude outside 10-25"] == 1
        assert sum(removed.values()) + 326 == table.provenance["rows_read"] == 1809

    def test_the_rows_are_those_of_the_cut(self, shipped: pd.DataFrame) -> None:
        expected = shipped.query(QUERIES["moon"]).dropna(subset=list(TARGETS[1:]))
        expected = expected[expected["SKY_MAG_Z_SPEC"] < 25].sort_values("EXPID")
        frame = load_features().frame
        for name in ("EXPID", "NIGHT", "MOONSEP", "SKY_MAG_R_SPEC"):
            np.testing.assert_array_equal(frame[name], expected[name])

    def test_the_frame_keeps_its_promises(self) -> None:
        frame = load_features(subset="all").frame
        assert frame.index.equals(pd.RangeIndex(len(frame)))
        assert frame["EXPID"].is_monotonic_increasing
        assert frame["EXPID"].dtype == frame["NIGHT"].dtype == np.int64
        numbers = frame[[*FEATURES, *TARGETS]]
        assert (numbers.dtypes == np.float64).all()
        assert np.isfinite(numbers).all(axis=None)
        assert frame[list(TARGETS)].stack().between(10, 25).all()
        assert (frame["ECLIPSE_FRAC"] == 0).all()

    def test_v_is_marked_as_derived(self) -> None:
        table = load_features()
        assert table.v_derived
        assert table.frame.attrs["v_derived"] is True

    def test_provenance_goes_through_json(self) -> None:
        provenance = load_features().provenance
        assert json.loads(json.dumps(provenance)) == provenance
        assert provenance["source"] == "sv1"
        assert provenance["source_sha256"] == sha256_file(source_path("sv1"))
        assert provenance["eclipse"] == "exact"

    def test_neither_ray_nor_jax_is_imported(self) -> None:
        code = (
            "import sys; from desisky_tune.data import load_features; load_features();"
            "print(sorted({'ray', 'jax', 'torch', 'optuna'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.stdout.strip() == "[]", result.stderr

    def test_importing_the_room_imports_neither_pandas_nor_astropy(self) -> None:
        code = (
            "import sys, desisky_tune.data;"
            "print(sorted({'ray', 'jax', 'astropy', 'pandas'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.stdout.strip() == "[]", result.stderr


class TestArrays:
    def test_columns_come_in_the_order_asked_for(self) -> None:
        table = load_features()
        order = tuple(reversed(FEATURES))
        rows = np.array([5, 0, 7])
        inputs, targets = table.arrays(rows, features=order)
        assert inputs.shape == (3, 6)
        assert targets.shape == (3, 4)
        assert inputs.dtype == targets.dtype == np.float32
        for column, name in enumerate(order):
            np.testing.assert_array_equal(
                inputs[:, column], table.frame[name].to_numpy(np.float32)[rows]
            )
        np.testing.assert_array_equal(
            targets[:, 2], table.frame["SKY_MAG_R_SPEC"].to_numpy(np.float32)[rows]
        )

    def test_all_rows_come_by_default(self) -> None:
        table = load_features()
        assert len(table.arrays()[0]) == len(table.frame)

    def test_an_unknown_feature_is_refused(self) -> None:
        with pytest.raises(DataError, match=r"AIRMASSES \(nearest name there: AIRMASS\)"):
            load_features().arrays(features=("AIRMASSES",))


class TestTables:
    def table(self, tmp_path: Path, frame: pd.DataFrame, name: str = "t.csv") -> Path:
        return write_table(frame, tmp_path / name)

    def test_the_fingerprint_is_of_the_content(self, shipped: pd.DataFrame, tmp_path: Path) -> None:
        signed = load_features().fingerprint
        assert len(signed) == 64
        shuffled = shipped.sample(frac=1, random_state=0)
        same = load_features(self.table(tmp_path, shuffled, "other.parquet"))
        assert same.fingerprint == signed
        assert same.provenance["source_sha256"] != load_features().provenance["source_sha256"]
        changed = shipped.assign(MOONSEP=shipped["MOONSEP"] * (1 + 1e-9))
        assert load_features(self.table(tmp_path, changed)).fingerprint != signed

    def test_a_v_of_the_table_is_not_marked(self, shipped: pd.DataFrame, tmp_path: Path) -> None:
        table = load_features(self.table(tmp_path, shipped.assign(V=20.5)))
        assert not table.v_derived
        assert (table.frame["SKY_MAG_V_SPEC"] == 20.5).all()

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (np.nan, "missing"),
            (9.9, "outside 10-25"),
            (25.1, "outside 10-25"),
            (np.inf, "outside 10-25"),
        ],
    )
    @pytest.mark.parametrize("band", ["V", "g", "r", "z"])
    def test_unusable_magnitudes_are_dropped_and_counted(
        self, tmp_path: Path, band: str, value: float, reason: str
    ) -> None:
        frame = load_features().frame.drop(columns="V_DERIVED", errors="ignore")
        name = TARGETS["Vgrz".index(band)]
        frame.loc[[3, 8], name] = value
        table = load_features(self.table(tmp_path, frame, "t.parquet"))
        assert len(table.frame) == 324
        assert table.provenance["removed"][f"magnitude {reason}"] == 2
        assert frame["EXPID"][3] not in set(table.frame["EXPID"])

    def test_rows_without_a_feature_are_dropped_and_counted(self, tmp_path: Path) -> None:
        frame = load_features().frame
        frame.loc[4, "OBSALT"] = np.nan
        table = load_features(self.table(tmp_path, frame))
        assert table.provenance["removed"]["feature missing"] == 1
        assert len(table.frame) == 325

    def test_the_eclipse_comes_from_where_it_is_asked(
        self, shipped: pd.DataFrame, tmp_path: Path
    ) -> None:
        path = self.table(tmp_path, shipped.assign(ECLIPSE_FRAC=0.25))
        for choice, value in (("exact", 0.0), ("none", 0.0), ("table", 0.25)):
            table = load_features(path, eclipse=choice)
            assert (table.frame["ECLIPSE_FRAC"] == value).all()
            assert table.provenance["eclipse"] == choice
        timeless = self.table(tmp_path, shipped.drop(columns="MJD").assign(ECLIPSE_FRAC=0.25))
        table = load_features(timeless)
        assert (table.frame["ECLIPSE_FRAC"] == 0.25).all()
        assert table.provenance["eclipse"] == "table"

    def test_known_bad_nights_can_be_kept(self, shipped: pd.DataFrame, tmp_path: Path) -> None:
        path = self.table(tmp_path, shipped.assign(NIGHT=20210608))
        with pytest.raises(DataError, match=r"NIGHT outside 20210604-20210612 removed 1809"):
            load_features(path)
        table = load_features(path, exclude_known_bad=False)
        assert len(table.frame) == 326
        assert table.provenance["exclude_known_bad"] is False

    def test_a_cut_that_leaves_no_row_counts(self, shipped: pd.DataFrame, tmp_path: Path) -> None:
        path = self.table(tmp_path, shipped.assign(MOONALT=-10.0))
        message = r"'moon': none of 1809 rows is left: .*SUNALT < -20 removed 280; MOONALT > 5 rem"
        with pytest.raises(DataError, match=message):
            load_features(path)

    def test_magnitudes_that_are_all_unusable_are_counted(
        self, shipped: pd.DataFrame, tmp_path: Path
    ) -> None:
        path = self.table(tmp_path, shipped.assign(SKY_MAG_Z_SPEC=30.0))
        with pytest.raises(DataError, match=r"none of 1809 rows .*magnitude outside 10-25 removed"):
            load_features(path)


class TestSources:
    def test_an_unknown_subset_or_eclipse_is_refused(self) -> None:
        with pytest.raises(DataError, match="subset 'sun' is unknown"):
            load_features(subset="sun")
        with pytest.raises(DataError, match="eclipse = 'ramps': one of exact, none, table"):
            load_features(eclipse="ramps")

    def test_a_missing_file_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(MissingFileError, match=r"nothing\.csv: no such file"):
            load_features(tmp_path / "nothing.csv")
        monkeypatch.setenv("DESISKY_DATA_DIR", str(tmp_path))
        with pytest.raises(MissingFileError, match="desisky-tune data fetch"):
            load_features("vac")

    def test_spectra_need_ray_and_tables_do_not(self, tmp_path: Path) -> None:
        metadata = catalogue_metadata(5)
        assert needs_ray(write_catalogue(tmp_path / "vac.fits", metadata))
        assert needs_ray(
            write_catalogue(tmp_path / "half.fits", metadata, omit=["FLUX", "WAVELENGTH"])
        )
        assert not needs_ray(write_table(metadata, tmp_path / "t.fits"))
        assert not needs_ray(write_table(metadata, tmp_path / "t.csv"))
        assert not needs_ray("sv1")


class TestCache:
    def test_the_folder_follows_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "desisky_tune" / "features"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_folder() == tmp_path / ".cache" / "desisky_tune" / "features"
        assert cache_folder(tmp_path / "own") == tmp_path / "own"

    def test_the_key_depends_on_content_options_and_code(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, other = "a" * 64, "b" * 64
        key = cache_key(one, {"subset": "moon"})
        assert key == cache_key(one, {"subset": "moon"})
        keys = {key, cache_key(other, {"subset": "moon"}), cache_key(one, {"subset": "dark"})}
        monkeypatch.setattr("desisky_tune.data.cache.code_version", lambda: code_version() + "x")
        keys.add(cache_key(one, {"subset": "moon"}))
        assert len(keys) == 4

    def test_a_table_comes_back_as_it_went(self, tmp_path: Path) -> None:
        table = load_features()
        write_cached("k", table.frame, table.provenance, tmp_path)
        kept = read_cached("k", tmp_path)
        assert kept is not None
        pd.testing.assert_frame_equal(kept[0], table.frame)
        assert kept[1] == table.provenance
        assert fingerprint(kept[0]) == table.fingerprint

    def test_a_damaged_entry_counts_as_none(self, tmp_path: Path) -> None:
        table = load_features()
        path = write_cached("k", table.frame, table.provenance, tmp_path)
        path.write_bytes(path.read_bytes()[:-100])
        assert read_cached("k", tmp_path) is None
        table.frame.to_parquet(path)
        assert read_cached("k", tmp_path) is None
        assert read_cached("other", tmp_path) is None
