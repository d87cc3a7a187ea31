"""The one place that writes a search's records: a Ray Tune callback in the driver."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper

from desisky_tune.errors import StorageError
from desisky_tune.search.events import Event, EventSink, TrialFinished, TrialReported
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.local import sweep
from desisky_tune.search.records import Ledger, TrialRecord, best_record, finish

#: Trials that may fail one after another, before any has completed, until a search gives up.
FAILURES_IN_A_ROW = 8


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
    ) -> None:
        self._folder = folder
        self._ledger = Ledger(folder.ledger if ledger is None else ledger)
        self._records = {record.number: record for record in known}
        self._started = set(folder.read_started()) | set(self._records)
        self._clock: dict[int, float] = {}
        self._total = total
        self._max_epochs = max_epochs
        self._max_deaths = max_deaths
        self._deaths = deaths
        self._seed = seed
        self._emit = emit
        self.failures_in_a_row = 0
        #: Numbers of the trials whose process died and that may be tried once more.
        self.died: set[int] = set()
        #: Why nothing more can be written, which ends the session; None while all is well.
        self.broken: StorageError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the watcher: Ray Tune pickles its callbacks to disk."""
        return {**self.__dict__, "_emit": _nobody}

    @property
    def records(self) -> list[TrialRecord]:
        """All finished trials, by number."""
        return [self._records[number] for number in sorted(self._records)]

    @property
    def gives_up(self) -> bool:
        """Whether trials failed one after another, and none has given a figure."""
        good = any(record.state != "FAIL" for record in self._records.values())
        return not good and self.failures_in_a_row >= FAILURES_IN_A_ROW

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Write down that a trial was handed out, before its first epoch."""
        number, configuration = _identity(trial)
        self._clock.setdefault(number, time.time())
        if number not in self._started:
            self._started.add(number)
            with self._keeping_faults():
                self._folder.note_started(number, configuration)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass a report on."""
        number, _ = _identity(trial)
        if result.get("reason") is None:
            self._emit(TrialReported(number, int(result["epochs"]), float(result["objective"])))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Record a trial that ended by itself or was pruned."""
        self._record(trial, trial.last_result, reason=trial.last_result.get("reason"))

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Count a death after which Ray Tune starts the trial again by itself."""
        self._deaths[_identity(trial)[0]] += 1

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Record a trial whose process died more often than it may.

        Ray Tune gives a trial up at once when its process dies between two trials.
        """
        number, _ = _identity(trial)
        self._deaths[number] += 1
        reason = _reason(trial)
        if "StorageError: " in reason:
            # Not this trial's fault, and the next one would meet it too.
            self.broken = self.broken or StorageError(reason.split("StorageError: ", 1)[1])
        elif self._deaths[number] <= self._max_deaths:
            self.died.add(number)
        else:
            self._record(trial, trial.last_result or {}, reason=reason)

    @contextmanager
    def _keeping_faults(self) -> Iterator[None]:
        """Keep a fault of the storage for who runs the session: Ray Tune would swallow it."""
        try:
            yield
        except StorageError as fault:
            self.broken = self.broken or fault

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
        with self._keeping_faults():
            self._ledger.append(record)
        if self.broken is not None:
            return
        self._records[number] = record
        sweep(self._folder.trials, self._records.values())
        self.failures_in_a_row = self.failures_in_a_row + 1 if record.state == "FAIL" else 0
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
        """Stop everything when the recorder gives up, or can write no more."""
        return self._recorder.gives_up or self._recorder.broken is not None


def _identity(trial: Any) -> tuple[int, dict[str, Any]]:
    configuration = {name: value for name, value in trial.config.items() if name != "trial"}
    return int(trial.config["trial"]), configuration


def _reason(trial: Any) -> str:
    error = trial.get_error() if hasattr(trial, "get_error") else None
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    if not lines:
        return "the trial's process ended without saying why"
    # Ray wraps the cause: what was raised stands in the last line, the kind of death in the first.
    text = lines[-1] if "Error" in lines[-1] else lines[0]
    return text[:500]


def _nobody(event: Event) -> None:
    """Watches in place of whoever watched the process that pickled a recorder."""
