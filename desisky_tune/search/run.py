"""A search from a specification to a measured winner, and its continuation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desisky_tune.data.features import FeatureTable, load_features, source_path
from desisky_tune.data.fits import has_spectra_layout
from desisky_tune.data.splits import Split, make_split
from desisky_tune.data.tables import is_fits
from desisky_tune.errors import SearchError
from desisky_tune.ray_session import ray_session
from desisky_tune.search.events import (
    DataReady,
    Event,
    EventSink,
    SearchFinished,
)
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.leaderboard import leaderboard
from desisky_tune.search.local import sweep
from desisky_tune.search.origin import now, read_table_of, write_run
from desisky_tune.search.records import (
    Ledger,
    TrialRecord,
    best_record,
    remaining_trials,
    write_tables,
)
from desisky_tune.search.space import SearchSpec, load_spec, spec_from_dict
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
    # A table needs no Ray, so that its faults are told before one is started.
    table = None if _made_by_ray(spec.data.source) else _features(spec)
    with ray_session(address=address, dashboard=dashboard) as ray:
        table = table or _features(spec, address=address)
        split = make_split(
            table.frame, spec.split.by, fractions=spec.split.fractions, seed=spec.split.seed
        )
        folder = RunFolder.create(runs, spec.name if name is None else name, exact=name is not None)
        write_run(folder, spec, table, split)
        return _session(folder, spec, table, split, ray, address, emit, started)


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
    folder = RunFolder.open(run_dir)
    content = folder.read_search()
    spec = spec_from_dict(content["spec"], where=str(folder.search_json))
    table = read_table_of(folder, content)
    split = Split.from_exposures(content["split"], table.frame)
    if remaining_trials(spec.search.trials, Ledger(folder.ledger).records()) == 0:
        return _finish(folder, spec, table, split, emit, started)
    with ray_session(address=address, dashboard=dashboard) as ray:
        return _session(folder, spec, table, split, ray, address, emit, started)


def _session(
    folder: RunFolder,
    spec: SearchSpec,
    table: FeatureTable,
    split: Split,
    ray: Any,
    address: str | None,
    emit: EventSink,
    started: float,
) -> SearchResult:
    """Run the trials that are still to be run, then finish."""
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    emit(
        DataReady(
            rows={part: len(rows) for part, rows in parts.items()},
            nights={
                part: int(table.frame["NIGHT"].iloc[rows].nunique()) for part, rows in parts.items()
            },
            v_derived=table.v_derived,
            provenance=dict(table.provenance),
        )
    )
    from desisky_tune.search.session import run_trials  # imports Ray, which has begun

    run_trials(folder, spec, table, split, ray, emit)
    return _finish(folder, spec, table, split, emit, started)


def _finish(
    folder: RunFolder,
    spec: SearchSpec,
    table: FeatureTable,
    split: Split,
    emit: EventSink,
    started: float,
) -> SearchResult:
    """Write the tables, choose the winner, write it, measure it."""
    records = sorted(Ledger(folder.ledger).records(), key=lambda record: record.number)
    write_tables(records, folder.path)
    sweep(folder.trials, [record.number for record in records])
    winner = best_record(records)
    if winner is None:
        raise SearchError(
            f"no trial completed ({len(records)} ended, none of them after "
            f"{spec.training.epochs} epochs): there is no winner in {folder.path}"
        )
    evaluation = crown(folder, winner, records, table, split)
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


def _made_by_ray(source: str) -> bool:
    path = source_path(source)
    return is_fits(path) and has_spectra_layout(path)


def _features(spec: SearchSpec, address: str | None = None) -> FeatureTable:
    return load_features(
        spec.data.source,
        spec.data.subset,
        eclipse=spec.data.eclipse,
        exclude_known_bad=spec.data.exclude_known_bad,
        address=address,
    )


def _ignore(event: Event) -> None:
    """Nobody watches."""
