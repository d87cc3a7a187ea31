"""Sessions of a search: experiments of Ray Tune that run the trials without a record.

A search that is neither interrupted nor loses a process is one session. Each starts from
the ledger: the study is written anew from it, the scheduler is told what earlier trials
reached, and trials that were under way come first.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray import tune

from desisky_tune.errors import SearchError, SearchInterrupted
from desisky_tune.search.engine import Work
from desisky_tune.search.engine_client import EngineBackend
from desisky_tune.search.engines import (
    TRIAL_CPUS,
    EngineWatch,
    RunningEngines,
    nodes_of,
    plan_engines,
    running_engines,
)
from desisky_tune.search.events import EventSink, Note, SearchStarted
from desisky_tune.search.figures import SessionFigures
from desisky_tune.search.folds import search_arrays, search_members
from desisky_tune.search.origin import SearchRun, checkpoint_header
from desisky_tune.search.recorder import GiveUp, Recorder
from desisky_tune.search.records import Ledger, TrialRecord, best_record, remaining_trials
from desisky_tune.search.schedulers import make_scheduler
from desisky_tune.search.searcher import StudySearch, rebuild_study
from desisky_tune.search.slot_settings import expected_trainings
from desisky_tune.search.space import rungs
from desisky_tune.search.trial import SearchTrial, TrialPlan

#: What Ray Tune reads from the environment; the search draws and writes its own.
TUNE_ENVIRONMENT: Mapping[str, str] = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
}


def run_trials(run: SearchRun, ray: Any, emit: EventSink, *, local: bool) -> list[SessionFigures]:
    """Run trials until each has a record, or until something ends the search early.

    Parameters
    ----------
    run
        The run; its ledger says what is done.
    ray
        The module, connected.
    emit
        Told what happens.
    local
        Whether Ray lives in this process: what it has not now it will never have.

    Returns
    -------
    list of SessionFigures
        What the engines did, by session.

    Raises
    ------
    EngineError
        When no engine could be started, or started again.
    RunError
        When not one trial fits on what Ray has.
    SearchError
        When every trial failed, or they failed one after another from the first on.
    SearchInterrupted
        On Ctrl-C, or when the time limit ended the search without a complete trial.
    StorageError
        When the run's files cannot be written.
    """
    spec, folder = run.spec, run.folder
    limit, trials = spec.search.time_limit, spec.search.trials
    deadline = None if limit is None else time.monotonic() + limit
    deaths: Counter[int] = Counter()
    told: list[SessionFigures] = []
    while True:
        recorder, figures = _run_session(
            run, ray, emit, deaths, deadline, local=local, first=not told
        )
        told.append(figures)
        records = recorder.records
        if recorder.broken is not None:
            raise recorder.broken
        failed = sum(record.state == "FAIL" for record in records)
        unfinished = remaining_trials(trials, records)
        if failed == len(records) and (not unfinished or recorder.gives_up):
            raise SearchError(
                f"all {failed} trials that ended failed, the first with: {records[0].reason}"
            )
        if not unfinished:
            return told
        if len(recorder.died) < unfinished:
            break
        # Only trials whose process died are left, and each may be tried again.
        emit(Note(f"{unfinished} trials are started again: their processes died"))
    # Trials under way were not told to the study: it is written anew from the ledger.
    rebuild_study(folder.study, spec, records)
    done = trials - unfinished
    if deadline is None or time.monotonic() < deadline or best_record(records) is None:
        raise SearchInterrupted(folder.path, done, trials)
    emit(Note(f"the time limit of {limit:g} s ended the search after {done} of {trials} trials"))
    return told


def _run_session(
    run: SearchRun,
    ray: Any,
    emit: EventSink,
    deaths: Counter[int],
    deadline: float | None,
    *,
    local: bool,
    first: bool,
) -> tuple[Recorder, SessionFigures]:
    """Run the trials that have no record yet in one experiment of Ray Tune."""
    spec, folder = run.spec, run.folder
    known = Ledger(folder.ledger).records()
    remaining = remaining_trials(spec.search.trials, known)
    members = max(1, len(search_members(spec)))
    plans = plan_engines(nodes_of(ray), spec.resources, emit, local=local, members=members)
    in_flight = min(sum(plan.room for plan in plans), remaining)
    if first:
        emit(
            SearchStarted(
                name=folder.name,
                run_dir=folder.path,
                trials=spec.search.trials,
                epochs=spec.training.epochs,
                concurrency=min(sum(plan.slots for plan in plans), remaining),
                finished=len(known),
                dashboard_url=_dashboard_url(ray),
            )
        )
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
    work = Work(
        run=folder.name,
        training=spec.training,
        folder=folder.trials,
        header=checkpoint_header(run),
        slots=spec.resources.slots,
        trainings=expected_trainings(spec, in_flight),
    )
    with running_engines(ray, plans, work, search_arrays(run), in_flight) as engines:
        _fit(run, recorder, known, engines, in_flight, deadline, ray=ray, emit=emit)
        figures = engines.close(len(recorder.records) - len(known))
    return recorder, figures


def _fit(
    run: SearchRun,
    recorder: Recorder,
    known: list[TrialRecord],
    engines: RunningEngines,
    in_flight: int,
    deadline: float | None,
    *,
    ray: Any,
    emit: EventSink,
) -> None:
    """Let Ray Tune run light trials, `in_flight` at a time, that ask the engines to train."""
    spec, folder = run.spec, run.folder
    finished = {record.number for record in known}
    started = sorted(folder.read_started().items())
    # Also where no trial has begun: a killed driver may have left a study with one in it.
    rebuild_study(folder.study, spec, known)
    searcher = StudySearch(spec, folder.study, workers=in_flight)
    searcher.prime(known, [(n, c) for n, c in started if n not in finished])
    scheduler = make_scheduler(spec)
    scheduler.prime(known)
    plan = TrialPlan(
        rungs=tuple(rungs(spec)),
        seed=spec.training.seed,
        backend=functools.partial(EngineBackend, engines.dispatcher, spec.search.max_failures),
        environment={},
        members=search_members(spec),
    )
    trainable = tune.with_resources(
        tune.with_parameters(SearchTrial, plan=plan, roster=engines.dispatcher),
        {"cpu": TRIAL_CPUS},
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="min",
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=remaining_trials(spec.search.trials, known),
            max_concurrent_trials=in_flight,
            reuse_actors=True,
            time_budget_s=None if deadline is None else max(1.0, deadline - time.monotonic()),
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"session-{len(list(folder.tune.glob('session-*'))) + 1}",
            storage_path=str(folder.tune),
            # In this order: a trial has its record before its engine lets go of it.
            callbacks=[recorder, EngineWatch(ray, engines.dispatcher, emit)],
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


def _dashboard_url(ray: Any) -> str | None:
    url = ray.get_runtime_context().worker.node.webui_url if ray.is_initialized() else None
    return f"http://{url}" if url else None


def _trial_name(trial: Any) -> str:
    return f"trial-{int(trial.config['trial']):05d}"


def _signal_handlers() -> dict[signal.Signals, Any]:
    """Return the handlers that Ray Tune replaces: it does so in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    return {number: handler for number, handler in found.items() if handler is not None}


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Let Ray Tune draw and log nothing: what it has to say comes through the recorder.

    Its handlers of Ctrl-C go when it has ended: left in place, they swallow the next one.
    """
    handlers = _signal_handlers()
    before = {name: os.environ.get(name) for name in TUNE_ENVIRONMENT}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.air", "ray.train")]
    levels = [logger.level for logger in loggers]
    os.environ.update(TUNE_ENVIRONMENT)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
