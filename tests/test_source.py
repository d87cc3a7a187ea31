"""The Ray Data path against the same steps done plainly in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from builders import COARSE_WAVELENGTH, catalogue_metadata, marked_flux, write_catalogue
from test_subsets import QUERIES

from desisky_tune.data import FEATURES, TARGETS, SpectraFile, features, load_features, magnitudes
from desisky_tune.data import source as source_module
from desisky_tune.data.geometry import GEOMETRY_COLUMNS
from desisky_tune.data.source import ingest, spectra_dataset
from desisky_tune.data.subsets import subset_conditions
from desisky_tune.errors import DataError

pytestmark = pytest.mark.usefixtures("ray_instance")


@pytest.fixture
def metadata() -> pd.DataFrame:
    return catalogue_metadata(300, seed=5)


@pytest.fixture
def catalogue(tmp_path: Path, metadata: pd.DataFrame) -> Path:
    return write_catalogue(tmp_path / "vac.fits", metadata)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def expected_rows(metadata: pd.DataFrame, subset: str) -> pd.DataFrame:
    """The rows of a subset with V from their own spectra, by plain numpy and pandas."""
    v = magnitudes(marked_flux(metadata), COARSE_WAVELENGTH, bands=("V",))[:, 0]
    frame = metadata.assign(SKY_MAG_V_SPEC=v).query(QUERIES[subset])
    frame = frame.query("NIGHT < 20210604 or NIGHT > 20210612")
    return frame.sort_values("EXPID", ignore_index=True)


@pytest.mark.parametrize("subset", list(QUERIES))
def test_a_feature_table_holds_the_rows_of_the_cut(
    catalogue: Path, metadata: pd.DataFrame, cache: Path, subset: str
) -> None:
    table = load_features(catalogue, subset, cache_dir=cache)
    expected = expected_rows(metadata, subset)
    assert len(expected) > 0
    pd.testing.assert_frame_equal(
        table.frame[expected.columns], expected, check_dtype=False, rtol=1e-12
    )
    assert "FLUX" not in table.frame
    assert not table.v_derived
    removed = table.provenance["removed"]
    assert sum(removed.values()) + len(expected) == table.provenance["rows_read"] == 300
    assert (
        removed["NIGHT outside 20210604-20210612"]
        == metadata["NIGHT"].between(20210604, 20210612).sum()
    )


def test_read_tasks_take_ranges_of_rows_with_flux_as_tensors(
    ray_instance: Any, catalogue: Path, metadata: pd.DataFrame
) -> None:
    from ray.data.extensions import ArrowTensorTypeV2

    file = SpectraFile.open(catalogue)
    dataset = spectra_dataset(file, np.arange(file.rows)).materialize()
    assert dataset.num_blocks() > 1
    assert dataset.count() == 300
    block = ray_instance.get(dataset.to_arrow_refs()[0])
    assert isinstance(block.schema.field("FLUX").type, ArrowTensorTypeV2)
    batch = next(iter(dataset.iter_batches(batch_size=None, batch_format="numpy")))
    assert batch["FLUX"].shape[1] == len(COARSE_WAVELENGTH)
    assert batch["FLUX"].dtype == np.float32
    np.testing.assert_array_equal(batch["FLUX"][:, 0], batch["EXPID"])


def test_only_spectra_of_rows_that_pass_are_read(
    catalogue: Path, metadata: pd.DataFrame, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    whole = source_module.spectra_dataset

    def noted(file: SpectraFile, rows: np.ndarray, **options: bool) -> Any:
        asked.extend(rows.tolist())
        return whole(file, rows, **options)

    monkeypatch.setattr(source_module, "spectra_dataset", noted)
    table = load_features(catalogue, "dark", cache_dir=cache)
    assert set(metadata["EXPID"].iloc[asked]) == set(table.frame["EXPID"])


def test_missing_geometry_is_computed_before_the_cut(tmp_path: Path, cache: Path) -> None:
    """The shipped exposures' own columns are the reference: topocentric, at mid-exposure."""
    shipped = pd.read_csv(features.source_path("sv1"))
    whole = shipped[::12].assign(SEEING_ETC=1.0).reset_index(drop=True)
    bare = whole.drop(columns=list(GEOMETRY_COLUMNS))
    level = np.ones((len(bare), len(COARSE_WAVELENGTH)), np.float32)
    path = write_catalogue(tmp_path / "bare.fits", bare, level)
    table = load_features(path, "moon", cache_dir=cache)
    reference = load_features(
        write_catalogue(tmp_path / "whole.fits", whole, level), "moon", cache_dir=cache
    )
    assert table.provenance["removed"] == reference.provenance["removed"]
    assert table.frame["EXPID"].tolist() == reference.frame["EXPID"].tolist()
    for name in GEOMETRY_COLUMNS:
        np.testing.assert_allclose(table.frame[name], reference.frame[name], atol=2e-5)


def test_a_v_of_the_file_is_kept(tmp_path: Path, metadata: pd.DataFrame, cache: Path) -> None:
    path = write_catalogue(tmp_path / "v.fits", metadata.assign(SKY_MAG_V_SPEC=20.25))
    table = load_features(path, cache_dir=cache)
    assert (table.frame["SKY_MAG_V_SPEC"] == 20.25).all()


def test_spectra_without_light_are_dropped_and_counted(
    tmp_path: Path, metadata: pd.DataFrame, cache: Path
) -> None:
    flux = marked_flux(metadata)
    rows = metadata.query(QUERIES["dark"] + " and NIGHT < 20210604").index[:4]
    flux[rows[0]] = 0
    flux[rows[1]] = -1
    flux[rows[2]] = np.nan
    flux[rows[3]] = 1e9
    table = load_features(
        write_catalogue(tmp_path / "d.fits", metadata, flux), "dark", cache_dir=cache
    )
    assert table.provenance["removed"]["magnitude missing"] == 3
    assert table.provenance["removed"]["magnitude outside 10-25"] == 1
    assert not set(metadata["EXPID"][rows]) & set(table.frame["EXPID"])


def test_the_eclipse_is_computed_or_none_or_the_files(
    tmp_path: Path, metadata: pd.DataFrame, cache: Path
) -> None:
    # Greatest eclipse of 2022-05-16, total: 04:11:29 UTC.
    eclipsed = metadata.assign(MJD=59715 + 4.19 / 24, EXPTIME=60.0, ECLIPSE_FRAC=0.5)
    path = write_catalogue(tmp_path / "e.fits", eclipsed)
    for choice, value in (("exact", 1.0), ("none", 0.0), ("table", 0.5)):
        table = load_features(path, eclipse=choice, cache_dir=cache)
        assert (table.frame["ECLIPSE_FRAC"] == value).all()
        assert table.provenance["eclipse"] == choice


class TestCache:
    def test_a_second_load_reads_no_spectrum(
        self, catalogue: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = load_features(catalogue, cache_dir=cache)
        monkeypatch.setattr(source_module, "ingest", None)
        second = load_features(catalogue, cache_dir=cache)
        pd.testing.assert_frame_equal(first.frame, second.frame)
        assert first.provenance == second.provenance
        assert list(first.frame.dtypes) == list(second.frame.dtypes)

    def test_the_same_content_elsewhere_is_the_same_table(
        self, catalogue: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = load_features(catalogue, cache_dir=cache)
        copy = tmp_path / "copy.fits"
        copy.write_bytes(catalogue.read_bytes())
        monkeypatch.setattr(source_module, "ingest", None)
        second = load_features(copy, cache_dir=cache)
        assert second.provenance["path"] == str(copy)
        assert second.fingerprint == first.fingerprint

    def test_one_changed_byte_makes_another_table(
        self, catalogue: Path, metadata: pd.DataFrame, cache: Path
    ) -> None:
        first = load_features(catalogue, cache_dir=cache)
        flux = marked_flux(metadata)
        flux[:, 60] *= 1.001
        write_catalogue(catalogue, metadata, flux)
        assert load_features(catalogue, cache_dir=cache).fingerprint != first.fingerprint

    def test_options_have_entries_of_their_own(self, catalogue: Path, cache: Path) -> None:
        load_features(catalogue, cache_dir=cache)
        load_features(catalogue, exclude_known_bad=False, cache_dir=cache)
        assert len(list(cache.glob("*.parquet"))) == 2
        assert [p.suffix for p in cache.iterdir()] == [".parquet"] * 2


class TestFaults:
    def test_an_empty_cut_says_what_each_condition_removed(
        self, tmp_path: Path, metadata: pd.DataFrame, cache: Path
    ) -> None:
        path = write_catalogue(tmp_path / "x.fits", metadata.assign(SUNALT=-30.0, MOONALT=-40.0))
        message = r"the cut 'moon': none of 300 rows is left: .*MOONALT > 5 removed \d+"
        with pytest.raises(DataError, match=message):
            load_features(path, cache_dir=cache)
        assert not cache.exists()

    @pytest.mark.parametrize("name", ["EXPID", "NIGHT", "TRANSPARENCY_GFA", "SKY_MAG_R_SPEC"])
    def test_a_missing_column_is_named_with_the_nearest(
        self, tmp_path: Path, metadata: pd.DataFrame, cache: Path, name: str
    ) -> None:
        renamed = metadata.rename(columns={name: f"{name}_X"})
        path = write_catalogue(tmp_path / "x.fits", renamed, marked_flux(metadata))
        with pytest.raises(DataError, match=rf"{name} \(nearest name there: {name}_X\)"):
            load_features(path, cache_dir=cache)

    def test_geometry_without_a_pointing_names_what_is_missing(
        self, tmp_path: Path, metadata: pd.DataFrame, cache: Path
    ) -> None:
        path = write_catalogue(tmp_path / "x.fits", metadata.drop(columns=["MOONSEP", "TILERA"]))
        with pytest.raises(DataError, match=r"missing columns MOONSEP.*, TILERA"):
            load_features(path, cache_dir=cache)

    def test_repeated_exposures_are_refused(
        self, tmp_path: Path, metadata: pd.DataFrame, cache: Path
    ) -> None:
        twice = pd.concat([metadata, metadata.tail(150)], ignore_index=True)
        path = write_catalogue(tmp_path / "x.fits", twice)
        with pytest.raises(DataError, match=r"EXPID \d+ stands there more than once"):
            load_features(path, cache_dir=cache)

    def test_a_file_that_is_cut_while_it_is_read_is_an_error_of_ours(
        self, catalogue: Path, cache: Path
    ) -> None:
        file = SpectraFile.open(catalogue)
        catalogue.write_bytes(catalogue.read_bytes()[: 2880 * 30])
        with pytest.raises(DataError, match="truncated FITS: 86400 bytes") as caught:
            dataset_of(file)
        assert "\n" not in str(caught.value)


def dataset_of(file: SpectraFile) -> None:
    """Read a file whose cut was made when it was whole."""
    with source_module._quiet_data_context(), source_module._own_errors():
        spectra_dataset(file, np.arange(file.rows)).materialize()


def test_the_settings_of_ray_data_are_left_as_they_were(
    ray_instance: Any, catalogue: Path, metadata: pd.DataFrame
) -> None:
    context = ray_instance.data.DataContext.get_current()
    before = (context.enable_progress_bars, context.execution_options.preserve_order)
    result = ingest(SpectraFile.open(catalogue), subset_conditions("all"))
    after = ray_instance.data.DataContext.get_current()
    assert after is context
    assert (after.enable_progress_bars, after.execution_options.preserve_order) == before
    # The rows come in the order of the file, whichever task ended first.
    assert result.frame["EXPID"].tolist() == metadata.query(QUERIES["all"])["EXPID"].tolist()
    assert set(FEATURES) | set(TARGETS) <= set(result.frame.columns)
