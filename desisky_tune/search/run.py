"""A search from a specification to a measured winner, and its continuation."""

from __future__ import annotations

import functools
import importlib
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.features import FeatureTable, load_features, needs_ray
from desisky_tune.data.splits import make_split
from desisky_tune.errors import CheckpointError, DataError, RunError, SearchError
from desisky_tune.ray_session import ray_session
from desisky_tune.search.events import (
    DataReady,
    Event,
    EventSink,
    Note,
    SearchFinished,
    TrialFinished,
)
from desisky_tune.search.figures import SessionFigures
from desisky_tune.search.finalists import (
    conclude_finalists,
    fixed_finalists,
    recorded_finalists,
    unfinished_finalists,
)
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.folds import require_folds
from desisky_tune.search.hyperparameters import is_documented_default
from desisky_tune.search.leaderboard import leaderboard
from desisky_tune.search.local import checkpoint_path, state_path, sweep
from desisky_tune.search.origin import SearchRun, now, open_run, write_run
from desisky_tune.search.outages import through_outages
from desisky_tune.search.pretraining import prepare_pretraining
from desisky_tune.search.records import (
    Ledger,
    TrialRecord,
    best_record,
    remaining_trials,
    write_tables,
)
from desisky_tune.search.space import SearchSpec, default_configuration, load_spec
from desisky_tune.search.stopping import StopRequest, stop_signals
from desisky_tune.search.winner import crown, crown_finalist
from desisky_tune.training.native import make_ready

if TYPE_CHECKING:
    import pandas as pd

#: What writing and measuring the winner imports: two seconds, in which no trial would run.
AT_THE_END = (
    "scipy.optimize",
    "jax",
    "equinox",
    "desisky_tune.io.checkpoint",
    "scipy.stats",
    "sklearn.ensemble",
)


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves.

    Attributes
    ----------
    run_dir
        The run's folder; of a run on a URL, the copy of it that this process has.
    place
        How commands call the run: its folder, or its URL.
    records
        Every trial, by number.
    winner
        The trial that was chosen: the finalists' winner, or on the validation rows.
    checkpoint
        The winner's checkpoint.
    board
        The leaderboard.
    evaluation
        RMSE (mag) of the winner and the baselines, on validation and test rows; see
        `desisky_tune.search.winner`.
    seconds
        Wall time of this session of the search.
    """

    run_dir: Path
    place: Path | str
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
        Folder, or URL (``s3://``, ``gs://``, ``file://``), that holds the runs.
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
        On SIGTERM and Ctrl-C, or when the time limit ended the search early without a
        complete trial. No winner is chosen or measured then.
    StorageLostError
        When the run's files cannot be written, and that lasts.
    """
    if isinstance(spec, str):
        spec = load_spec(spec)
    emit = on_event or _ignore
    started = time.time()
    _require_feasible(spec)
    with stop_signals() as stop:
        # A table needs no Ray, so that its faults are told before one is started.
        table = None if needs_ray(spec.data.source) else _features(spec)
        make_ready()
        with ray_session(address=address, dashboard=dashboard) as ray:
            stop.listen()
            _require_room(spec, ray, local=address is None)
            table = table or _features(spec, address=address)
            split = make_split(
                table.frame, spec.split.by, fractions=spec.split.fractions, seed=spec.split.seed
            )
            require_folds(spec, table, split)
            prepared = prepare_pretraining(spec, table, split)
            chosen = spec.name if name is None else name
            folder = RunFolder.create(runs, chosen, exact=name is not None)
            run = SearchRun(folder, spec, table, split)
            with folder.lock():
                if prepared is not None:
                    prepared.write(folder, spec.data.features)
                write_run(run, None if prepared is None else prepared.note)
                stop.run_dir = folder.place
                figures = _search(run, ray, emit, stop, local=address is None)
                return _finish(run, emit, started, figures)


def _require_room(spec: SearchSpec, ray: Any, *, local: bool) -> None:
    """Refuse a search that has no room to train in, before there is a run of it."""
    from desisky_tune.search.engines import nodes_of, plan_engines

    plan_engines(nodes_of(ray), spec.resources, _ignore, local=local)


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
    SearchInterrupted
        See `run_search`.
    StorageLostError
        When the run's files cannot be written, and that lasts.
    """
    emit = on_event or _ignore
    started = time.time()
    with stop_signals() as stop:
        stop.run_dir = run_dir
        run = open_run(run_dir)
        stop.run_dir = run.folder.place
        with run.folder.lock():
            ended = "result" in run.folder.read_search()
            records = Ledger(run.folder.ledger).records()
            figures: list[SessionFigures] = []
            if not ended and not _unfinished(run, records):
                from desisky_tune.search.study import rebuild_study

                # Killed after its last trial had a record: the study may lack it.
                write = functools.partial(rebuild_study, run.folder.study, run.spec, records)
                through_outages(run.folder, write, emit)
            elif not ended:
                with ray_session(address=address, dashboard=dashboard) as ray:
                    stop.listen()
                    figures = _search(run, ray, emit, stop, local=address is None)
            try:
                return _finish(run, emit, started, figures)
            except (CheckpointError, RunError) as error:
                if not ended:
                    raise
                # A run that was fetched has its result, and not what that was made from.
                raise RunError(
                    f"{run.folder.place} has finished: there is nothing to resume ({error})"
                ) from error


def _search(
    run: SearchRun, ray: Any, emit: EventSink, stop: StopRequest, *, local: bool
) -> list[SessionFigures]:
    """Run the trials that are still to be run; return what the engines did."""
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
    # These import Ray, which has begun.
    from desisky_tune.search.gauges import measured
    from desisky_tune.search.session import run_stage
    from desisky_tune.search.stages import FinalistStage, SearchStage

    figures: list[SessionFigures] = []
    finalists = recorded_finalists(run)
    if finalists is None:
        known = Ledger(run.folder.ledger).records()
        with measured(run.folder.name, run.spec.search.trials, known, emit) as told:
            readied = _importing(told)
            figures += run_stage(run, SearchStage(run), ray, readied, local=local, stop=stop)
    if run.spec.evaluation.final_plan[0]:
        records = Ledger(run.folder.ledger).records()
        if best_record(records) is None:
            return figures  # there is no winner, which is told when the run is finished
        fix = functools.partial(fixed_finalists, run, records)
        finalists = through_outages(run.folder, fix, emit)
        if unfinished_finalists(run, finalists):
            configurations = {each.number: each.configuration for each in finalists}
            stage = FinalistStage(run, configurations)
            figures += run_stage(run, stage, ray, emit, local=local, stop=stop)
    return figures


def _importing(emit: EventSink) -> EventSink:
    """Import what the end of a search needs while its trials run: a library a finished trial."""
    waiting = deque(AT_THE_END)

    def sink(event: Event) -> None:
        emit(event)
        if isinstance(event, TrialFinished) and waiting:
            with suppress(Exception):  # the end will meet it again
                importlib.import_module(waiting.popleft())

    return sink


def _unfinished(run: SearchRun, records: list[TrialRecord]) -> bool:
    """Whether a stage of the run has trials without a record."""
    finalists = recorded_finalists(run)
    if finalists is not None:
        return unfinished_finalists(run, finalists) > 0
    waiting = remaining_trials(run.spec.search.trials, records) > 0
    return waiting or run.spec.evaluation.final_plan[0] > 0


def _finish(
    run: SearchRun, emit: EventSink, started: float, figures: list[SessionFigures]
) -> SearchResult:
    """Write the tables, choose the winner, write it, measure it; wait for storage that fails."""
    folder = run.folder
    records, winner, evaluation = through_outages(folder, lambda: _crowned(run), emit)
    seconds = time.time() - started
    states = {
        state: sum(record.state == state for record in records)
        for state in ("COMPLETE", "PRUNED", "FAIL")
    }
    content = through_outages(folder, folder.read_search, emit)
    session = {
        "ended": now(),
        "seconds": round(seconds, 3),
        "engines": [each.as_dict() for each in figures],
    }
    # Read once: what is written again has this session once.
    sessions = [*content.get("sessions", []), session]
    content = {
        **{key: value for key, value in content.items() if key != "schema"},
        "sessions": sessions,
        "result": {"winner": winner.number, "objective": winner.objective, "states": states},
    }
    through_outages(folder, lambda: folder.write_search(content), emit)
    through_outages(folder, lambda: folder.publish(records), emit)
    emit(SearchFinished(folder.path, folder.best, seconds, states))
    return SearchResult(
        run_dir=folder.path,
        place=folder.place,
        records=records,
        winner=winner,
        checkpoint=folder.best,
        board=leaderboard(records),
        evaluation=evaluation,
        seconds=seconds,
    )


def _crowned(run: SearchRun) -> tuple[list[TrialRecord], TrialRecord, dict[str, Any]]:
    """Return the trials, the winner and its evaluation; all of it can be done again."""
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
    _fetch_weights(folder, winner, records)
    if run.spec.evaluation.final_plan[0]:
        final = conclude_finalists(run)
        evaluation = crown_finalist(run, final)
        winner = next(
            (record for record in records if record.number == final.winner.trial),
            final.records[final.winner.number],
        )
    else:
        evaluation = crown(run, winner, records)
    return records, winner, evaluation


def _fetch_weights(folder: RunFolder, winner: TrialRecord, records: list[TrialRecord]) -> None:
    """Bring what the winner and the documented default are made from to this machine."""
    for record in records:
        if record.number == winner.number or is_documented_default(record.configuration):
            paths = checkpoint_path, state_path
            folder.fetched(*(path(folder.trials, record.number) for path in paths))


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
