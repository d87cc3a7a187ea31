"""Storage that fails for a while: what is to be written is written again, until it stands.

A shared file system that hangs or fills up is nobody's fault in the search, and comes back more
often than not. Pauses grow from a quarter of a second to half a minute, and end after
`PATIENCE_SECONDS`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from desisky_tune.errors import StorageError
from desisky_tune.files import atomic_open

Result = TypeVar("Result")

#: How long storage may fail before a search ends (s); it can be resumed then.
PATIENCE_SECONDS = 600.0

#: How long a trial waits by itself (s); then its session ends, and waits for it.
TRIAL_PATIENCE = 60.0

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 30.0

#: How long a wait goes on before it looks whether it shall end (s).
_SLICE = 0.5


class StorageWatch(Protocol):
    """Hears how storage fares, from whoever writes or reads patiently."""

    def failed(self, why: str) -> None:
        """Hear of an attempt that failed."""
        ...

    def worked(self) -> None:
        """Hear of an attempt that succeeded where the one before had failed."""
        ...


def patiently(
    action: Callable[[], Result],
    *,
    watch: StorageWatch | None = None,
    give_up: Callable[[], bool] | None = None,
    limit: float | None = None,
) -> Result:
    """Do something with files; while that raises an OSError, do it again.

    Parameters
    ----------
    action
        Leaves nothing half-done when it raises.
    watch
        Told of each attempt that fails, and of one that succeeds after such.
    give_up
        Asked in every pause whether to wait no longer.
    limit
        How long to go on (s); `PATIENCE_SECONDS` by default.

    Raises
    ------
    OSError
        What the last attempt raised.
    """
    limit = PATIENCE_SECONDS if limit is None else limit
    began, pause, failed = time.monotonic(), _FIRST_PAUSE, False
    while True:
        try:
            result = action()
        except OSError as fault:
            failed = True
            if watch is not None:
                watch.failed(str(fault))
            left = began + limit - time.monotonic()
            if left <= 0 or (give_up is not None and give_up()):
                raise
            _sleep(min(pause, left), give_up)
            pause = min(2 * pause, _LONGEST_PAUSE)
            continue
        if watch is not None and failed:
            watch.worked()
        return result


def _sleep(seconds: float, give_up: Callable[[], bool] | None) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not (give_up is not None and give_up()):
        time.sleep(min(_SLICE, left))


def require_run(search_json: Path) -> None:
    """See that a node has the run's folder before it writes there.

    Raises
    ------
    StorageError
        When the run's specification is not there: the file system is not mounted on this node, or
        the folder is another one on each.
    """
    if not search_json.is_file():
        raise StorageError(
            f"{search_json} is not there on node {platform.node()}: the folder of the runs has to "
            "be one that all nodes share, or a URL"
        )


def check_storage(search_json: Path) -> None:
    """See whether a run's folder can be written, and is the run's.

    Parameters
    ----------
    search_json
        The run's specification: a mount point without its file system lacks it.

    Raises
    ------
    StorageError
        When the folder cannot be written, or is another one.
    """
    if not search_json.is_file():
        raise StorageError(f"{search_json} is gone")
    probe = search_json.with_name(".storage-probe")
    with atomic_open(probe) as stream:
        stream.write(b"can be written\n")
    try:
        probe.unlink()
    except OSError as error:
        raise StorageError(f"cannot remove {probe}: {error.strerror or error}") from error
