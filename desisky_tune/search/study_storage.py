"""Where a study lives: in memory, for whoever suggests, and in a file, for whoever looks.

A suggestion reads the whole study, and Optuna's storage of a file takes a dozen transactions a
trial: together more than half of what a driver does. So the study that is asked is in memory, and
the file is written behind it, mostly a trial at a time when it has ended. The file is for people
(optuna-dashboard); a resume writes it anew from the ledger.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL
from sqlalchemy.exc import DatabaseError

from desisky_tune.errors import RunError, StorageError

#: How long a trial that runs may be away from the file, or its reports (s).
PERIOD = 2.0


class StudyStorage(InMemoryStorage):
    """The study of a file, kept in memory and written to the file behind it.

    Each report and each end of a trial takes the time to write one trial that is due: one that
    has ended, or that runs for longer than `PERIOD`. `flush` writes all.

    Parameters
    ----------
    path
        The study's file (sqlite); it is made when missing. It holds one study, and nobody else
        may write to it.

    Raises
    ------
    StorageError
        When it cannot be opened, or is no study.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._file = open_storage(path)
        self._study = self._there = -1
        #: By number: what the file holds of a trial, and its id there. A trial that changes is
        #: replaced by another object.
        self._known: list[FrozenTrial] = []
        self._ids: list[int] = []
        #: Trials that run, or wait, in the file, and since when it says the same of them.
        self._open: dict[int, float] = {}
        #: Since when the first trial that the file does not hold has been seen to run.
        self._head_since: float | None = None
        self._broken = False
        for study in self._file.get_all_studies():
            self._study = super().create_new_study(study.directions, study.study_name)
            self._there = study._study_id
            for trial in self._file.get_all_trials(self._there, deepcopy=False):
                super().create_new_trial(self._study, trial)
                self._ids.append(trial._trial_id)
            self._known = self._trials()
            self._open = {t.number: 0.0 for t in self._known if not t.state.is_finished()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the file: Ray Tune keeps a copy of its searcher, which nobody asks."""
        return StudyStorage, (self.path,)

    def create_new_study(
        self, directions: Sequence[optuna.study.StudyDirection], study_name: str | None = None
    ) -> int:
        """Make the study, here and in the file."""
        self._study = super().create_new_study(directions, study_name)
        name = self.get_study_name_from_id(self._study)
        self._there = self._file.create_new_study(directions, name)
        return self._study

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set a trial's state; where it has ended, write what is due."""
        done = super().set_trial_state_values(trial_id, state, values)
        if state.is_finished():
            self._write(due_only=True)
        return done

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Set an intermediate value, and write what is due."""
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._write(due_only=True)

    def flush(self) -> None:
        """Write all that has changed.

        Raises
        ------
        RunError
            When something else has written to the file.
        StorageInternalError, DatabaseError
            When the file cannot be written.
        """
        while self._write():
            pass

    def close(self) -> None:
        """Write what has changed, unless that failed before, and let go of the file."""
        try:
            if not self._broken:
                self.flush()
        finally:
            close_storage(self._file)

    def _trials(self) -> list[FrozenTrial]:
        return self.get_all_trials(self._study, deepcopy=False)

    def _write(self, *, due_only: bool = False) -> bool:
        """Write one trial that has changed; return whether there was one."""
        now, trials = time.monotonic(), self._trials()
        number = next(
            (
                number
                for number, since in self._open.items()
                if trials[number] is not self._known[number]
                and (not due_only or trials[number].state.is_finished() or now - since > PERIOD)
            ),
            len(self._known),
        )
        if number == len(trials):
            return False
        trial = trials[number]
        is_new = number == len(self._known)
        if is_new and due_only and not trial.state.is_finished():
            # It is written once, when it has ended, if that does not take long.
            self._head_since = self._head_since or now
            if now - self._head_since <= PERIOD:
                return False
        try:
            if is_new:
                self._append(number, trial)
                self._head_since = None
            else:
                self._update(self._ids[number], self._known[number], trial)
        except (DatabaseError, StorageInternalError):
            self._broken = True
            raise
        self._known[number] = trial
        self._open[number] = now
        if trial.state.is_finished():
            del self._open[number]
        return True

    def _append(self, number: int, trial: FrozenTrial) -> None:
        there = self._file.create_new_trial(self._there, trial)
        if self._file.get_trial_number_from_id(there) != number:
            raise RunError(f"{self.path}: something else is writing to this study")
        self._ids.append(there)
        self._known.append(trial)

    def _update(self, there: int, before: FrozenTrial, trial: FrozenTrial) -> None:
        """Bring a trial of the file, which has not ended there, to what it is here."""
        file = self._file
        if before.state == TrialState.WAITING and trial.state != TrialState.WAITING:
            file.set_trial_state_values(there, TrialState.RUNNING)
        for name, distribution in trial.distributions.items():
            if name not in before.distributions:
                inner = distribution.to_internal_repr(trial.params[name])
                file.set_trial_param(there, name, inner, distribution)
        for step, value in trial.intermediate_values.items():
            if before.intermediate_values.get(step) != value:
                file.set_trial_intermediate_value(there, step, value)
        for key, note in trial.user_attrs.items():
            if before.user_attrs.get(key) != note:
                file.set_trial_user_attr(there, key, note)
        for key, note in trial.system_attrs.items():
            if before.system_attrs.get(key) != note:
                file.set_trial_system_attr(there, key, note)
        if trial.state.is_finished():
            file.set_trial_state_values(there, trial.state, trial.values)


class _UnsyncedConnection(sqlite3.Connection):
    """Leaves the flushing of each commit to the system.

    A trial takes several commits, and the file can always be written anew from the ledger, which
    does wait for the disk.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA synchronous = OFF")


def open_storage(path: str | Path) -> RDBStorage:
    """Open a study's file; it is made when missing.

    Raises
    ------
    StorageError
        When it cannot be opened, or is no study.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = URL.create("sqlite", database=str(Path(path).absolute()))
    try:
        return RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs={"connect_args": {"factory": _UnsyncedConnection}},
        )
    except (DatabaseError, RuntimeError) as error:
        cause = getattr(error, "orig", None) or error
        raise StorageError(f"cannot open the study {path}: {cause}") from error


def close_storage(storage: RDBStorage) -> None:
    """Close the connections to a study's file."""
    storage.remove_session()
    storage.engine.dispose()
