"""A study's file as the ledger has it. Nothing here imports Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from desisky_tune.errors import StorageError
from desisky_tune.files import atomic_path
from desisky_tune.search.records import TrialRecord
from desisky_tune.search.space import SearchSpec
from desisky_tune.search.study_storage import WRITE_FAULTS, StudyStorage


def rebuild_study(path: str | Path, spec: SearchSpec, records: Iterable[TrialRecord]) -> None:
    """Write a study anew from the ledger's records; the old file is replaced at once.

    Numbers, configurations, states, values and intermediate values are those of the
    records. A number that is missing between them is left waiting: `StudySearch.prime`
    takes it up, or it is suggested next.

    Parameters
    ----------
    path
        The study's file.
    spec
        The search.
    records
        The finished trials.

    Raises
    ------
    StorageError
        When it cannot be written.
    """
    by_number = {record.number: record for record in records}
    with atomic_path(path) as temporary, _as_storage_error(path):
        storage = StudyStorage(temporary)
        try:
            study = optuna.create_study(
                storage=storage,
                study_name=spec.name,
                directions=["minimize"] * len(spec.search.objectives),
            )
            study.add_trials(
                _frozen(spec, by_number[number])
                if number in by_number
                else optuna.create_trial(state=TrialState.WAITING)
                for number in range(max(by_number, default=-1) + 1)
            )
            storage.flush()
        finally:
            storage.close()
        # A driver that was killed while it wrote leaves this beside the old file; SQLite would
        # play it back into the new one.
        Path(f"{path}-journal").unlink(missing_ok=True)


@contextmanager
def _as_storage_error(path: str | Path) -> Iterator[None]:
    try:
        yield
    except WRITE_FAULTS as fault:
        raise StorageError(f"cannot write the study {path}: {fault}") from fault


def _frozen(spec: SearchSpec, record: TrialRecord) -> FrozenTrial:
    params, distributions = spec.as_params(record.configuration)
    trial = optuna.create_trial(
        state=TrialState[record.state],
        values=objective_values(spec, record),
        params=params,
        distributions=distributions,
        intermediate_values=record.rungs,
        user_attrs=notes_of(record),
    )
    trial.datetime_start = datetime.fromtimestamp(record.started)
    trial.datetime_complete = datetime.fromtimestamp(record.ended)
    return trial


def objective_values(spec: SearchSpec, record: TrialRecord) -> list[float] | None:
    """Return what a study minimises of a record, in the order of the specification's objectives.

    None for a failed trial: it has no values.
    """
    if record.state == "FAIL" or record.objective is None:
        return None
    values = {"rmse": record.objective, "parameters": float(record.parameters)}
    return [values[name] for name in spec.search.objectives]


def notes_of(record: TrialRecord) -> dict[str, Any]:
    """What a study shows of a trial beside Optuna's own fields."""
    notes: dict[str, Any] = {"configuration": record.configuration}
    if record.reason is not None:
        notes["reason"] = record.reason
    if record.rmse is not None:
        notes |= {"rmse": record.rmse, "best_epoch": record.best_epoch}
    return notes
