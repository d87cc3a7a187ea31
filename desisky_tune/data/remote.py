"""Files that lie elsewhere: ``s3://``, ``gs://`` and whatever else pyarrow or fsspec open.

A file is copied once per node, below the cache folder, and copied again when its size or its
time of change is another one (storage that tells no time is judged by the size alone). What
reads it then reads a local file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from desisky_tune.data.cache import cache_folder
from desisky_tune.errors import DataError, DesiskyTuneError, MissingFileError, StorageError
from desisky_tune.files import atomic_open

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_CHUNK = 1 << 20

#: User and password, also in the second of two URLs (``filecache::ftp://...``).
_USER = re.compile(r"(?<=:)//[^/?#]*@")

#: The name of a query's parameter.
_PARAMETER = re.compile(r"[?&;#]([^?&;#=]*)=")

#: A word that a parameter's name has in it where its value is a secret, and the beginnings of
#: those that sign a request.
_SECRET_WORD = re.compile(
    r".*(token|secret|password|signature|credentials?|apikey|accesskey)"
    r"|sig|key|pass|passwd|passphrase|pwd|creds?|auth|authorization|sas|jwt"
)
_SIGNING = ("x-amz-", "x-goog-")


def is_url(source: str | os.PathLike[str]) -> bool:
    """Return whether a source is a URL rather than a path."""
    return "://" in str(source)


def open_storage(url: str) -> tuple[FileSystem, str]:
    """Return the file system that a URL names, and the path in it.

    Raises
    ------
    DataError
        When neither pyarrow nor fsspec opens it, or it holds a secret.
    """
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    refuse_secrets(url)
    try:
        return FileSystem.from_uri(url)
    except OSError as error:
        raise DataError(f"{url}: {_first_line(error)}") from error
    except (ArrowInvalid, NotImplementedError):
        # Not one of pyarrow's own.
        from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise DataError(f"{url}: {error}") from error
    return PyFileSystem(FSSpecHandler(files)), str(path)


def local_copy(url: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a local copy of a file that a URL names.

    Parameters
    ----------
    url
        Of one file.
    cache_dir
        Folder of the copies; by default ``sources`` beside the cached feature tables.

    Raises
    ------
    MissingFileError
        When there is no such file, or it cannot be read.
    StorageError
        When the copy cannot be written.
    """
    from pyarrow.fs import FileType

    files, path = open_storage(url)
    try:
        info = files.get_file_info(path)
        if info.type != FileType.File:
            what = "is a folder, not a file" if info.type == FileType.Directory else "no such file"
            raise MissingFileError(f"{url}: {what}")
        state = f"{url}\n{info.size}\n{info.mtime_ns}"
    except DesiskyTuneError:
        raise
    except Exception as error:  # each kind of storage has exceptions of its own
        raise MissingFileError(f"{url}: cannot be read: {_first_line(error)}") from error
    base = cache_folder().parent / "sources" if cache_dir is None else Path(cache_dir)
    folder = base / hashlib.sha256(state.encode()).hexdigest()[:24]
    target = folder / Path(urlsplit(url).path).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Processes of one node copy it once; the others wait.
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _copy(files, path, target, url)
    except OSError as error:
        if isinstance(error, DesiskyTuneError):
            raise
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def refuse_secrets(url: str) -> None:
    """Refuse a URL with a user or password in it, or with a signature or key in its query.

    Raises
    ------
    DataError
        With the URL as it is without them.
    """
    parts = urlsplit(url)
    # Decoded, because a query may hold another URL.
    names = _PARAMETER.findall(unquote(f"?{parts.query}#{parts.fragment}"))
    secrets = [name for name in names if _is_secret(name)]
    if _USER.search(url):
        what = "a user or password"
    elif secrets:
        what = f"the parameter {secrets[0]!r}"
    else:
        return
    bare = _USER.sub("//", parts._replace(query="", fragment="").geturl())
    raise DataError(
        f"{bare}: a URL with {what} in it would stand in logs and records; give credentials "
        "by the environment"
    )


def _is_secret(name: str) -> bool:
    """Return whether the value of a query's parameter is likely one, by the words of its name."""
    if name.lower().startswith(_SIGNING):
        return True
    words = re.split(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])", name)
    return any(_SECRET_WORD.fullmatch(word.lower()) for word in words)


def _copy(files: FileSystem, path: str, target: Path, url: str) -> None:
    try:
        source = files.open_input_stream(path)
    except Exception as error:  # each kind of storage has exceptions of its own
        raise MissingFileError(f"{url}: cannot be read: {_first_line(error)}") from error
    with source, atomic_open(target) as stream:
        while chunk := _read(source, url):
            stream.write(chunk)


def _read(source: Any, url: str) -> bytes:
    try:
        return bytes(source.read(_CHUNK))
    except Exception as error:  # each kind of storage has exceptions of its own
        raise MissingFileError(f"{url}: broke off: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
