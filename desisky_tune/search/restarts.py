"""Another session after one that storage has ended."""

from __future__ import annotations

import re

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DatabaseError

from desisky_tune.errors import DesiskyTuneError, StorageError, StorageLostError
from desisky_tune.search import patience
from desisky_tune.search.events import EventSink, Note
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.outages import Outages
from desisky_tune.search.records import Ledger
from desisky_tune.search.stopping import StopRequest

#: Sessions in a row that storage may end without one more trial in the ledger.
FRUITLESS_RESTARTS = 5

#: Faults of storage in what Ray Tune raises: the text of a traceback, without its exceptions.
_IN_TEXT = re.compile(
    r"^(sqlite3|sqlalchemy\.exc)\.(Operational|Database)Error: "
    r"|^optuna\.exceptions\.StorageInternalError: "
    r"|^desisky_tune\.errors\.StorageError: ",
    re.MULTILINE,
)


class Restarts:
    """Waits until a run's folder can be written again, and counts in vain attempts.

    Parameters
    ----------
    folder
        The run.
    emit
        Told what happens.
    stop
        A search that was asked to end waits no longer.
    outages
        Told how storage fares.
    """

    def __init__(
        self, folder: RunFolder, emit: EventSink, stop: StopRequest, outages: Outages
    ) -> None:
        self._folder = folder
        self._emit = emit
        self._stop = stop
        self._outages = outages
        self._fruitless = 0
        self._records = -1

    def after(self, fault: Exception) -> None:
        """Return when the search can go on after a session that ended with `fault`.

        Raises
        ------
        Exception
            `fault` itself, where it has nothing to do with storage.
        StorageLostError
            When storage does not come back, or fails again and again.
        SearchInterrupted
            When the search was asked to end meanwhile.
        """
        if not self._is_storage(fault):
            raise fault
        if self._stop.asked is not None:
            raise self._stop.interruption() from fault
        try:
            patience.patiently(self._check, watch=self._outages)
        except OSError as lost:
            raise self._lost(lost) from fault
        # It may have been the engines alone that met the outage, and they have ended.
        self._outages.worked()
        records = len(Ledger(self._folder.ledger).records())
        self._fruitless = self._fruitless + 1 if records == self._records else 1
        self._records = records
        if self._fruitless > FRUITLESS_RESTARTS:
            raise self._lost(fault) from fault
        self._emit(Note("storage ended a session: the search goes on from its ledger"))

    def _is_storage(self, fault: Exception) -> bool:
        if isinstance(fault, StorageError | DatabaseError | StorageInternalError):
            return True
        if isinstance(fault, DesiskyTuneError):
            return False
        if _IN_TEXT.search(str(fault)):
            return True
        try:
            self._check()
        except OSError:
            return True
        # What Ray Tune could not write a moment ago it says as an OSError of its own.
        return isinstance(fault, OSError) and not isinstance(fault, ConnectionError)

    def _check(self) -> None:
        patience.check_storage(self._folder.search_json)

    def _lost(self, cause: Exception) -> StorageLostError:
        return StorageLostError(
            f"storage fails and does not come back ({cause}); when it has, continue with "
            f"'desisky-tune resume {self._folder.place}'"
        )
