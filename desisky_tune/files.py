"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from desisky_tune.errors import DesiskyTuneError, StorageError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place on success.

    The temporary file keeps the suffix of `path` (writers choose formats by it).
    On any exception it is removed and `path` is left as it was.

    Parameters
    ----------
    path
        The file to be written. Its folder is created when missing.

    Raises
    ------
    StorageError
        When the file cannot be written (no permission, disk full).
    """
    with _beside(path, os.replace) as temporary:
        yield temporary


@contextmanager
def first_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path as `atomic_path` does; what stands at `path` already, stays.

    Raises
    ------
    StorageError
        When the file cannot be written.
    """

    def link(temporary: Path, target: Path) -> None:
        # A link, unlike a renaming, leaves alone what is there.
        with suppress(FileExistsError):
            os.link(temporary, target)

    with _beside(path, link) as temporary:
        yield temporary


@contextmanager
def _beside(path: str | os.PathLike[str], place: Callable[[Path, Path], None]) -> Iterator[Path]:
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.part{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        place(temporary, target)
        _fsync_folder(target.parent)
    except OSError as error:
        if isinstance(error, DesiskyTuneError):
            raise
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        # Absent after the rename, or where the folder could not even be made.
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "wb", **kwargs: Any) -> Iterator[IO[Any]]:
    """Open a file for writing that appears under its name only when complete."""
    with atomic_path(path) as temporary, open(temporary, mode, **kwargs) as stream:
        yield stream
        stream.flush()


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it into place on success.

    Raises
    ------
    StorageError
        When it cannot be written, or something stands at `path`.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            raise StorageError(f"cannot write {target}: it exists")
        temporary.rename(target)
        _fsync_folder(target.parent)
    except OSError as error:
        if isinstance(error, DesiskyTuneError):
            raise
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def leads_inside(place: str) -> bool:
    """Return whether a path with ``/``, relative to a folder, can only lead into it."""
    return not any(
        part in ("", ".", "..") or "\\" in part or "\0" in part for part in place.split("/")
    )


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append one line to a file and fsync it before returning.

    A last line that a killed process left without its end is closed first, so that
    the new one never runs into it.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a+b") as stream:
            if stream.seek(0, os.SEEK_END) > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise StorageError(f"cannot append to {target}: {error.strerror or error}") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
