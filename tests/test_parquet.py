"""No Parquet file has code of its own run, and plain tables come back as they went."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from desisky_tune.data.cache import read_cached
from desisky_tune.data.parquet import read_parquet
from desisky_tune.data.tables import read_raw_table
from desisky_tune.errors import DataError, RunError
from desisky_tune.search import pretraining
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.given_weights import _nights
from desisky_tune.search.loaded import LoadedRun
from desisky_tune.search.origin import read_table_of


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled(path: Path, marker: Path) -> Path:
    """Write a table with a column that Ray unpickles."""
    from ray.data.extensions import ArrowPythonObjectType

    stored = pa.array([pickle.dumps(Touch(marker))], type=pa.large_binary())
    note = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), stored)
    table = pa.table({"EXPID": [1], "NIGHT": [20210101], "NOTE": note})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"desisky_tune": '{"v_derived": false}'}), path)
    return path


def loaded(path: Path) -> LoadedRun:
    nothing: Any = None
    search = {"split": {"train": [1], "validation": [1]}}
    return LoadedRun(path, search, nothing, (), nothing, nothing, None, None, None)


PLACES: dict[str, tuple[str, type[Exception], Callable[[Path], object]]] = {
    "table": ("t.parquet", DataError, lambda run: read_raw_table(run / "t.parquet")),
    "features": (
        "features.parquet",
        RunError,
        lambda run: read_table_of(RunFolder(run), {"data": {"fingerprint": ""}}),
    ),
    "two columns": ("features.parquet", RunError, lambda run: _nights(RunFolder(run))),
    "some rows": ("features.parquet", RunError, lambda run: loaded(run).rows("train")),
    "predictions": ("out_of_fold.parquet", RunError, lambda run: loaded(run).out_of_fold()),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_column_that_would_be_unpickled_is_refused(place: str, tmp_path: Path) -> None:
    name, error, read = PLACES[place]
    path = pickled(tmp_path / name, tmp_path / "marker")
    with pytest.raises(error, match=r"column 'NOTE' has an extension type") as refused:
        read(tmp_path)
    assert str(refused.value).count(str(path)) == 1
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "marker").exists()


def test_a_cached_table_that_would_be_unpickled_counts_as_none(tmp_path: Path) -> None:
    pickled(tmp_path / "key.parquet", tmp_path / "marker")
    assert read_cached("key", tmp_path) is None
    assert not (tmp_path / "marker").exists()


def test_simulated_rows_that_would_be_unpickled_are_simulated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulate(spec: object) -> pd.DataFrame:
        raise LookupError("simulated again")

    monkeypatch.setattr(pretraining, "simulate", simulate)
    folder = RunFolder(tmp_path)
    pickled(folder.pretrained / pretraining.SIMULATED_ROWS, tmp_path / "marker")
    run: Any = SimpleNamespace(folder=folder, spec=None)
    with pytest.raises(LookupError, match="simulated again"):
        pretraining._simulated_rows(run)
    assert not (tmp_path / "marker").exists()


class Strange(pa.ExtensionType):
    """An extension type that Arrow may or may not know."""

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), "desisky_tune.strange")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, written: bytes) -> Strange:
        return cls()


@pytest.fixture(params=[True, False], ids=["known", "unknown"])
def known(request: pytest.FixtureRequest) -> Iterator[None]:
    """Arrow knows the type, or does not."""
    if request.param:
        pa.register_extension_type(Strange())
    yield
    if request.param:
        pa.unregister_extension_type("desisky_tune.strange")


STRANGE = pa.ExtensionArray.from_storage(Strange(), pa.array([b"x"], pa.large_binary()))
ONE = pa.array([0, 1], pa.int32())
NESTED = {
    "itself": STRANGE,
    "list": pa.ListArray.from_arrays(ONE, STRANGE),
    "fixed": pa.FixedSizeListArray.from_arrays(STRANGE, 1),
    "struct": pa.StructArray.from_arrays([STRANGE], ["field"]),
    "map": pa.MapArray.from_arrays(ONE, pa.array(["key"]), STRANGE),
    "deep": pa.ListArray.from_arrays(ONE, pa.StructArray.from_arrays([STRANGE], ["field"])),
}


@pytest.mark.parametrize("nesting", NESTED)
@pytest.mark.parametrize("columns", [None, ["EXPID"]], ids=["all", "another"])
def test_an_extension_type_is_refused_wherever_it_stands(
    nesting: str, columns: list[str] | None, known: None, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"EXPID": [1], "NOTE": NESTED[nesting]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'NOTE' has an extension type"):
        read_parquet(tmp_path / "t.parquet", columns)


def test_a_plain_table_comes_back_as_it_went(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "EXPID": np.arange(3),
            "SKY_MAG_V": np.array([21.5, np.nan, 20.0], dtype=np.float32),
            "PROGRAM": pd.Categorical(["DARK", "BRIGHT", "DARK"]),
            "TILE": pd.array([1, None, 3], dtype="Int64"),
            "OPEN": [True, False, True],
            "NOTE": ["a", "b", None],
            "TIME": pd.to_datetime(["2021-01-01", "2021-01-02", "2021-01-03"], utc=True),
        }
    )
    frame.attrs = {"v_derived": True}
    frame.to_parquet(tmp_path / "t.parquet")
    read = read_parquet(tmp_path / "t.parquet").to_pandas()
    pd.testing.assert_frame_equal(read, frame)
    assert read.attrs == frame.attrs
    some = read_parquet(tmp_path / "t.parquet", ["TILE"], [("EXPID", "in", [0, 2])])
    assert some.to_pydict() == {"TILE": [1, 3]}


def test_json_and_uuids_of_other_programs_are_text_and_bytes(tmp_path: Path) -> None:
    table = pa.table(
        {"NOTE": pa.array(["{}"], pa.json_()), "ID": pa.array([bytes(range(16))], pa.uuid())}
    )
    pq.write_table(table, tmp_path / "t.parquet", store_schema=False)
    read = read_parquet(tmp_path / "t.parquet")
    assert read.to_pydict() == {"NOTE": ["{}"], "ID": [bytes(range(16))]}
