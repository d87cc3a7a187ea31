"""One large file over HTTP: resumed where it broke, checked, and renamed when whole."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from desisky_tune.errors import DownloadError, StorageError
from desisky_tune.files import sha256_file

#: Called with the bytes that are there and the bytes expected (None where unknown).
Progress = Callable[[int, int | None], None]

_CHUNK = 1 << 20
_TIMEOUT_S = 60.0


def fetch(
    url: str,
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    attempts: int = 3,
) -> Path:
    """Download a file; what arrived before a break is kept and continued.

    The bytes go to ``<name>.part`` beside `path`, which gets its name only when the
    file is whole and, where `sha256` is given, has that checksum. A connection that
    breaks is taken up again as long as an attempt brought something; a later call
    continues from the same ``.part``, unless the file on the server has changed since.

    Parameters
    ----------
    url
        Where from.
    path
        Where to; the folder is created.
    sha256
        Expected checksum, 64 hex digits; ``None`` to accept whatever comes.
    progress
        Told of the bytes so far; a bar on the terminal is :func:`progress_bar`.
    attempts
        Connections to try in one call.

    Raises
    ------
    DownloadError
        No network, an answer that is no file, a connection that stays broken, another
        process downloading the same file, or the wrong checksum (the bytes are then
        thrown away).
    StorageError
        When the file cannot be written.
    """
    target = Path(path)
    part = target.with_name(target.name + ".part")
    note = target.with_name(target.name + ".part.json")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as stream, _alone(stream, target):
            try:
                _receive_all(url, stream, note, progress or _silent, attempts, target)
            except DownloadError:
                if stream.tell() == 0:  # nothing that another attempt could continue
                    part.unlink()
                raise
            stream.flush()
            os.fsync(stream.fileno())
            if sha256 is not None:
                _check(part, note, sha256, url)
            os.replace(part, target)
            note.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, DownloadError | StorageError) or error.errno is None:
            raise
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    return target


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """Yield a progress callback that draws a bar on stderr, if that is a terminal."""
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    with bars.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _silent(done: int, total: int | None) -> None:
    return None


@contextmanager
def _alone(stream: IO[bytes], target: Path) -> Iterator[None]:
    """Hold the part file for this process: two writers would interleave their bytes."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DownloadError(f"{target}: another process is downloading it") from error
    yield


def _receive_all(
    url: str, stream: IO[bytes], note: Path, progress: Progress, attempts: int, target: Path
) -> None:
    """Fill the part file, over several connections if need be."""
    for attempt in range(1, attempts + 1):
        before = stream.tell()
        reason = _receive(url, stream, note, progress, target)
        if reason is None:
            return
        if attempt == attempts or stream.tell() <= before:
            raise DownloadError(
                f"{url}: {reason}; {stream.tell()} bytes are kept in {target}.part: "
                "run again to continue"
            )


def _receive(
    url: str, stream: IO[bytes], note: Path, progress: Progress, target: Path
) -> str | None:
    """Read one connection to its end; return why the file is not whole, or None."""
    have = stream.tell()
    validator = _read_note(note, url)
    if have and validator is None:
        # Bytes whose origin is not known cannot be continued.
        _restart(stream)
        have = 0
    request = urllib.request.Request(url)
    # Otherwise a compressing proxy would make ranges meaningless.
    request.add_header("Accept-Encoding", "identity")
    if have:
        request.add_header("Range", f"bytes={have}-")
        if validator:
            request.add_header("If-Range", validator)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:
                return _settle_range(error.headers.get("Content-Range"), stream, have)
            raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f"{url}: cannot be reached ({_reason(error)}); with the file from elsewhere, "
            f"place it at {target}"
        ) from error
    with response:
        return _store(response, url, stream, note, progress)


def _store(
    response: Any, url: str, stream: IO[bytes], note: Path, progress: Progress
) -> str | None:
    """Append an answer's body; return why it is not whole, or None."""
    if response.status != 206:
        # The server sends the whole file: it knows no ranges, or the file has changed.
        _restart(stream)
    start = stream.tell()
    length = response.headers.get("Content-Length")
    total = start + int(length) if length is not None else None
    validator = response.headers.get("ETag") or ""
    if not validator or validator.startswith("W/"):  # a weak one is no ground for a range
        validator = response.headers.get("Last-Modified") or ""
    note.write_text(json.dumps({"url": url, "validator": validator}))
    progress(start, total)
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            return f"the connection broke at {stream.tell()} bytes ({_reason(error)})"
        if not chunk:
            break
        stream.write(chunk)
        progress(stream.tell(), total)
    if total is not None and stream.tell() < total:
        return f"the connection broke at {stream.tell()} of {total} bytes"
    return None


def _settle_range(content_range: str | None, stream: IO[bytes], have: int) -> str | None:
    """Judge an answer 416: the part file is whole already, or longer than the file is."""
    total = (content_range or "").rpartition("/")[2]
    if total.isdigit() and int(total) == have:
        return None
    _restart(stream)
    return f"the {have} bytes kept from before do not fit the file on the server"


def _restart(stream: IO[bytes]) -> None:
    stream.seek(0)
    stream.truncate()


def _read_note(note: Path, url: str) -> str | None:
    """Return the validator that came with the part file, None where it is another's."""
    try:
        written = json.loads(note.read_text())
        return str(written["validator"]) if written["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check(part: Path, note: Path, expected: str, url: str) -> None:
    actual = sha256_file(part)
    if actual != expected.lower():
        part.unlink()
        note.unlink(missing_ok=True)
        raise DownloadError(
            f"{url}: wrong checksum: SHA-256 {actual}, expected {expected}; "
            "what was downloaded is thrown away"
        )


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", error)
    return (
        " ".join(str(getattr(reason, "strerror", None) or reason).split()) or type(error).__name__
    )
