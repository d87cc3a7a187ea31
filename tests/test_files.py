"""Files are whole or absent, and lines never run into each other."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from desisky_tune.errors import StorageError
from desisky_tune.files import append_line, atomic_open, leads_inside, sha256_file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def write_half() -> None:
        with atomic_open(path, "w") as stream:
            stream.write("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv"]


def test_a_written_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "table.csv"
    with atomic_open(path, "w") as stream:
        stream.write("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"

    def fill_disk() -> None:
        with atomic_open(path, "w"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot write .*table\.csv: No space left"):
        fill_disk()
    assert list(tmp_path.iterdir()) == []


def test_a_line_after_a_torn_one_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_line(path, "first")
    with open(path, "ab") as stream:
        stream.write(b"tor")
    append_line(path, "second")
    assert path.read_bytes().split(b"\n") == [b"first", b"tor", b"second", b""]


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 1000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 1000).hexdigest()


@pytest.mark.parametrize("place", ["search.json", "best/a.eqx", "best/..a", "report/a b/.x"])
def test_a_place_in_a_folder(place: str) -> None:
    assert leads_inside(place)


@pytest.mark.parametrize(
    "place", ["", "/a", "a/", "a//b", ".", "a/./b", "..", "best/../../a", "best\\..\\a", "a\0b"]
)
def test_a_place_that_might_be_outside_a_folder(place: str) -> None:
    assert not leads_inside(place)
