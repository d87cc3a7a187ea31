"""Outages of a run's storage: told once each, whoever meets them, and counted.

The search itself and every engine meet an outage where they write next, again and again until
it is over. An engine passes what it meets to the dispatcher (`EngineStorage`), where the driver
finds it beside the engines' figures; `Outages` makes one notice of it all, and one when storage
is back. Where no trial runs, `through_outages` waits by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from desisky_tune.errors import DesiskyTuneError, RunError, StorageError, StorageLostError
from desisky_tune.search import patience
from desisky_tune.search.events import EventSink, StorageChanged

if TYPE_CHECKING:
    from desisky_tune.search.folder import RunFolder
    from desisky_tune.search.patience import Result

#: How long after a success a failure is not yet a new outage (s): it may have been met before, and
#: told late. One that is new is met again.
LATE = 1.0

#: When storage was tried (s, Unix), and why that failed; None where it worked again.
Attempt = tuple[float, str | None]


class EngineStorage:
    """An engine's side: tells the dispatcher what the files of its trials meet.

    Parameters
    ----------
    dispatcher
        Handle of the `desisky_tune.search.dispatch.Dispatcher`.
    engine
        The engine's name.
    """

    def __init__(self, dispatcher: Any, engine: str) -> None:
        self._dispatcher = dispatcher
        self._engine = engine

    def failed(self, why: str) -> None:
        """Pass on that an attempt failed."""
        self._dispatcher.tried_storage.remote(self._engine, why)

    def worked(self) -> None:
        """Pass on that one succeeded after it had failed."""
        self._dispatcher.tried_storage.remote(self._engine, None)


class Outages:
    """The driver's side: which outage is new, and when it is over.

    Those who wait try again at moments of their own, and what they met is heard late: an attempt
    that failed before another one succeeded is no new outage.

    Parameters
    ----------
    emit
        Told when storage begins to fail, and when it is back.
    clock
        Seconds since the epoch of Unix: that of the dispatcher's machine, which is the driver's.
    meanwhile
        What goes on beside an outage, for the notice of it.
    """

    def __init__(
        self,
        emit: EventSink,
        clock: Callable[[], float] = time.time,
        *,
        meanwhile: str = ", trials train on to their rungs",
    ) -> None:
        self._emit = emit
        self._clock = clock
        self._meanwhile = meanwhile
        self._since: float | None = None
        self._worked = float("-inf")
        self._count = 0
        self._seconds = 0.0

    def failed(self, why: str) -> None:
        """Hear of an attempt of the driver's that failed now."""
        self.heard([(self._clock(), why)])

    def worked(self) -> None:
        """Hear of an attempt of the driver's that succeeded now."""
        self.heard([(self._clock(), None)])

    def heard(self, attempts: Iterable[Attempt]) -> None:
        """Hear of attempts, each kind in the order in which they were made."""
        for at, why in attempts:
            if why is None:
                self._end(at)
            elif self._since is None and at > self._worked + LATE:
                self._begin(at, why)

    def taken(self) -> tuple[int, float]:
        """Return how many outages ended since the last call, and how long they were (s)."""
        found = self._count, self._seconds
        self._count, self._seconds = 0, 0.0
        return found

    def _begin(self, at: float, why: str) -> None:
        self._since = at
        self._emit(
            StorageChanged(
                f"storage fails since {datetime.fromtimestamp(at, UTC):%H:%M:%S} UTC: {why}; "
                f"trying again for up to {patience.PATIENCE_SECONDS:g} s{self._meanwhile}",
                failing=True,
            )
        )

    def _end(self, at: float) -> None:
        self._worked = max(self._worked, at)
        if self._since is None:
            return
        seconds = max(0.0, at - self._since)
        self._since = None
        self._count += 1
        self._seconds += seconds
        self._emit(StorageChanged(f"storage is back after {seconds:.0f} s", failing=False))


def through_outages(folder: RunFolder, action: Callable[[], Result], emit: EventSink) -> Result:
    """Do what is to be done with a run's files while no trial runs; where they fail, once more.

    Parameters
    ----------
    folder
        The run.
    action
        Can be done again, wherever it was cut off.
    emit
        Told where storage fails, and when it is back.

    Raises
    ------
    StorageLostError
        When storage does not come back.
    RunError
        When a file is missing while storage stands.
    """

    def attempt() -> Result:
        # An empty mount point is no run whose trials have no records.
        patience.check_storage(folder.search_json)
        try:
            return action()
        except DesiskyTuneError as fault:
            if isinstance(fault, StorageError):
                raise
            check_run(folder)
            if isinstance(fault, OSError):
                raise RunError(str(fault)) from fault  # waiting would not bring it
            raise

    try:
        return patience.patiently(attempt, watch=Outages(emit, meanwhile=""))
    except OSError as lost:
        raise lost_storage(folder, lost) from lost


def check_run(folder: RunFolder) -> None:
    """See whether a run can be written where it lies: its folder, and its URL where it has one.

    Raises
    ------
    StorageError
        When it cannot.
    """
    patience.check_storage(folder.search_json)
    if folder.mirror is not None:
        folder.mirror.check()


def lost_storage(folder: RunFolder, cause: Exception) -> StorageLostError:
    """Return what a search raises that ends for want of storage."""
    return StorageLostError(
        f"storage fails and does not come back ({cause}); when it has, continue with "
        f"'desisky-tune resume {folder.place}'"
    )
