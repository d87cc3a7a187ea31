"""A search from a specification to a measured winner, and its continuation."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desisky_tune.data.features import FeatureTable, fingerprint, load_features, source_path
from desisky_tune.data.fits import has_spectra_layout
from desisky_tune.data.splits import Split, make_split
from desisky_tune.data.tables import is_fits
from desisky_tune.errors import RunError, SearchError
from desisky_tune.files import atomic_path
from desisky_tune.ray_session import ray_session
from desisky_tune.search.events import (
    DataReady,
    Event,
    EventSink,
    Note,
    SearchFinished,
    SearchStarted,
)
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.leaderboard import leaderboard
from desisky_tune.search.local import LocalBackend, SearchArrays, process_environment
from desisky_tune.search.records import Ledger, TrialRecord, best_record, write_tables
from desisky_tune.search.space import SearchSpec, load_spec, resolved_dict, spec_from_dict
from desisky_tune.search.versions import versions
from desisky_tune.search.winner import crown

if TYPE_CHECKING:
    import pandas as pd

    from desisky_tune.search.recorder import Recorder

#: What Ray Tune reads from the environment; the search draws and writes its own.
TUNE_ENVIRONMENT: Mapping[str, str] = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
}


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


class SearchInterrupted(KeyboardInterrupt):
    """A search was stopped before all its trials had run; it can be resumed."""

    def __init__(self, run_dir: Path, done: int, total: int) -> None:
        super().__init__(
            f"interrupted after {done} of {total} trials; "
            f"continue with 'desisky-tune resume {run_dir}'"
        )
        self.run_dir = run_dir


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
        _write_run(folder, spec, table, split)
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
    if _remaining(spec, Ledger(folder.ledger).records()) == 0:
        return _finish(folder, spec, table, split, emit, started)
    with ray_session(address=address, dashboard=dashboard) as ray:
        return _session(folder, spec, table, split, ray, address, emit, started)


def read_table_of(folder: RunFolder, content: Mapping[str, Any]) -> FeatureTable:
    """Read the feature table that a run was made with.

    Parameters
    ----------
    folder
        The run.
    content
        Of its `search.json`.

    Raises
    ------
    RunError
        When it is missing, or its rows are not those that `search.json` records.
    """
    import pandas as pd

    provenance = dict(content["data"])
    try:
        frame = pd.read_parquet(folder.features)
        found = fingerprint(frame)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder.features} cannot be read: {error}") from error
    if found != provenance["fingerprint"]:
        raise RunError(
            f"{folder.features}: its rows are not those of {folder.search_json} "
            f"(fingerprint {found[:12]}, recorded {provenance['fingerprint'][:12]})"
        )
    return FeatureTable(frame, provenance)


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
    _run_trials(folder, spec, table, split, ray, emit)
    return _finish(folder, spec, table, split, emit, started)


def _run_trials(
    folder: RunFolder,
    spec: SearchSpec,
    table: FeatureTable,
    split: Split,
    ray: Any,
    emit: EventSink,
) -> None:
    """Run trials until each has a record, or until something ends the search early."""
    from desisky_tune.search.searcher import rebuild_study

    limit = spec.search.time_limit
    deadline = None if limit is None else time.monotonic() + limit
    deaths: Counter[int] = Counter()
    again = False
    while True:
        recorder = _run_session(folder, spec, table, split, ray, emit, deaths, deadline, again)
        records, again = recorder.records, True
        unfinished = _remaining(spec, records)
        if records and all(record.state == "FAIL" for record in records):
            raise SearchError(
                f"all {len(records)} trials failed, the first with: {records[0].reason}"
            )
        if not unfinished:
            return
        if recorder.died and len(recorder.died) == unfinished:
            # Only trials whose process died are left, and each may be tried again.
            emit(Note(f"{unfinished} trials are started again: their processes died"))
            continue
        break
    # Trials under way were not told to the study: it is written anew from the ledger.
    rebuild_study(folder.study, spec, records)
    done = spec.search.trials - unfinished
    if deadline is None or time.monotonic() < deadline or best_record(records) is None:
        raise SearchInterrupted(folder.path, done, spec.search.trials)
    emit(
        Note(
            f"the time limit of {limit:g} s ended the search after {done} of "
            f"{spec.search.trials} trials; 'desisky-tune resume' goes on"
        )
    )


def _run_session(
    folder: RunFolder,
    spec: SearchSpec,
    table: FeatureTable,
    split: Split,
    ray: Any,
    emit: EventSink,
    deaths: Counter[int],
    deadline: float | None,
    again: bool,
) -> Recorder:
    """Run the trials that have no record yet in one experiment of Ray Tune."""
    from ray import tune

    from desisky_tune.search.recorder import GiveUp, Recorder
    from desisky_tune.search.schedulers import make_scheduler
    from desisky_tune.search.searcher import StudySearch, rebuild_study
    from desisky_tune.search.space import rungs
    from desisky_tune.search.trial import Roster, SearchTrial, TrialPlan

    known = Ledger(folder.ledger).records()
    finished = {record.number for record in known}
    handed_out = folder.read_started()
    pending = [(n, c) for n, c in sorted(handed_out.items()) if n not in finished]
    remaining = _remaining(spec, known)
    resources = {"cpu": spec.resources.cpus_per_trial, "gpu": spec.resources.gpus_per_trial}
    concurrency = min(_concurrency(spec, ray), remaining)

    continued = bool(known or pending)
    if continued:
        rebuild_study(folder.study, spec, known)
    searcher = StudySearch(spec, folder.study, workers=concurrency)
    scheduler = make_scheduler(spec)
    if continued:
        searcher.prime(known, pending)
        scheduler.prime(known)

    arrays = SearchArrays.from_table(table, split.train, split.validation, spec.data.features)
    header = checkpoint_header(folder, spec, table, split)
    plan = TrialPlan(
        rungs=tuple(rungs(spec)),
        seed=spec.training.seed,
        backend=functools.partial(
            _local_backend, ray.put(arrays), spec.training, folder.trials, header
        ),
        environment=process_environment(),
    )
    roster = ray.remote(num_cpus=0)(Roster).remote(concurrency) if concurrency > 1 else None
    recorder = Recorder(
        folder,
        known,
        total=spec.search.trials,
        max_epochs=spec.training.epochs,
        max_deaths=spec.search.max_failures,
        deaths=deaths,
        seed=spec.training.seed,
        emit=emit,
    )
    if not again:
        emit(
            SearchStarted(
                name=folder.name,
                run_dir=folder.path,
                trials=spec.search.trials,
                epochs=spec.training.epochs,
                concurrency=concurrency,
                finished=len(known),
                dashboard_url=_dashboard_url(ray),
            )
        )
    trainable = tune.with_resources(
        tune.with_parameters(SearchTrial, plan=plan, roster=roster), resources
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="min",
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=remaining,
            max_concurrent_trials=concurrency,
            reuse_actors=True,
            time_budget_s=None if deadline is None else max(1.0, deadline - time.monotonic()),
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"session-{len(list(folder.tune.glob('session-*'))) + 1}",
            storage_path=str(folder.tune),
            callbacks=[recorder],
            stop=GiveUp(recorder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=spec.search.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
        ),
    )
    try:
        with _quiet_tune():
            tuner.fit()
    finally:
        searcher.close()
    return recorder


def _local_backend(arrays: Any, *shared: Any) -> LocalBackend:
    """Make a trial process's backend around the arrays in Ray's object store."""
    import ray

    return LocalBackend(ray.get(arrays), *shared)


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
    sessions = [*content.get("sessions", []), {"ended": _now(), "seconds": round(seconds, 3)}]
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


def _write_run(folder: RunFolder, spec: SearchSpec, table: FeatureTable, split: Split) -> None:
    with atomic_path(folder.features) as temporary:
        table.frame.to_parquet(temporary)
    folder.write_search(
        {
            "name": folder.name,
            "created": _now(),
            "spec": resolved_dict(spec),
            "data": dict(table.provenance),
            "split": split.as_exposures(table.frame),
            "seed": {
                "search": spec.search.seed,
                "split": spec.split.seed,
                "training": spec.training.seed,
            },
            "versions": versions(),
        }
    )


def checkpoint_header(
    folder: RunFolder, spec: SearchSpec, table: FeatureTable, split: Split
) -> dict[str, Any]:
    """What the header of every trial's checkpoint says of its origin."""
    return {
        "search": {"name": folder.name, "sampler": spec.search.sampler, "seed": spec.search.seed},
        "data": {
            key: table.provenance[key]
            for key in ("source", "subset", "eclipse", "v_derived", "fingerprint")
            if key in table.provenance
        },
        "split": split.as_exposures(table.frame),
        "seed": spec.training.seed,
        "versions": versions(),
    }


def _remaining(spec: SearchSpec, records: list[TrialRecord]) -> int:
    return max(0, spec.search.trials - len(records))


def _concurrency(spec: SearchSpec, ray: Any) -> int:
    """Trials at a time: what the specification says, or what the cluster holds."""
    if spec.resources.workers is not None:
        return spec.resources.workers
    have = ray.cluster_resources()
    room = [have.get("CPU", 1.0) / spec.resources.cpus_per_trial]
    if spec.resources.gpus_per_trial:
        room.append(have.get("GPU", 0.0) / spec.resources.gpus_per_trial)
    if min(room) < 1:
        raise RunError(
            f"resources: a trial asks for {spec.resources.cpus_per_trial:g} CPU and "
            f"{spec.resources.gpus_per_trial:g} GPU; Ray has {have.get('CPU', 0):g} CPU and "
            f"{have.get('GPU', 0):g} GPU"
        )
    return int(min(room))


def _dashboard_url(ray: Any) -> str | None:
    url = ray.get_runtime_context().worker.node.webui_url if ray.is_initialized() else None
    return f"http://{url}" if url else None


def _trial_name(trial: Any) -> str:
    return f"trial-{int(trial.config['trial']):05d}"


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Let Ray Tune draw and log nothing: what it has to say comes through the recorder."""
    before = {name: os.environ.get(name) for name in TUNE_ENVIRONMENT}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.air", "ray.train")]
    levels = [logger.level for logger in loggers]
    os.environ.update(TUNE_ENVIRONMENT)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _ignore(event: Event) -> None:
    """Nobody watches."""
