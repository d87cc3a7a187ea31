"""Where a study lives: in memory, for whoever suggests, and in a file, for whoever looks.

A suggestion reads the whole study, and Optuna's storage of a file takes a dozen transactions a
trial: together more than half of what a driver does. So the study that is asked is in memory, and
the file is written behind it, all that has changed in one transaction. The file is for people
(optuna-dashboard); a resume writes it anew from the ledger.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.storages._rdb.models import (
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.trial import FrozenTrial
from sqlalchemy import URL, Connection, bindparam, delete, insert, update
from sqlalchemy.exc import DatabaseError, IntegrityError

from desisky_tune.errors import RunError, StorageError

#: How long the file may be behind the study while a search runs (s).
PERIOD = 2.0

#: What Optuna and SQLAlchemy raise of a file that cannot be written, or read.
WRITE_FAULTS = (DatabaseError, StorageInternalError)

#: How long a writer waits while somebody reads the file (s).
_PATIENCE = 1.0

Rows = Iterator[dict[str, Any]]

_TRIALS: Any = TrialModel.__table__
_NEW = insert(_TRIALS)
_CHANGED = update(_TRIALS).where(_TRIALS.c.trial_id == bindparam("there"))


class StudyStorage(InMemoryStorage):
    """The study of a file, kept in memory and written to the file behind it.

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
        #: What the file holds, by number. A trial that changes is replaced by another object.
        self._written: list[FrozenTrial] = []
        self._last = time.monotonic()
        try:
            self._read()
        except BaseException:
            close_storage(self._file)
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the file: Ray Tune keeps a copy of its searcher, which nobody asks."""
        return StudyStorage, (self.path,)

    def create_new_study(
        self, directions: Sequence[optuna.study.StudyDirection], study_name: str | None = None
    ) -> int:
        """Make the study, here and in the file."""
        held = self._study
        # Where it is the same study, this refuses it.
        self._study = super().create_new_study(directions, study_name)
        if held >= 0:
            self._study = held
            raise StorageError(f"{self.path}: holds the study of another search")
        name = self.get_study_name_from_id(self._study)
        self._there = self._file.create_new_study(directions, name)
        return self._study

    def keep(self) -> None:
        """Write what has changed, where the last time was a while ago.

        A file that cannot be written (somebody reads it just now) is tried again as late.

        Raises
        ------
        RunError
            When something else has written to the file.
        """
        if time.monotonic() - self._last >= PERIOD:
            with suppress(*WRITE_FAULTS):
                self.flush()
            self._last = time.monotonic()

    def flush(self) -> None:
        """Write what has changed.

        Raises
        ------
        RunError
            When something else has written to the file.
        DatabaseError, StorageInternalError
            When the file cannot be written (`WRITE_FAULTS`); nothing of it has been, then.
        """
        trials = self._trials()
        held = len(self._written)
        new = trials[held:]
        changed = [t for t, before in zip(trials, self._written, strict=False) if t is not before]
        if new or changed:
            try:
                with self._file.engine.begin() as connection:
                    self._write(connection, new, changed)
            except IntegrityError as error:
                raise RunError(f"{self.path}: something else is writing to this study") from error
        self._written = trials

    def close(self) -> bool:
        """Write what has changed, and let go of the file; return whether it could be written.

        Raises
        ------
        RunError
            When something else has written to the file.
        """
        try:
            self.flush()
        except WRITE_FAULTS:
            return False
        finally:
            close_storage(self._file)
        return True

    def _read(self) -> None:
        """Take up what the file holds."""
        for study in self._file.get_all_studies():
            self._study = super().create_new_study(study.directions, study.study_name)
            self._there = study._study_id
            for trial in self._file.get_all_trials(self._there, deepcopy=False):
                if trial._trial_id != _id(trial):
                    raise StorageError(f"{self.path}: holds more than the study of one search")
                super().create_new_trial(self._study, trial)
            self._written = self._trials()

    def _trials(self) -> list[FrozenTrial]:
        return self.get_all_trials(self._study, deepcopy=False) if self._study >= 0 else []

    def _write(
        self, connection: Connection, new: Sequence[FrozenTrial], changed: Sequence[FrozenTrial]
    ) -> None:
        """Write trials as Optuna does, which would take a dozen queries for each."""
        if new:
            rows = [
                {"trial_id": _id(t), "number": t.number, "study_id": self._there, **_state(t)}
                for t in new
            ]
            connection.execute(_NEW, rows)
        if changed:
            connection.execute(_CHANGED, [{"there": _id(t), **_state(t)} for t in changed])
        for table, rows_of in _PARTS:
            if changed:
                of = table.c.trial_id == bindparam("of")
                connection.execute(delete(table).where(of), [{"of": _id(t)} for t in changed])
            parts = [
                {"trial_id": _id(trial), **row}
                for trial in (*new, *changed)
                for row in rows_of(trial)
            ]
            if parts:
                connection.execute(insert(table), parts)


def _id(trial: FrozenTrial) -> int:
    """The id of a trial in a file that holds one study: Optuna counts from one."""
    return trial.number + 1


def _state(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "state": trial.state,
        "datetime_start": _utc(trial.datetime_start),
        "datetime_complete": _utc(trial.datetime_complete),
    }


def _utc(local: datetime | None) -> datetime | None:
    """Optuna's files hold UTC, its trials the local time, both without saying so."""
    return None if local is None else local.astimezone(UTC).replace(tzinfo=None)


def _values(trial: FrozenTrial) -> Rows:
    for objective, each in enumerate(trial.values or ()):
        value, kind = TrialValueModel.value_to_stored_repr(each)
        yield {"objective": objective, "value": value, "value_type": kind}


def _params(trial: FrozenTrial) -> Rows:
    for name, distribution in trial.distributions.items():
        yield {
            "param_name": name,
            "param_value": distribution.to_internal_repr(trial.params[name]),
            "distribution_json": distribution_to_json(distribution),
        }


def _reports(trial: FrozenTrial) -> Rows:
    for step, each in trial.intermediate_values.items():
        value, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(each)
        yield {"step": step, "intermediate_value": value, "intermediate_value_type": kind}


def _notes(notes: Mapping[str, Any]) -> Rows:
    for key, note in notes.items():
        yield {"key": key, "value_json": json.dumps(note)}


_PARTS: tuple[tuple[Any, Callable[[FrozenTrial], Rows]], ...] = (
    (TrialValueModel.__table__, _values),
    (TrialParamModel.__table__, _params),
    (TrialIntermediateValueModel.__table__, _reports),
    (TrialUserAttributeModel.__table__, lambda trial: _notes(trial.user_attrs)),
    (TrialSystemAttributeModel.__table__, lambda trial: _notes(trial.system_attrs)),
)


class _UnsyncedConnection(sqlite3.Connection):
    """Leaves the flushing of each commit to the system.

    The file can always be written anew from the ledger, which does wait for the disk.
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
            engine_kwargs={"connect_args": {"factory": _UnsyncedConnection, "timeout": _PATIENCE}},
        )
    except (DatabaseError, RuntimeError) as error:
        cause = getattr(error, "orig", None) or error
        raise StorageError(f"cannot open the study {path}: {cause}") from error


def close_storage(storage: RDBStorage) -> None:
    """Close the connections to a study's file."""
    storage.remove_session()
    storage.engine.dispose()
