"""A search without training, processes or waiting: a fake backend and a virtual clock.

`VirtualSearch` stands where Ray Tune's controller stands. It drives the real searcher,
scheduler, recorder and run folder through a whole search, trials side by side, in the
order in which their reports would arrive. Time is a number that the backend adds to.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.utils.util import flatten_dict

from desisky_tune.data.columns import BANDS
from desisky_tune.data.features import load_features
from desisky_tune.data.splits import make_split
from desisky_tune.search.backend import CURVE_SERIES, Assignment, Progress
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.folds import search_arrays
from desisky_tune.search.local import LocalBackend
from desisky_tune.search.origin import SearchRun
from desisky_tune.search.recorder import Recorder
from desisky_tune.search.records import Ledger, TrialRecord
from desisky_tune.search.schedulers import make_scheduler
from desisky_tune.search.searcher import StudySearch
from desisky_tune.search.space import SearchSpec, rungs
from desisky_tune.search.study import rebuild_study

#: Share of the objective by band: their mean is 1, so that the objective is the mean RMSE.
BAND_SHARES: Mapping[str, float] = dict(zip(BANDS, (0.9, 1.2, 1.0, 0.9), strict=True))


def floor_of(configuration: Mapping[str, Any]) -> float:
    """The RMSE (mag) that a configuration tends to: a bowl in the logarithms."""
    return (
        0.2
        + 0.1 * (math.log10(configuration["learning_rate"]) + 2.5) ** 2
        + 0.05 * math.log2(configuration["width"] / 100) ** 2
        + 0.02 * (configuration["depth"] - 3) ** 2
    )


def rmse_at(configuration: Mapping[str, Any], epoch: int) -> float:
    """Validation RMSE (mag) after `epoch` more epochs than one: it falls, and shakes a little."""
    shake = 0.01 * math.sin(7.3 * epoch + configuration["width"])
    return floor_of(configuration) + 0.8 * math.exp(-epoch / 20) + shake


def seconds_per_epoch(configuration: Mapping[str, Any]) -> float:
    """Virtual seconds that an epoch takes."""
    return 0.01 * configuration["depth"] * (configuration["width"] / 64) + 0.001


class ProcessDiedError(Exception):
    """The trial's process is gone, not only its training."""


@dataclass
class FakeBackend:
    """Follows `rmse_at`; certain trials fail at certain epochs.

    Attributes
    ----------
    nan_at
        Trial -> epoch from which its numbers are NaN.
    raises_at
        Trial -> (epoch, exception) that ends it.
    ends_at
        Trial -> epochs after which it ends by itself, before the search's.
    advanced
        Every (trial, epochs) that was asked for, in order.
    """

    nan_at: Mapping[int, int] = field(default_factory=dict)
    raises_at: Mapping[int, tuple[int, Exception]] = field(default_factory=dict)
    ends_at: Mapping[int, int] = field(default_factory=dict)
    curve_of: Callable[[Mapping[str, Any], int], float] = rmse_at
    advanced: list[tuple[int, int]] = field(default_factory=list)

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        self.advanced.append((trial.number, epochs))
        if trial.number in self.raises_at and epochs >= self.raises_at[trial.number][0]:
            raise self.raises_at[trial.number][1]
        stopped = epochs >= self.ends_at.get(trial.number, epochs + 1)
        epochs = min(epochs, self.ends_at.get(trial.number, epochs))
        first_nan = self.nan_at.get(trial.number, epochs)
        values = [
            self.curve_of(trial.configuration, epoch) if epoch < first_nan else math.nan
            for epoch in range(epochs)
        ]
        finite = [value for value in values if math.isfinite(value)]
        best = min(finite, default=math.nan)
        broken = len(finite) < len(values)
        best_epoch = values.index(best) if finite else -1
        curve = dict.fromkeys(("train_loss", "test_loss"), values)
        curve |= {band: [share * v for v in values] for band, share in BAND_SHARES.items()}
        return Progress(
            epochs=epochs,
            objective=math.nan if broken else best,
            best_epoch=best_epoch,
            rmse={band: share * best for band, share in BAND_SHARES.items()},
            train_loss=best,
            test_loss=best,
            seconds=epochs * seconds_per_epoch(trial.configuration),
            curve={name: curve[name] for name in CURVE_SERIES},
            objectives=values,
            stopped=stopped,
        )

    def release(self, trial: Assignment) -> None:
        """There is nothing to let go of."""


@dataclass
class FakeTrial:
    """What the searcher, the scheduler and the recorder look at in a Tune trial."""

    trial_id: str
    config: dict[str, Any]
    last_result: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    epochs: int = 0

    def get_error(self) -> Exception | None:
        return self.error


class VirtualSearch:
    """A search of `workers` trials side by side.

    Parameters
    ----------
    spec, folder
        What is searched, and where it is kept.
    workers
        Trials in flight.
    backend
        What trains.
    max_deaths
        How often a trial's process may die before the trial has failed.
    """

    def __init__(
        self,
        spec: SearchSpec,
        folder: Path,
        *,
        workers: int = 1,
        backend: Any = None,
        max_deaths: int = 0,
    ) -> None:
        self.spec = spec
        self.folder = RunFolder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # A run's folder without it is taken for a mount point without its file system.
        self.folder.search_json.touch()
        self.workers = workers
        self.backend = backend or FakeBackend()
        self.max_deaths = max_deaths
        self.clock = 0.0
        self.suggested: dict[int, dict[str, Any]] = {}
        self.decisions: list[tuple[int, int, float, str]] = []
        #: (trial, epochs, objective) of every report, in the order of the clock.
        self.reports: list[tuple[int, int, float]] = []
        self._queue: list[tuple[float, int, FakeTrial]] = []
        self._handed_out = 0

    def run(self, until: float = math.inf) -> list[TrialRecord]:
        """Search until all trials have ended, or the virtual clock passes `until`.

        A search that has a ledger goes on as `desisky-tune resume` does.
        """
        known = Ledger(self.folder.ledger).records()
        finished = {record.number for record in known}
        started = sorted(self.folder.read_started().items())
        pending = [(number, each) for number, each in started if number not in finished]
        if known or pending:
            rebuild_study(self.folder.study, self.spec, known)
        self.searcher = StudySearch(self.spec, self.folder.study, workers=self.workers)
        self.scheduler = make_scheduler(self.spec)
        if known or pending:
            self.searcher.prime(known, pending)
            self.scheduler.prime(known)
        self.recorder = Recorder(
            self.folder,
            known,
            total=self.spec.search.trials,
            max_epochs=self.spec.training.epochs,
            max_deaths=self.max_deaths,
            deaths=Counter(),
            seed=self.spec.training.seed,
            emit=lambda event: None,
        )
        try:
            self._loop(until)
        finally:
            self.searcher.close()
        return self.recorder.records

    def _loop(self, until: float) -> None:
        while len(self._queue) < self.workers and self._hand_out():
            pass
        while self._queue:
            self.clock, _, trial = heapq.heappop(self._queue)
            if self.clock > until:
                return
            if self._report(trial):
                self._schedule(trial)
            else:
                self._hand_out()

    def _hand_out(self) -> bool:
        self._handed_out += 1
        trial_id = f"tune-{self._handed_out}"
        config = self.searcher.suggest(trial_id)
        if config == Searcher.FINISHED:
            return False
        trial = FakeTrial(trial_id, dict(config))
        number = trial.config["trial"]
        assert number not in self.suggested, "a trial was handed out twice"
        self.suggested[number] = {k: v for k, v in trial.config.items() if k != "trial"}
        self.scheduler.on_trial_add(None, trial)
        self.recorder.on_trial_start(0, [], trial)
        self._schedule(trial)
        return True

    def _schedule(self, trial: FakeTrial) -> None:
        target = next(rung for rung in rungs(self.spec) if rung > trial.epochs)
        spent = (target - trial.epochs) * seconds_per_epoch(trial.config)
        # Two reports at one moment arrive in the order in which the trials were handed out.
        heapq.heappush(self._queue, (self.clock + spent, int(trial.trial_id[5:]), trial))

    def _report(self, trial: FakeTrial) -> bool:
        """Let a trial reach its next rung; return whether it goes on."""
        number = trial.config["trial"]
        assignment = Assignment(number, self.suggested[number], self.spec.training.seed)
        target = next(rung for rung in rungs(self.spec) if rung > trial.epochs)
        try:
            progress = self.backend.advance(assignment, target)
        except ProcessDiedError as error:
            trial.error = error
            self.searcher.on_trial_complete(trial.trial_id, error=True)
            self.recorder.on_trial_error(0, [], trial)
            return False
        trial.epochs = progress.epochs
        result = progress.as_result(rungs(self.spec))
        flat = flatten_dict(result)
        self.reports.append((number, progress.epochs, progress.objective))
        if progress.ends_at(self.spec.training.epochs):
            decision = TrialScheduler.STOP
        else:
            decision = self.scheduler.on_trial_result(None, trial, flat)
            self.decisions.append((number, progress.epochs, progress.objective, decision))
        if decision == TrialScheduler.CONTINUE:
            self.searcher.on_trial_result(trial.trial_id, flat)
        self.recorder.on_trial_result(0, [], trial, result)
        trial.last_result = result
        if decision == TrialScheduler.CONTINUE:
            return True
        self.scheduler.on_trial_complete(None, trial, flat)
        self.searcher.on_trial_complete(trial.trial_id, flat)
        self.recorder.on_trial_complete(0, [], trial)
        return False


def in_process(spec: SearchSpec, folder: Path) -> list[TrialRecord]:
    """The trials of a search of the shipped exposures, really trained, one after another.

    No process is started: what a search on Ray is held against, where its trials do not depend
    on the order in which they end.
    """
    table = load_features()
    split = make_split(
        table.frame, spec.split.by, fractions=spec.split.fractions, seed=spec.split.seed
    )
    run = SearchRun(RunFolder(folder), spec, table, split)
    backend = LocalBackend(search_arrays(run), spec.training, folder)
    return VirtualSearch(spec, folder, backend=backend).run()
