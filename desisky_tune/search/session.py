"""Sessions of a stage: experiments of Ray Tune that run the trials without a record.

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

from desisky_tune.errors import RunError, SearchError, SearchInterrupted
from desisky_tune.search.events import EventSink, Note, SearchStarted
from desisky_tune.search.local import LocalBackend, process_environment
from desisky_tune.search.origin import SearchRun, checkpoint_header
from desisky_tune.search.recorder import GiveUp, Recorder
from desisky_tune.search.records import Ledger, best_record, remaining_trials
from desisky_tune.search.space import SearchSpec
from desisky_tune.search.stages import Stage
from desisky_tune.search.trial import Roster, SearchTrial, TrialPlan

#: What Ray Tune reads from the environment; the search draws and writes its own.
TUNE_ENVIRONMENT: Mapping[str, str] = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
}


def run_stage(run: SearchRun, stage: Stage, ray: Any, emit: EventSink, *, local: bool) -> None:
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

    Raises
    ------
    SearchError
        When every trial failed, or they failed one after another from the first on.
    SearchInterrupted
        On Ctrl-C, or when the time limit ended the search without a complete trial.
    StorageError
        When the run's files cannot be written.
    """
    limit, trials = stage.time_limit, stage.total
    deadline = None if limit is None else time.monotonic() + limit
    deaths: Counter[int] = Counter()
    first = True
    while True:
        recorder = _run_session(run, stage, ray, emit, deaths, deadline, local=local, first=first)
        records, first = recorder.records, False
        if recorder.broken is not None:
            raise recorder.broken
        failed = sum(record.state == "FAIL" for record in records)
        unfinished = remaining_trials(trials, records)
        if failed == len(records) and (not unfinished or recorder.gives_up):
            raise SearchError(
                f"all {failed} trials that ended failed, the first with: {records[0].reason}"
            )
        if not unfinished:
            return
        if len(recorder.died) < unfinished:
            break
        # Only trials whose process died are left, and each may be tried again.
        emit(Note(f"{unfinished} trials are started again: their processes died"))
    stage.conclude(records)
    done = trials - unfinished
    if deadline is None or time.monotonic() < deadline or best_record(records) is None:
        raise SearchInterrupted(run.folder.path, done, trials)
    emit(Note(f"the time limit of {limit:g} s ended the search after {done} of {trials} trials"))


def _run_session(
    run: SearchRun,
    stage: Stage,
    ray: Any,
    emit: EventSink,
    deaths: Counter[int],
    deadline: float | None,
    *,
    local: bool,
    first: bool,
) -> Recorder:
    """Run the trials that have no record yet in one experiment of Ray Tune."""
    spec, folder = run.spec, run.folder
    known = Ledger(stage.ledger).records()
    remaining = remaining_trials(stage.total, known)
    resources = {"cpu": spec.resources.cpus_per_trial, "gpu": spec.resources.gpus_per_trial}
    concurrency = min(_concurrency(spec, ray, emit, local=local), remaining)
    searcher, scheduler = stage.begin(known, concurrency)
    arrays = stage.arrays()
    plan = TrialPlan(
        rungs=stage.rungs,
        seed=spec.training.seed,
        backend=functools.partial(
            _local_backend, ray.put(arrays), spec.training, folder.trials, checkpoint_header(run)
        ),
        environment=process_environment(gpu=spec.resources.gpus_per_trial > 0),
        members=stage.members,
        keep_members=stage.keep_members,
    )
    roster = ray.remote(num_cpus=0)(Roster).remote(concurrency) if concurrency > 1 else None
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
    )
    if first:
        emit(
            SearchStarted(
                name=folder.name,
                run_dir=folder.path,
                trials=stage.total,
                epochs=spec.training.epochs,
                concurrency=concurrency,
                finished=len(known),
                dashboard_url=_dashboard_url(ray),
                stage=stage.name,
                trainings=max(1, len(stage.members)),
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
            name=f"{stage.sessions}-{len(list(folder.tune.glob(f'{stage.sessions}-*'))) + 1}",
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
        if roster is not None:
            ray.kill(roster)  # Ray Tune keeps what trials are given, and it would live on
    return recorder


def _local_backend(arrays: Any, *shared: Any) -> LocalBackend:
    """Make a trial process's backend around the arrays in Ray's object store."""
    import ray

    return LocalBackend(ray.get(arrays), *shared)


def _concurrency(spec: SearchSpec, ray: Any, emit: EventSink, *, local: bool) -> int:
    """Trials at a time: what the specification says, or what the cluster holds.

    Raises
    ------
    RunError
        When not one trial fits, and nothing can come that it would fit on.
    """
    asked, have = spec.resources, ray.cluster_resources()
    room = have.get("CPU", 0.0) / asked.cpus_per_trial
    if asked.gpus_per_trial:
        room = min(room, have.get("GPU", 0.0) / asked.gpus_per_trial)
    needs = (
        f"a trial asks for {asked.cpus_per_trial:g} CPU and {asked.gpus_per_trial:g} GPU; "
        f"Ray has {have.get('CPU', 0):g} CPU and {have.get('GPU', 0):g} GPU"
    )
    if room < 1 and (local or asked.workers is None):
        raise RunError(f"resources: {needs}")
    if asked.workers is None:
        return int(room)
    if asked.workers > room:
        emit(Note(f"{asked.workers} workers were asked for: {needs}"))
        if local:
            return int(room)
    return asked.workers


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
