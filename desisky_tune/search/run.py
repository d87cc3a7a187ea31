"""A search from a specification to a measured winner, and its continuation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.features import FeatureTable, load_features, needs_ray
from desisky_tune.data.splits import make_split
from desisky_tune.errors import DataError, SearchError
from desisky_tune.ray_session import ray_session
from desisky_tune.search.events import (
    DataReady,
    Event,
    EventSink,
    Note,
    SearchFinished,
)
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.leaderboard import leaderboard
from desisky_tune.search.local import sweep
from desisky_tune.search.origin import SearchRun, now, open_run, write_run
from desisky_tune.search.records import (
    Ledger,
    TrialRecord,
    best_record,
    remaining_trials,
    write_tables,
)
from desisky_tune.search.space import SearchSpec, default_configuration, load_spec
from desisky_tune.search.winner import crown

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves.

    Attributes
    ----------
    run_dir
        The run's folder.
    records
        Every trial, by number.
    winner
        The trial that was chosen on the validation rows.
    checkpoint
        The winner's checkpoint.
    board
        The leaderboard.
    evaluation
        RMSE (mag) of the winner, the documented default, the classical model and the
        constant, on validation and test rows; see `desisky_tune.search.winner`.
    seconds
        Wall time of this session of the search.
    """

    run_dir: Path
    records: list[TrialRecord]
    winner: TrialRecord
    checkpoint: Path
    board: pd.DataFrame
    evaluation: dict[str, Any]
    seconds: float


def run_search(
    spec: SearchSpec | str = "quick",
    *,
    runs: str | Path = "runs",
    name: str | None = None,
    address: str | None = None,
    dashboard: bool = False,
    on_event: EventSink | None = None,
) -> SearchResult:
    """Search, choose, write the winner and measure it.

    Parameters
    ----------
    spec
        The specification, or the name or path of a space file.
    runs
        Folder that holds the runs.
    name
        Name of the run; by default the specification's, with a number where it is taken.
    address
        Ray cluster to use; None starts Ray inside this process, on loopback.
    dashboard
        Start Ray's dashboard on the loopback address.
    on_event
        Told what happens, as `desisky_tune.search.events`.

    Returns
    -------
    SearchResult

    Raises
    ------
    InputError
        When the data, the split or the names cannot be used.
    SearchError
        When no trial completed.
    SearchInterrupted
        On Ctrl-C, or when the time limit ended the search early without a complete trial.
    """
    if isinstance(spec, str):
        spec = load_spec(spec)
    emit = on_event or _ignore
    started = time.time()
    _require_feasible(spec)
    # A table needs no Ray, so that its faults are told before one is started.
    table = None if needs_ray(spec.data.source) else _features(spec)
    with ray_session(address=address, dashboard=dashboard) as ray:
        table = table or _features(spec, address=address)
        split = make_split(
            table.frame, spec.split.by, fractions=spec.split.fractions, seed=spec.split.seed
        )
        folder = RunFolder.create(runs, spec.name if name is None else name, exact=name is not None)
        run = SearchRun(folder, spec, table, split)
        with folder.lock():
            write_run(run)
            _search(run, ray, emit, local=address is None)
            return _finish(run, emit, started)


def resume_search(
    run_dir: str | Path,
    *,
    address: str | None = None,
    dashboard: bool = False,
    on_event: EventSink | None = None,
) -> SearchResult:
    """Finish a search that was interrupted, from its ledger.

    Trials that had finished are kept as they are; those that were under way go on from
    their last rung; the rest is suggested as it would have been.

    Raises
    ------
    RunError
        When `run_dir` holds no run, or files of it were changed or lost.
    SearchError
        When no trial completed.
    """
    emit = on_event or _ignore
    started = time.time()
    run = open_run(run_dir)
    with run.folder.lock():
        ended = "result" in run.folder.read_search()
        records = Ledger(run.folder.ledger).records()
        if not ended and remaining_trials(run.spec.search.trials, records):
            with ray_session(address=address, dashboard=dashboard) as ray:
                _search(run, ray, emit, local=address is None)
        return _finish(run, emit, started)


def _search(run: SearchRun, ray: Any, emit: EventSink, *, local: bool) -> None:
    """Run the trials that are still to be run."""
    parts = {name: getattr(run.split, name) for name in ("train", "validation", "test")}
    nights = run.table.frame["NIGHT"]
    emit(
        DataReady(
            rows={part: len(rows) for part, rows in parts.items()},
            nights={part: int(nights.iloc[rows].nunique()) for part, rows in parts.items()},
            v_derived=run.table.v_derived,
            provenance=dict(run.table.provenance),
        )
    )
    if run.spec.search.default_first and not run.spec.default_runs:
        broken = run.spec.broken_constraint(default_configuration())
        emit(Note(f"the documented default is not run: it breaks {broken}"))
    from desisky_tune.search.session import run_trials  # imports Ray, which has begun

    run_trials(run, ray, emit, local=local)


def _finish(run: SearchRun, emit: EventSink, started: float) -> SearchResult:
    """Write the tables, choose the winner, write it, measure it."""
    folder, spec = run.folder, run.spec
    records = sorted(Ledger(folder.ledger).records(), key=lambda record: record.number)
    write_tables(records, folder.path)
    sweep(folder.trials, records)
    winner = best_record(records)
    if winner is None:
        raise SearchError(
            f"no trial completed ({len(records)} ended, none of them after "
            f"{spec.training.epochs} epochs): there is no winner in {folder.path}"
        )
    evaluation = crown(run, winner, records)
    seconds = time.time() - started
    states = {
        state: sum(record.state == state for record in records)
        for state in ("COMPLETE", "PRUNED", "FAIL")
    }
    content = folder.read_search()
    sessions = [*content.get("sessions", []), {"ended": now(), "seconds": round(seconds, 3)}]
    folder.write_search(
        {
            **{key: value for key, value in content.items() if key != "schema"},
            "sessions": sessions,
            "result": {"winner": winner.number, "objective": winner.objective, "states": states},
        }
    )
    emit(SearchFinished(folder.path, folder.best, seconds, states))
    return SearchResult(
        run_dir=folder.path,
        records=records,
        winner=winner,
        checkpoint=folder.best,
        board=leaderboard(records),
        evaluation=evaluation,
        seconds=seconds,
    )


def _features(spec: SearchSpec, address: str | None = None) -> FeatureTable:
    """Load the rows, and see that the model's features can be learnt from."""
    table = load_features(
        spec.data.source,
        spec.data.subset,
        eclipse=spec.data.eclipse,
        exclude_known_bad=spec.data.exclude_known_bad,
        address=address,
    )
    inputs, _ = table.arrays(None, spec.data.features)
    broken = (~np.isfinite(inputs)).sum(axis=0)
    for name, count in zip(spec.data.features, broken, strict=True):
        if count:
            raise DataError(
                f"data.features: {name} is no finite number in {count} of {len(inputs)} rows "
                f"of {spec.data.source}; every feature needs a value in every row"
            )
    return table


def _require_feasible(spec: SearchSpec) -> None:
    from desisky_tune.search.drafts import require_feasible  # the samplers need scipy

    require_feasible(spec)


def _ignore(event: Event) -> None:
    """Nobody watches."""
