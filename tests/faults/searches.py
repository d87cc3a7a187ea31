"""Searches in processes of their own, that faults can be injected into, and what must hold after.

One shape of network, large enough for a trial to take about half a second; the hyperparameters
that are searched change the numbers of a trial and not its program.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from desisky_tune.search.folder import RunFolder
from desisky_tune.search.leaderboard import leaderboard
from desisky_tune.search.records import Ledger, TrialRecord
from desisky_tune.search.space import SearchSpec, load_spec

SMALL = (
    "search.default_first=false",
    "evaluation.finalists=0",
    "search.trials=8",
    "search.grace=300",
    "search.reduction=3",
    "training.epochs=2700",
    "resources.workers=2",
    "space.width=64",
    "space.depth=3",
    "space.batch_size=32",
)

#: Nothing depends on the order in which trials end: what comes of them is known bit for bit.
RANDOM = (*SMALL, "search.sampler=random", "search.scheduler=none")

#: What is suggested, and what is stopped, depends on what has ended before.
ADAPTIVE = (*SMALL, "search.sampler=tpe", "search.startup_trials=3", "search.scheduler=asha")

#: How long one search may take before a test says that it hangs (s).
PATIENCE = 180.0


def spec_of(overrides: Iterable[str]) -> SearchSpec:
    return load_spec("quick", overrides=tuple(overrides))


class Command:
    """``desisky-tune ...`` in a process of its own, with the lines that it writes."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "desisky_tune", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def until(self, *texts: str, count: int = 1) -> str:
        """Wait for the `count`-th line that holds one of `texts`; return it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                line = self._new.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {texts} in {PATIENCE:g} s: {self.lines}") from None
            if line is None:
                raise AssertionError(f"ended without {texts}: {self.lines}")
            self.lines.append(line)
            count -= any(text in line for text in texts)
            if count == 0:
                return line

    def begins(self) -> None:
        """Wait until trials run: a first one has come to a rung."""
        self.until("at epoch", "COMPLETE", "PRUNED", "FAIL")

    def kill_after(self, seconds: float) -> bool:
        """Kill the driver (SIGKILL) after a time; return False where it had ended by then."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self.ends()
            return True
        self.ends()
        return False

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def ends(self, patience: float = PATIENCE) -> int:
        """Wait for the end; return the exit code."""
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        # Processes of a killed driver's Ray hold the pipe a little longer: read what it wrote.
        self._reader.join(20.0)
        while not self._new.empty():
            line = self._new.get()
            if line is not None:
                self.lines.append(line)
        return code


def search(runs: Path, name: str, overrides: Iterable[str], *more: str) -> Command:
    """Start a search, or go on with it where it has begun."""
    if (runs / name / "search.json").exists():
        return Command("resume", str(runs / name), *more)
    sets = [word for override in overrides for word in ("--set", override)]
    return Command("search", "quick", *sets, "--runs", str(runs), "--name", name, *more)


def records_of(run: Path) -> list[TrialRecord]:
    records = Ledger(RunFolder.open(run).ledger).records()
    return sorted(records, key=lambda record: record.number)


def assert_nothing_lost(run: Path, spec: SearchSpec) -> list[TrialRecord]:
    """Every trial once; ledger, study, tables and leaderboard say the same."""
    trials = list(range(spec.search.trials))
    lines = (run / "ledger.jsonl").read_text().splitlines()
    records = records_of(run)
    assert len(lines) == len(records) == len(trials)
    assert [record.number for record in records] == trials
    for record in records:
        assert len(record.curve["V"]) == record.epochs
        assert min(objectives(record)) == record.objective

    study = optuna.load_study(study_name=None, storage=f"sqlite:///{run / 'study.db'}")
    assert [trial.number for trial in study.trials] == trials
    for trial, record in zip(study.trials, records, strict=True):
        assert trial.state.name == record.state
        assert trial.intermediate_values == record.rungs
        if record.state == "COMPLETE":
            assert trial.value == record.objective

    table = pd.read_parquet(run / "trials.parquet").sort_values("trial")
    assert table["trial"].tolist() == trials
    assert table["state"].tolist() == [record.state for record in records]
    assert table["objective"].tolist() == [record.objective for record in records]
    curves = pd.read_parquet(run / "curves.parquet")
    assert curves.groupby("trial").size().tolist() == [record.epochs for record in records]
    board = leaderboard(run)
    assert sorted(board["trial"]) == trials
    best = min((r for r in records if r.state == "COMPLETE"), key=lambda r: float(r.objective or 0))
    assert board["objective"].iloc[0] == best.objective
    for record in records:
        # Where a process was killed before it could keep the weights, they are in the state.
        kept = [run / "trials" / f"{record.number:05d}.{suffix}" for suffix in ("eqx", "state")]
        assert any(path.exists() for path in kept)
    assert (run / "best" / f"{run.name}.eqx").exists()
    return records


def objectives(record: TrialRecord) -> list[float]:
    """The objective of every epoch, as the trial chose by it: the mean of the bands in float32."""
    import numpy as np

    bands = np.array([record.curve[band] for band in "Vgrz"], dtype=np.float32)
    mean = bands.mean(axis=0)
    at = record.best_epoch
    assert at is not None
    assert mean[at] <= mean.min() + 1e-6
    return [float(record.objective or 0.0)]


def assert_the_same(records: list[TrialRecord], undisturbed: list[TrialRecord]) -> None:
    """The same trials with the same numbers, to the last bit; only times may differ."""
    assert [content(record) for record in records] == [content(record) for record in undisturbed]


def content(record: TrialRecord) -> dict[str, Any]:
    kept = dict(vars(record))
    for name in ("seconds", "started", "ended"):
        del kept[name]
    return kept
