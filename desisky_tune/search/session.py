"""Sessions of a stage: experiments of Ray Tune that run the trials without a record.

A search that is neither interrupted nor loses a process is one session. Each starts from
the ledger: the study is written anew from it, the scheduler is told what earlier trials
reached, and trials that were under way come first.
"""

from __future__ import annotations

import functools
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ray import tune

from desisky_tune.errors import SearchError, SearchInterrupted, StorageError
from desisky_tune.ray_session import environment
from desisky_tune.search.engine import Work
from desisky_tune.search.engine_client import EngineBackend
from desisky_tune.search.engines import (
    CLOSING_PATIENCE,
    LEAVING_PATIENCE,
    TRIAL_CPUS,
    EngineWatch,
    RunningEngines,
    nodes_of,
    plan_engines,
    running_engines,
    with_room_for_all,
)
from desisky_tune.search.events import EventSink, Note, SearchStarted
from desisky_tune.search.figures import SessionFigures
from desisky_tune.search.ordering import fixed_in_flight
from desisky_tune.search.origin import SearchRun, checkpoint_header
from desisky_tune.search.outages import Outages
from desisky_tune.search.pretraining import open_pretraining
from desisky_tune.search.recorder import GiveUp, Recorder
from desisky_tune.search.records import Ledger, best_record, remaining_trials
from desisky_tune.search.restarts import Restarts
from desisky_tune.search.slot_settings import expected_trainings
from desisky_tune.search.stages import Stage
from desisky_tune.search.stopping import StopRequest
from desisky_tune.search.trial import SearchTrial, TrialPlan

#: What Ray Tune reads from the environment; the search draws and writes its own.
TUNE_ENVIRONMENT: Mapping[str, str] = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Its snapshots hold all trials each time, and nobody reads them: a resume goes by the ledger.
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
}


def run_stage(
    run: SearchRun,
    stage: Stage,
    ray: Any,
    emit: EventSink,
    *,
    local: bool,
    stop: StopRequest | None = None,
) -> list[SessionFigures]:
    """Run trials until each has a record, or until something ends the stage early.

    Parameters
    ----------
    run
        The run.
    stage
        Its search, or its finalists; the stage's ledger says what is done.
    ray
        The module, connected.
    emit
        Told what happens.
    local
        Whether Ray lives in this process: what it has not now it will never have.
    stop
        What signals ask of the search.

    Returns
    -------
    list of SessionFigures
        What the engines did, by session.

    Raises
    ------
    EngineError
        When no engine could be started, or started again.
    DispatcherError
        When the process that spreads trials over engines is lost again and again.
    RunError
        When not one trial fits on what Ray has.
    SearchError
        When every trial failed, or they failed one after another.
    SearchInterrupted
        On SIGTERM and Ctrl-C, or when the time limit ended the search without a complete
        trial.
    StorageLostError
        When the run's files cannot be written, and that lasts.
    """
    folder, stop = run.folder, stop or StopRequest()
    limit, trials = stage.time_limit, stage.total
    deadline = None if limit is None else time.monotonic() + limit
    deaths: Counter[int] = Counter()
    told: list[SessionFigures] = []
    outages = Outages(emit)
    restarts = Restarts(
        folder,
        emit,
        stop,
        outages,
        ledger=stage.ledger,
        nodes_come=not local and run.spec.resources.workers is not None,
    )
    first = True
    while True:
        try:
            records = Ledger(stage.ledger).records()
            if not remaining_trials(trials, records):
                # The driver was killed, or storage failed, just before the end.
                stage.conclude(records)
                return told
            recorder, figures, study_written = _run_session(
                run, stage, ray, emit, deaths, deadline, stop, outages, local=local, first=first
            )
        except Exception as fault:
            restarts.after(fault)
            continue
        finally:
            first = False
        if recorder.broken is None:
            outages.worked()  # the engine that waited for it may have died
        told.append(replace(figures, outages=outages.taken()))
        records = recorder.records
        if recorder.broken is not None:
            restarts.after(recorder.broken)
            continue
        failed = sum(record.state == "FAIL" for record in records)
        unfinished = remaining_trials(trials, records)
        if failed == len(records) and (not unfinished or recorder.gives_up):
            raise SearchError(
                f"all {failed} trials that ended failed, the first with: {records[0].reason}"
            )
        if stop.asked is not None:
            break
        if unfinished and recorder.gives_up:
            with suppress(StorageError):  # a resume writes it
                stage.conclude(records)
            last = max(records, key=lambda record: record.ended)
            raise SearchError(
                f"{recorder.errors_in_a_row} trials failed one after another, the last with: "
                f"{last.reason}; {trials - unfinished} of {trials} are done, and "
                f"'desisky-tune resume {folder.place}' goes on with the rest"
            )
        if not unfinished:
            if study_written:
                return told
            continue  # the study's file is written anew
        if len(recorder.died) < unfinished:
            break
        # Only trials whose process died are left, and each may be tried again.
        emit(Note(f"{unfinished} trials are started again: their processes died"))
    with suppress(StorageError):  # a resume writes it
        stage.conclude(records)
    done = trials - unfinished
    if stop.asked is not None:
        raise stop.interruption(done, trials)
    if deadline is None or time.monotonic() < deadline or best_record(records) is None:
        raise SearchInterrupted(folder.place, done, trials)
    emit(Note(f"the time limit of {limit:g} s ended the search after {done} of {trials} trials"))
    return told


def _run_session(
    run: SearchRun,
    stage: Stage,
    ray: Any,
    emit: EventSink,
    deaths: Counter[int],
    deadline: float | None,
    stop: StopRequest,
    outages: Outages,
    *,
    local: bool,
    first: bool,
) -> tuple[Recorder, SessionFigures, bool]:
    """Run the trials that have no record yet in one experiment of Ray Tune.

    The last that is returned: whether the study's file has all that was told to the study.
    """
    spec, folder = run.spec, run.folder
    known = Ledger(stage.ledger).records()
    remaining = remaining_trials(stage.total, known)
    trainings = max(1, len(stage.members))
    plans = plan_engines(
        nodes_of(ray), spec.resources, emit, local=local, members=trainings, spare=stage.spare
    )
    in_flight = min(sum(plan.room for plan in plans), remaining)
    ordered = spec.search.deterministic and stage.ordered
    if ordered:
        in_flight = fixed_in_flight(run, in_flight)
        plans = with_room_for_all(plans, in_flight)
    if first:
        emit(
            SearchStarted(
                name=folder.name,
                run_dir=folder.place,
                trials=stage.total,
                epochs=spec.training.epochs,
                concurrency=min(sum(plan.slots for plan in plans), remaining),
                finished=len(known),
                dashboard_url=_dashboard_url(ray),
                stage=stage.name,
                trainings=trainings,
            )
        )
    recorder = Recorder(
        folder,
        known,
        total=stage.total,
        max_epochs=spec.training.epochs,
        max_deaths=spec.search.max_failures,
        deaths=deaths,
        seed=spec.training.seed,
        emit=emit,
        ledger=stage.ledger,
        stop=stop,
        outages=outages,
    )
    work = Work(
        run=folder.name,
        training=spec.training,
        folder=folder.trials,
        header=checkpoint_header(run),
        trainings=expected_trainings(spec, in_flight, trainings),
        mirror=folder.mirror,
        slots=spec.resources.slots,
        pretraining=open_pretraining(run),
    )
    searcher, scheduler = stage.begin(known, in_flight, stop)
    try:
        starting = searcher.starting if ordered else in_flight
        with running_engines(ray, plans, work, stage.arrays(), starting) as engines:
            if ordered:
                engines.take_verdicts(searcher.ordering, scheduler)
            watch = EngineWatch(ray, engines.dispatcher, emit, outages)
            tuner = _tuner(
                run, stage, recorder, engines, watch, searcher, scheduler, in_flight, deadline
            )
            with _quiet_tune(), stop.finishing_rungs():
                tuner.fit()
            leaving = stop.asked is not None or recorder.broken is not None
            figures = engines.close(
                watch,
                len(recorder.records) - len(known),
                LEAVING_PATIENCE if leaving else CLOSING_PATIENCE,
            )
    finally:
        study_written = searcher.close()
    return recorder, figures, study_written


def _tuner(
    run: SearchRun,
    stage: Stage,
    recorder: Recorder,
    engines: RunningEngines,
    watch: EngineWatch,
    searcher: Any,
    scheduler: Any,
    in_flight: int,
    deadline: float | None,
) -> tune.Tuner:
    """Let Ray Tune run light trials, `in_flight` at a time, that ask the engines to train."""
    spec, folder = run.spec, run.folder
    plan = TrialPlan(
        rungs=stage.rungs,
        seed=spec.training.seed,
        backend=functools.partial(EngineBackend, engines.dispatcher, spec.search.max_failures),
        environment={},
        members=stage.members,
        keep_members=stage.keep_members,
        judged=spec.search.deterministic and stage.ordered,
    )
    trainable = tune.with_resources(
        tune.with_parameters(SearchTrial, plan=plan, roster=engines.dispatcher),
        {"cpu": TRIAL_CPUS},
    )
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="min",
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=remaining_trials(stage.total, recorder.records),
            max_concurrent_trials=in_flight,
            reuse_actors=True,
            time_budget_s=None if deadline is None else max(1.0, deadline - time.monotonic()),
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"{stage.sessions}-{len(list(folder.tune.glob(f'{stage.sessions}-*'))) + 1}",
            storage_path=str(folder.tune),
            # In this order: a trial has its record before its engine lets go of it.
            callbacks=[recorder, watch, _Keeping(searcher)],
            stop=GiveUp(recorder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=spec.search.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
        ),
    )


class _Keeping(tune.Callback):
    """Has the study's file follow the study, at each step of Ray Tune."""

    def __init__(self, searcher: Any) -> None:
        self._searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing of the searcher: Ray Tune pickles its callbacks to disk."""
        return {"_searcher": None}

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Write what is due."""
        self._searcher.keep()


def _dashboard_url(ray: Any) -> str | None:
    url = ray.get_runtime_context().worker.node.webui_url if ray.is_initialized() else None
    return f"http://{url}" if url else None


def _trial_name(trial: Any) -> str:
    return f"trial-{int(trial.config['trial']):05d}"


def _signal_handlers() -> dict[signal.Signals, Any]:
    """Return the handlers that Ray Tune replaces: it does so in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handler = signal.getsignal(signal.SIGUSR1)
    return {} if handler is None else {signal.SIGUSR1: handler}


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Let Ray Tune draw and log nothing: what it has to say comes through the recorder.

    Ctrl-C is not its to handle; its handler of SIGUSR1 goes when it has ended.
    """
    handlers = _signal_handlers()
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.air", "ray.train")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with environment(TUNE_ENVIRONMENT):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
