"""Another session after one that storage has ended, or the loss of a process that it needs."""

from __future__ import annotations

import re
from pathlib import Path

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DatabaseError

from desisky_tune.errors import DesiskyTuneError, DispatcherError, EngineError, StorageError
from desisky_tune.search import patience
from desisky_tune.search.events import EventSink, Note
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.outages import Outages, check_run, lost_storage
from desisky_tune.search.records import Ledger
from desisky_tune.search.stopping import StopRequest

#: Sessions in a row that may end so without one more trial in the ledger.
FRUITLESS_RESTARTS = 5

#: Faults of storage in what Ray Tune raises: the text of a traceback, without its exceptions.
_IN_TEXT = re.compile(
    r"^(sqlite3|sqlalchemy\.exc)\.(Operational|Database)Error: "
    r"|^optuna\.exceptions\.StorageInternalError: "
    r"|^desisky_tune\.errors\.StorageError: ",
    re.MULTILINE,
)


class Restarts:
    """Waits until a search can go on after a fault, and counts in vain attempts.

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
    ledger
        Whose records are progress; by default the search's.
    nodes_come
        Whether a search without engines waits for nodes that are to come.
    """

    def __init__(
        self,
        folder: RunFolder,
        emit: EventSink,
        stop: StopRequest,
        outages: Outages,
        *,
        ledger: Path | None = None,
        nodes_come: bool = False,
    ) -> None:
        self._folder = folder
        self._emit = emit
        self._stop = stop
        self._outages = outages
        self._ledger = Ledger(folder.ledger if ledger is None else ledger)
        self._nodes_come = nodes_come
        self._fruitless = 0
        self._records = -1

    def after(self, fault: Exception) -> None:
        """Return when the search can go on after a session that ended with `fault`.

        Raises
        ------
        Exception
            `fault` itself, where it has nothing to do with storage or a process that is gone.
        DispatcherError, EngineError
            When a new session ends in the same way again and again.
        StorageLostError
            When storage does not come back, or fails again and again.
        SearchInterrupted
            When the search was asked to end meanwhile.
        """
        gone = isinstance(fault, DispatcherError) or (
            isinstance(fault, EngineError) and self._nodes_come
        )
        if not gone and isinstance(fault, EngineError):
            raise self._with_resume(fault) from fault
        if not gone and not self._is_storage(fault):
            raise fault
        if self._stop.asked is not None:
            raise self._stop.interruption() from fault
        if gone:
            if self._in_vain():
                raise self._with_resume(fault) from fault
            self._emit(Note(f"the search goes on from its ledger with new processes: {fault}"))
            return
        try:
            patience.patiently(self._check, watch=self._outages)
        except OSError as lost:
            raise lost_storage(self._folder, lost) from fault
        # It may have been the engines alone that met the outage, and they have ended.
        self._outages.worked()
        if self._in_vain():
            raise lost_storage(self._folder, fault) from fault
        self._emit(Note("storage ended a session: the search goes on from its ledger"))

    def _in_vain(self) -> bool:
        """Count a session; return whether too many in a row brought no record."""
        records = len(self._ledger.records())
        self._fruitless = self._fruitless + 1 if records == self._records else 1
        self._records = records
        return self._fruitless > FRUITLESS_RESTARTS

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
        check_run(self._folder)

    def _with_resume(self, fault: Exception) -> Exception:
        place = self._folder.place
        return type(fault)(f"{fault}; 'desisky-tune resume {place}' goes on from the last rungs")
