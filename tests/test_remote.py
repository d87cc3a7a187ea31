"""Sources that are URLs: copied once, copied again when they change, read like files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from builders import catalogue_metadata, write_catalogue

from desisky_tune.data.features import load_features, source_path
from desisky_tune.data.fits import SpectraFile
from desisky_tune.data.remote import local_copy, refuse_secrets
from desisky_tune.data.source import _read_block
from desisky_tune.errors import DataError, MissingFileError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "desisky_tune"


def test_a_url_is_the_table_that_it_names(tmp_path: Path) -> None:
    path = source_path("sv1")
    fsspec.filesystem("memory").pipe("/bucket/exposures.csv", path.read_bytes())
    there = tmp_path / "exposures.csv"
    there.write_bytes(path.read_bytes())
    expected = load_features("sv1")
    for url in ("memory://bucket/exposures.csv", there.as_uri()):
        table = load_features(url)
        assert table.fingerprint == expected.fingerprint
        assert table.provenance["source"] == url


def test_a_file_is_copied_once_and_again_when_it_changed(tmp_path: Path, cache: Path) -> None:
    there = tmp_path / "table.csv"
    there.write_text("one")
    first = local_copy(there.as_uri())
    assert first.read_text() == "one"
    assert first.name == "table.csv"
    before = first.stat().st_ino
    assert local_copy(there.as_uri()).stat().st_ino == before
    there.write_text("three")
    assert local_copy(there.as_uri()).read_text() == "three"
    assert not [path for path in cache.rglob("*") if ".part" in path.name]


def test_a_node_without_the_copy_makes_its_own(tmp_path: Path) -> None:
    there = write_catalogue(tmp_path / "there" / "vac.fits", catalogue_metadata(20))
    file = SpectraFile.open(local_copy(there.as_uri()))
    elsewhere = replace(file, path=Path("/not/on/this/node/vac.fits"))
    rows = np.array([3, 4, 9])
    (block,) = _read_block(elsewhere, rows, True, there.as_uri())
    (expected,) = _read_block(file, rows, True)
    for column in ("EXPID", "FLUX"):
        assert block[column].equals(expected[column])


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("memory://bucket/nothing.csv", MissingFileError, "nothing.csv: no such file"),
        ("unknown://bucket/x.csv", DataError, "unknown"),
        ("s3://key:secret@bucket/x.csv", DataError, "s3://bucket/x.csv: a URL with a user"),
        ("filecache::ftp://me:secret@host/x.csv", DataError, "filecache::ftp://host/x.csv: a URL"),
        ("s3://k:secret@host/x.csv?sig=secret", DataError, "s3://host/x.csv: a URL with a user"),
    ],
)
def test_what_is_wrong_with_a_url_is_said(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        source_path(url)
    assert "secret" not in str(raised.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="is a folder"):
        local_copy(tmp_path.as_uri())


@pytest.mark.parametrize(
    "query",
    [
        "?X-Amz-Signature=hidden",
        "?AWSAccessKeyId=hidden",
        "?accesstoken=hidden",
        "?X-Amz-Date=20260101&X-Amz-Expires=60&x-amz-meta=hidden",
        "?X-Goog-Signature=hidden",
        "?sv=2024-11-04&sr=b&sig=hidden",
        "?download=1;token=hidden",
        "?%74oken=hidden",
        "?from=https%3A%2F%2Fhost%2Fx%3Fapi_key%3Dhidden",
        "?account_key=hidden",
        "?client_secret=hidden",
        "?SAS=hidden",
        "?Password=hidden",
        "#access_token=hidden",
    ],
)
def test_a_signed_url_is_refused_without_showing_its_signature(query: str) -> None:
    with pytest.raises(DataError, match=r"https://host/x\.csv: .* parameter '.*environment") as at:
        source_path(f"https://host/x.csv{query}")
    assert "hidden" not in str(at.value)
    assert "\n" not in str(at.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://host/x.csv?download=1&version=2",
        "s3://bucket/x.csv?region=us-west-2&endpoint_override=localhost%3A9000",
        "s3://bucket/key=1/token/x@2.csv",
        "s3://bucket//data@v2/x.csv",
        "https://host/x.csv?author=me&design=2&assignment=3&bypass=1",
    ],
)
def test_a_url_without_a_secret_is_taken(url: str) -> None:
    refuse_secrets(url)
