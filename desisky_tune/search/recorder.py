"""The one place that writes a search's records: a Ray Tune callback in the driver."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper

from desisky_tune.errors import DispatcherError, EngineError, StorageError
from desisky_tune.search.events import Event, EventSink, Note, TrialFinished, TrialReported
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.local import sweep
from desisky_tune.search.outages import Outages
from desisky_tune.search.patience import patiently
from desisky_tune.search.records import (
    Ledger,
    TrialRecord,
    best_record,
    finish,
    record_to_json,
)
from desisky_tune.search.stopping import StopRequest

#: Trials that may fail one after another, before any has completed, until a search gives up.
FAILURES_IN_A_ROW = 8

#: Trials that may raise or lose their process one after another, whatever came before.
ERRORS_IN_A_ROW = 16

#: What is the fault of no trial, and ends a session.
MachineFault = StorageError | EngineError | DispatcherError


class Recorder(Callback):
    """Turns what Ray Tune says of a trial into a line of the ledger, once per trial.

    Parameters
    ----------
    folder
        The run.
    known
        Records of trials that finished in an earlier session of the run.
    total
        Trials that the whole run will have.
    max_epochs
        Epochs of a complete trial.
    max_deaths
        How often a trial's process may die before the trial has failed.
    deaths
        How often that has happened, by number; counted on here.
    seed
        Training seed of the trials.
    emit
        Told of each report and each finished trial.
    ledger
        Where the records go; by default the search's.
    stop
        Told which trials run and report, so that a search that is to end waits for them.
    outages
        Told where the run's folder cannot be written, and when it can again.
    """

    def __init__(
        self,
        folder: RunFolder,
        known: Iterable[TrialRecord],
        *,
        total: int,
        max_epochs: int,
        max_deaths: int,
        deaths: Counter[int],
        seed: int,
        emit: EventSink,
        ledger: Path | None = None,
        stop: StopRequest | None = None,
        outages: Outages | None = None,
    ) -> None:
        self._folder = folder
        self._ledger = Ledger(folder.ledger if ledger is None else ledger)
        self._records = {record.number: record for record in known}
        self._started = set(folder.read_started()) | set(self._records)
        self._clock: dict[int, float] = {}
        self._told: dict[int, int] = {}
        self._total = total
        self._max_epochs = max_epochs
        self._max_deaths = max_deaths
        self._deaths = deaths
        self._seed = seed
        self._emit = emit
        self._stop = stop or StopRequest()
        self._outages = outages
        self._told_of_stop = False
        self.failures_in_a_row = self.errors_in_a_row = 0
        #: Numbers of the trials whose process died and that may be tried once more.
        self.died: set[int] = set()
        #: Why nothing more can be written, which ends the session; None while all is well.
        self.broken: MachineFault | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the watcher: Ray Tune pickles its callbacks to disk."""
        return {**self.__dict__, "_emit": _nobody, "_outages": None}

    @property
    def records(self) -> list[TrialRecord]:
        """All finished trials, by number."""
        return [self._records[number] for number in sorted(self._records)]

    @property
    def gives_up(self) -> bool:
        """Whether trials failed one after another: nothing can be hoped of the others.

        Before one has given a figure any failure counts; after that those that raised or lost
        their process, and not those that diverged.
        """
        if self.errors_in_a_row >= ERRORS_IN_A_ROW:
            return True
        good = any(record.state != "FAIL" for record in self._records.values())
        return not good and self.failures_in_a_row >= FAILURES_IN_A_ROW

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Write down that a trial was handed out, before its first epoch."""
        number, configuration = _identity(trial)
        self._clock.setdefault(number, time.time())
        self._stop.began(number)
        if number not in self._started:
            self._started.add(number)
            self._written(lambda: self._folder.note_started(number, configuration))

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass a report on."""
        number, _ = _identity(trial)
        self._stop.reported(number)
        epochs = int(result["epochs"])
        # A trial that waited at its rung, or began again, reports where it was once more.
        if result.get("reason") is None and epochs > self._told.get(number, 0):
            self._told[number] = epochs
            self._emit(TrialReported(number, epochs, float(result["objective"])))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Record a trial that ended by itself or was pruned."""
        self._stop.ended(_identity(trial)[0])
        self._record(trial, trial.last_result, reason=trial.last_result.get("reason"))

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Count a death after which Ray Tune starts the trial again by itself.

        Where storage is to blame, or the dispatcher is gone, that would be in vain: the session
        ends.
        """
        number, _ = _identity(trial)
        self._stop.ended(number)
        fault = _machine_fault(_reason(trial))
        if isinstance(fault, StorageError | DispatcherError):
            self.broken = self.broken or fault
        else:
            self._deaths[number] += 1

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Record a trial whose process died more often than it may.

        Ray Tune gives a trial up at once when its process dies between two trials.
        """
        number, _ = _identity(trial)
        self._stop.ended(number)
        self._deaths[number] += 1
        reason = _reason(trial)
        if (fault := _machine_fault(reason)) is not None:
            # Not this trial's fault, and the next one would meet it too.
            self.broken = self.broken or fault
        elif self._deaths[number] <= self._max_deaths:
            self.died.add(number)
        else:
            self._record(trial, trial.last_result or {}, reason=reason)

    def _keep(self, record: TrialRecord) -> None:
        mirror = self._folder.mirror
        if mirror is not None:
            mirror.put_json(
                f"{self._ledger.path.stem}/{record.number:05d}.json", record_to_json(record)
            )
        self._ledger.append(record)

    def _patiently(self, write: Callable[[], object]) -> None:
        """Write to the run's folder, again and again while that fails."""

        def attempt() -> None:
            if not self._folder.search_json.is_file():
                # Not a fresh file in the place where a file system is not mounted.
                raise StorageError(f"{self._folder.search_json} is gone")
            write()

        patiently(
            attempt,
            watch=self._outages,
            give_up=lambda: self._stop.asked is not None,
        )

    def has_to_end(self) -> bool:
        """Whether the session is to end now: asked to, hopeless, or unable to write."""
        if self._stop.asked is not None and not self._told_of_stop:
            self._told_of_stop = True
            self._emit(
                Note(
                    f"{self._stop.name}: the trials that run finish their rungs, for up to "
                    f"{self._stop.grace:g} s; a second one ends the search at once"
                )
            )
        return self._stop.is_due or self.gives_up or self.broken is not None

    def _written(self, write: Callable[[], object]) -> bool:
        """Write, and return whether that was done.

        A fault of the storage is kept for who runs the session: Ray Tune would swallow it.
        """
        try:
            self._patiently(write)
        except OSError as fault:
            self.broken = self.broken or StorageError(str(fault))
            return False
        return True

    def _record(self, trial: Any, result: Mapping[str, Any], *, reason: str | None) -> None:
        number, configuration = _identity(trial)
        if number in self._records:
            return
        record = finish(
            number=number,
            configuration=configuration,
            result=result,
            max_epochs=self._max_epochs,
            reason=reason,
            seed=self._seed,
            started=self._clock.get(number, time.time()),
            ended=time.time(),
        )
        if not self._written(lambda: self._keep(record)):
            return
        self._records[number] = record
        with suppress(OSError):  # the next one removes what this one could not
            sweep(self._folder.trials, self._records.values())
        self.failures_in_a_row = self.failures_in_a_row + 1 if record.state == "FAIL" else 0
        self.errors_in_a_row = self.errors_in_a_row + 1 if reason else 0
        self._emit(
            TrialFinished(record, len(self._records), self._total, best_record(self.records))
        )


class GiveUp(Stopper):
    """Ends a session in which nothing can come of the rest."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial."""
        return False

    def stop_all(self) -> bool:
        """Stop everything when the recorder says so."""
        return self._recorder.has_to_end()


def _identity(trial: Any) -> tuple[int, dict[str, Any]]:
    configuration = {name: value for name, value in trial.config.items() if name != "trial"}
    return int(trial.config["trial"]), configuration


def _reason(trial: Any) -> str:
    lines = [line.strip() for line in _said_by(trial).splitlines() if line.strip()]
    # Ray Tune numbers the failures of a trial in the file that it keeps of them.
    said = [line for line in lines if not line.startswith("Failure # ")]
    if not said:
        return "the trial's process ended without saying why"
    # Ray wraps the cause: what was raised stands in the last line, the kind of death in the first.
    text = said[-1] if "Error" in said[-1] else said[0]
    return text[:500]


def _said_by(trial: Any) -> str:
    """Return what Ray Tune wrote down of a trial's failures."""
    with suppress(OSError, TypeError, AttributeError):
        # On this machine: the copy in the run's folder comes late, or not at all without storage.
        return Path(trial.error_file).read_text()
    return str((trial.get_error() if hasattr(trial, "get_error") else None) or "")


def _machine_fault(reason: str) -> MachineFault | None:
    """Return a fault of the machine that the reason of a trial tells of."""
    if (found := re.search(r"DispatcherError: (.*)", reason)) is not None:
        return DispatcherError(found[1])
    if (found := re.search(r"EngineError: (.*)", reason)) is not None:
        return EngineError(found[1])
    if (found := re.search(r"StorageError: (.*)|(\[Errno \d+\].*)", reason)) is not None:
        return StorageError(found[1] or found[2])
    return None


def _nobody(event: Event) -> None:
    """Watches in place of whoever watched the process that pickled a recorder."""
