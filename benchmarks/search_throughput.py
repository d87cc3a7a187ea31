"""A whole search three ways: desisky's trainer under Ray Tune, a process per trial, the engine.

    python benchmarks/search_throughput.py [--space broadband] [--trials 64] [--cores 2]

An ASHA search on the moonlit exposures of a simulated VAC (1931 rows), each way in a process of
its own beside a Ray of its own, with empty caches (`XDG_CACHE_HOME` is a new folder):

- *engine*: `run_search`, as `desisky-tune search` does it;
- *processes*: the same sampler, scheduler, records and training core, with a new Ray Tune
  process for every trial, one per core at a time, which trains by itself (`LocalBackend`);
- *desisky*: `desisky.training.BroadbandTrainer` in a Ray Tune function trainable, one per core
  at a time. It is measured for a few epochs at the default architecture and at configurations
  evenly taken from the engine's search, without the first epoch, which compiles. Its search is
  extrapolated: to every trial of the engine's search, epochs times steps per epoch times the
  mean time of a step as measured, over the number of cores. Start, compiles and the tail in
  which a core is idle are left out, in its favour.

The time of a search is that of its call, without Ray's start: reading the rows, all trials, the
winner and its measurement. What is compiled in it, beside what the engine tells of, is the native
core, in one thread: that is measured beforehand, into another folder. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _machine import describe

PACKAGES = ("desisky_tune", "ray", "jax", "jaxlib", "equinox", "optuna", "desisky")
DEFAULT = {
    "width": 128,
    "depth": 5,
    "learning_rate": 1e-4,
    "huber_delta": 0.25,
    "batch_size": 32,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--space", default="broadband")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--exposures", type=int, default=9176, help="rows of the simulated VAC")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--reference-epochs", type=int, default=4)
    parser.add_argument("--reference-trials", type=int, default=3, help="beside the default")
    parser.add_argument("--ways", nargs="+", default=["engine", "processes", "desisky"])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        way, scratch = options.worker
        answer = {"engine": by_engine, "processes": by_processes, "desisky": by_desisky}[way](
            options, Path(scratch)
        )
        print(json.dumps(answer))
        return
    print(describe(PACKAGES), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_rows(options, Path(scratch))
        found = {}
        for way in ("engine", "processes", "desisky"):
            if way in options.ways or way == "engine":
                found[way] = in_a_process(way, options, Path(scratch))
                print(f"{way}: done", file=sys.stderr)
    print(table(found, options))


def write_rows(options: argparse.Namespace, scratch: Path) -> None:
    """Simulate a VAC, and write its moonlit exposures as a table."""
    from desisky_tune.data import load_features, simulate_vac

    vac = scratch / "vac.fits"
    simulate_vac(vac, exposures=options.exposures, seed=0)
    features = load_features(vac, "moon", cache_dir=scratch / "features")
    features.frame.to_parquet(scratch / "moon.parquet")
    print(f"{len(features.frame)} moonlit exposures of {options.exposures}", end="\n\n")


def in_a_process(way: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure one way in a fresh process, with empty caches."""
    command = [sys.executable, __file__, "--worker", way, str(scratch), "--space", options.space]
    for name in ("trials", "cores", "reference_epochs", "reference_trials"):
        command += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    for each in options.set:
        command += ["--set", each]
    cache = scratch / f"cache-{way}"
    (cache / "astropy").mkdir(parents=True)  # astropy wants it to exist
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def spec_of(options: argparse.Namespace, scratch: Path) -> Any:
    """Return what is searched."""
    from desisky_tune.search.space import load_spec

    own = (
        f"data.source={scratch / 'moon.parquet'}",
        f"search.trials={options.trials}",
        f"resources.workers={options.cores}",
        "evaluation.finalists=0",
    )
    return load_spec(options.space, (*own, *options.set))


def by_engine(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Search as the package does."""
    from desisky_tune.ray_session import ray_session
    from desisky_tune.search.run import run_search

    core = seconds_of_the_core(scratch)
    with ray_session(num_cpus=options.cores):
        began = time.perf_counter()
        result = run_search(spec_of(options, scratch), runs=scratch, name="engine")
        seconds = time.perf_counter() - began
    content = json.loads((result.run_dir / "search.json").read_text())
    (figures,) = content["sessions"][-1]["engines"]
    together = figures["all"]
    return {
        "seconds": seconds,
        "trials": len(result.records),
        "epochs": sum(record.epochs for record in result.records),
        "training": together["training"],
        "compiling": together["compiling"] + core,
        "processes": sum(figures["processes"].values()),
        "shares": together["shares"],
        "done": [[record.configuration, record.epochs] for record in result.records],
    }


def seconds_of_the_core(scratch: Path) -> float:
    """Compile the native core into a folder of its own (s); 0 where there is no compiler."""
    command = "from desisky_tune.training.native import library; library()"
    elsewhere = {**os.environ, "XDG_CACHE_HOME": str(scratch / "core")}
    took = []
    for _ in ("compiles", "loads"):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", command], env=elsewhere, check=True)
        took.append(time.perf_counter() - began)
    return max(0.0, took[0] - took[1])


def by_processes(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Search with a new process for every trial, which trains by itself."""
    import functools
    from collections import Counter

    from ray import tune

    from desisky_tune.data.features import load_features
    from desisky_tune.data.splits import make_split
    from desisky_tune.ray_session import ray_session
    from desisky_tune.search.folder import RunFolder
    from desisky_tune.search.folds import search_arrays
    from desisky_tune.search.local import process_environment
    from desisky_tune.search.origin import SearchRun, write_run
    from desisky_tune.search.recorder import Recorder
    from desisky_tune.search.schedulers import make_scheduler
    from desisky_tune.search.searcher import StudySearch
    from desisky_tune.search.space import rungs
    from desisky_tune.search.trial import SearchTrial, TrialPlan

    spec = spec_of(options, scratch)
    os.environ.update({"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"})
    with ray_session(num_cpus=options.cores) as ray:
        began = time.perf_counter()
        features = load_features(spec.data.source, spec.data.subset)
        split = make_split(features.frame, spec.split.by, fractions=spec.split.fractions)
        run = SearchRun(RunFolder.create(scratch, "processes", exact=True), spec, features, split)
        write_run(run)
        recorder = Recorder(
            run.folder,
            (),
            total=spec.search.trials,
            max_epochs=spec.training.epochs,
            max_deaths=0,
            deaths=Counter(),
            seed=spec.training.seed,
            emit=lambda event: None,
        )
        backend = functools.partial(
            _backend, ray.put(search_arrays(run)), spec.training, run.folder.trials
        )
        environment = {**process_environment(gpu=False), "NPROC": "1"}
        plan = TrialPlan(tuple(rungs(spec)), spec.training.seed, backend, environment)
        searcher = StudySearch(spec, run.folder.study, workers=options.cores)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(SearchTrial, plan=plan), {"cpu": 1}),
            tune_config=tune.TuneConfig(
                metric="objective",
                mode="min",
                search_alg=searcher,
                scheduler=make_scheduler(spec),
                num_samples=spec.search.trials,
                max_concurrent_trials=options.cores,
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(run.folder.tune),
                callbacks=[recorder],
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
        searcher.close()
        seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "trials": len(recorder.records),
        "epochs": sum(record.epochs for record in recorder.records),
        "training": sum(record.seconds for record in recorder.records),
        "processes": len(recorder.records),
    }


def _backend(arrays: Any, *shared: Any) -> Any:
    """Make the backend of a trial's process around the rows in Ray's object store."""
    import ray

    from desisky_tune.search.local import LocalBackend

    return LocalBackend(ray.get(arrays), *shared)


def by_desisky(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train by desisky's trainer in Ray Tune's function trainables; return seconds per step."""
    import pandas as pd
    from ray import tune

    from desisky_tune.data.splits import make_split
    from desisky_tune.ray_session import ray_session

    spec = spec_of(options, scratch)
    frame = pd.read_parquet(scratch / "moon.parquet")
    split = make_split(frame, spec.split.by, fractions=spec.split.fractions)
    parts = [frame.iloc[split.train], frame.iloc[split.validation]]
    configurations = [DEFAULT] * options.cores
    ledger = [json.loads(line) for line in (scratch / "engine" / "ledger.jsonl").open()]
    for at in np.linspace(1, len(ledger) - 1, options.reference_trials).astype(int):
        configurations.append(ledger[at]["configuration"])
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    with ray_session(num_cpus=options.cores):
        results = tune.Tuner(
            tune.with_parameters(
                _desisky_trial, parts=parts, epochs=options.reference_epochs, scratch=str(scratch)
            ),
            param_space={"at": tune.grid_search(configurations)},
            run_config=tune.RunConfig(
                name="tune", storage_path=str(scratch / "desisky"), verbose=0
            ),
        ).fit()
        errors = [str(result.error) for result in results if result.error]
        if errors:
            raise SystemExit(errors[0])
        measured = [dict(result.metrics) for result in results]
    return {
        "default": float(np.mean([each["epoch"] for each in measured[: options.cores]])),
        "step": float(np.mean([each["step"] for each in measured])),
        "steps": [each["step"] for each in measured],
        "rows": len(parts[0]),
    }


def _desisky_trial(config: dict[str, Any], parts: list[Any], epochs: int, scratch: str) -> None:
    """Train by desisky and report the seconds of an epoch, and of a step."""
    import equinox as eqx
    import jax
    from desisky.training import (
        BroadbandTrainer,
        NumpyLoader,
        SkyBrightnessDataset,
        TrainingConfig,
    )
    from ray import tune

    from desisky_tune.data.columns import FEATURES, TARGETS

    configuration = config["at"]
    width, depth = int(configuration["width"]), int(configuration["depth"])
    model = eqx.nn.MLP(len(FEATURES), len(TARGETS), width, depth, key=jax.random.PRNGKey(0))
    loaders = []
    for part in parts:
        no_flux = np.zeros((len(part), 1), np.float32)
        data = SkyBrightnessDataset(part, no_flux, list(FEATURES))
        loaders.append(
            NumpyLoader(data, batch_size=int(configuration["batch_size"]), shuffle=not loaders)
        )
    settings = TrainingConfig(
        epochs + 1,
        float(configuration["learning_rate"]),
        "huber",
        float(configuration["huber_delta"]),
        save_best=False,
        save_dir=scratch,
        print_every=2**30,
    )
    ends = [time.perf_counter()]
    BroadbandTrainer(
        model, settings, on_epoch_end=lambda *_: ends.append(time.perf_counter())
    ).train(*loaders)
    epoch = float(np.median(np.diff(ends)[1:]))  # the first one compiles
    steps = math.ceil(len(parts[0]) / int(configuration["batch_size"]))
    tune.report({"epoch": epoch, "step": epoch / steps})


def table(found: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> str:
    """Return what was measured as Markdown."""
    engine = found["engine"]
    rows: list[Sequence[str]] = []
    if "desisky" in found:
        desisky = found["desisky"]
        total = extrapolated(desisky, engine["done"], options.cores)
        rows.append(row("desisky's trainer (extrapolated)", total, engine["epochs"], engine, None))
    for name, label in (("processes", "a process per trial"), ("engine", "the engine")):
        if name in found:
            each = found[name]
            share = 1 - (each["training"] + each.get("compiling", 0)) / (
                options.cores * each["seconds"]
            )
            rows.append(row(label, each["seconds"], each["epochs"], engine, each, share))
    lines = [
        "| way | search, s | epochs/s | against the engine | processes per trial |"
        " neither training nor compiling |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(each) + " |" for each in rows),
        "",
        f"{engine['trials']} trials, {options.cores} cores. Time of the engine's slots: "
        + ", ".join(f"{name} {100 * share:.1f} %" for name, share in engine["shares"].items())
        + ". The last column is of the whole call times the cores; for a process per trial it"
        " holds the compiles too, which are not measured there.",
    ]
    if "desisky" in found:
        ours = default_epoch(options.cores, found["desisky"]["rows"])
        theirs = found["desisky"]["default"]
        lines.append(
            f"\nDefault architecture, {found['desisky']['rows']} rows, batch 32, {options.cores} "
            f"trainings at a time: desisky {1e3 * theirs:.0f} ms per epoch, here "
            f"{1e3 * ours:.2f} ms: {theirs / ours:.0f} times the epochs per second. Steps of "
            "desisky's as measured (ms): "
            + ", ".join(f"{1e3 * step:.1f}" for step in found["desisky"]["steps"])
            + "."
        )
    return "\n".join(lines)


def row(
    label: str,
    seconds: float,
    epochs: int,
    engine: Mapping[str, Any],
    each: Mapping[str, Any] | None,
    share: float | None = None,
) -> list[str]:
    """Return a row of the table."""
    return [
        label,
        f"{seconds:.0f}",
        f"{epochs / seconds:.1f}",
        f"{seconds / engine['seconds']:.1f}",
        "" if each is None else f"{each['processes'] / each['trials']:.2f}",
        "" if share is None else f"{100 * share:.1f} %",
    ]


def extrapolated(desisky: Mapping[str, Any], done: Sequence[Any], cores: int) -> float:
    """Return the seconds that desisky's trainer would take for the trials of a search."""
    steps = sum(
        epochs * math.ceil(desisky["rows"] / int(configuration["batch_size"]))
        for configuration, epochs in done
    )
    return float(steps * desisky["step"] / cores)


def default_epoch(cores: int, rows: int) -> float:
    """Return seconds per epoch of the training core at the default, one training per core."""
    os.environ.setdefault("NPROC", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from concurrent.futures import ThreadPoolExecutor

    from desisky_tune.training.program import Hyperparameters, program_for, training_arrays

    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(rows + rows // 3, 6)).astype(np.float32)
    targets = (20 + np.tanh(inputs[:, :4])).astype(np.float32)
    arrays = training_arrays(inputs[:rows], targets[:rows], inputs[rows:], targets[rows:])
    program = program_for(in_size=6, out_size=4, width=128, depth=5, batch_size=32)
    settings = Hyperparameters(learning_rate=1e-4, huber_delta=0.25)
    program.advance(program.init(0), arrays, settings, 2)
    epochs = 200

    def train(seed: int) -> None:
        program.advance(program.init(seed), arrays, settings, epochs)

    with ThreadPoolExecutor(cores) as threads:
        began = time.perf_counter()
        list(threads.map(train, range(cores)))
        return (time.perf_counter() - began) / epochs


if __name__ == "__main__":
    main()
