"""Which trials are stopped at a rung: asynchronous successive halving, or none.

ASHA: Li et al., "A System for Massively Parallel Hyperparameter Tuning" (2020), in the
form that Ray Tune has: a trial goes on from a rung when it belongs to the best
1 / reduction of those that reached the rung before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from desisky_tune.search.records import TrialRecord, nested
from desisky_tune.search.space import SearchSpec, rungs
from desisky_tune.search.stopping import StopRequest

#: Keys of a report (`desisky_tune.search.backend.Progress.as_result`).
METRIC, MODE, TIME = "objective", "min", "epochs"


class RungScheduler(ASHAScheduler):
    """ASHA on epochs, that knows earlier sessions and spares the documented default.

    Ray's own keeps real-valued rungs (grace x reduction^k as floats, their count from a
    ratio of logarithms that can fall short by rounding) and records a trial that enters
    above a rung as if it had reached that rung; here a report counts at its own rung
    alone. The objective of a report is the lowest so far, so it never rises from rung to
    rung. A trial that ended early by itself (``early_stopping``) counts at the rungs beyond
    with what it came to: those that get there compete with it.

    Parameters
    ----------
    epochs
        Rungs in ascending order; the last is where a trial is complete.
    reduction
        About one trial in `reduction` goes on from a rung.
    spared
        Numbers of trials that are never stopped. They count at their rungs.
    stop
        Whether the search was asked to end: then no trial begins another rung.
    """

    def __init__(
        self,
        epochs: list[int],
        reduction: int,
        spared: Iterable[int] = (0,),
        stop: StopRequest | None = None,
    ) -> None:
        super().__init__(
            time_attr=TIME,
            metric=METRIC,
            mode=MODE,
            max_t=epochs[-1],
            grace_period=epochs[0],
            reduction_factor=reduction,
        )
        self._spared = frozenset(spared)
        self._stop = stop
        #: Objective by rung and trial number.
        self._reached: dict[int, dict[int, float]] = {rung: {} for rung in epochs[:-1]}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accept what is set here already; refuse anything else."""
        return metric in (None, METRIC) and mode in (None, MODE)

    def prime(self, records: Iterable[TrialRecord]) -> None:
        """Count what the trials of earlier sessions reached."""
        for record in records:
            for epochs, objective in record.rungs.items():
                if epochs in self._reached and math.isfinite(objective):
                    self._reached[epochs][record.number] = objective
            if record.state == "COMPLETE" and record.objective is not None:
                self.ended_early(record.number, record.epochs, record.objective)

    def decide(self, number: int, epochs: int, objective: float) -> str:
        """Return whether trial `number` goes on from `epochs` (`CONTINUE` or `STOP`).

        The cutoff is the 1 / reduction quantile, linearly interpolated, of the
        objectives that other trials had when they reached this rung; a trial that equals
        it goes on, and so does the first to come.
        """
        if epochs >= self._max_t or not math.isfinite(objective):
            return TrialScheduler.STOP
        if epochs not in self._reached:
            return TrialScheduler.CONTINUE
        others = [at for other, at in self._reached[epochs].items() if other != number]
        self._reached[epochs][number] = objective
        if number in self._spared or not others:
            return TrialScheduler.CONTINUE
        cutoff = np.quantile(others, 1 / self._reduction_factor)
        return TrialScheduler.STOP if objective > cutoff else TrialScheduler.CONTINUE

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """There is one bracket: a trial needs no place in it."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Decide at a report."""
        number, epochs = int(trial.config["trial"]), int(result[TIME])
        self._count_below(number, epochs, result)
        action = self.decide(number, epochs, float(result[METRIC]))
        self._num_stopped += action == TrialScheduler.STOP
        return resting(action, self._stop)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        """Count a trial that ended early where it did not get to; the others have been counted."""
        if result and result.get("stopped"):
            number, epochs = int(trial.config["trial"]), int(result[TIME])
            self._count_below(number, epochs, result)
            self.ended_early(number, epochs, float(result[METRIC]))

    def _count_below(self, number: int, epochs: int, result: Mapping[str, Any]) -> None:
        """Count the rungs on the way: a trial that was taken further before reports its last."""
        for rung, objective in nested(result, "rungs").items():
            if int(rung) < epochs and int(rung) in self._reached:
                self._reached[int(rung)].setdefault(number, float(objective))

    def ended_early(self, number: int, epochs: int, objective: float) -> None:
        """Count a trial that ended by itself at the rungs that it did not get to."""
        for rung in self._reached:
            if rung >= epochs:
                self._reached[rung].setdefault(number, objective)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Its reports have been counted."""

    def debug_string(self) -> str:
        """Return how many trials reached each rung."""
        reached = ", ".join(f"{rung}: {len(at)}" for rung, at in self._reached.items())
        return f"ASHA: stopped {self._num_stopped}; trials by rung: {reached}"


class FullScheduler(FIFOScheduler):
    """Trains every trial in full, unless the search was asked to end (`stop`)."""

    def __init__(self, stop: StopRequest | None = None) -> None:
        super().__init__()
        self._stop = stop

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Let a trial go on to its next rung."""
        return resting(TrialScheduler.CONTINUE, self._stop)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accept any metric: none is looked at."""
        return True

    def prime(self, records: Iterable[TrialRecord]) -> None:
        """Earlier trials change nothing."""

    def ended_early(self, number: int, epochs: int, objective: float) -> None:
        """Nothing is counted."""

    def decide(self, number: int, epochs: int, objective: float) -> str:
        """Return `CONTINUE`: a trial ends by itself."""
        return TrialScheduler.CONTINUE


Scheduler = RungScheduler | FullScheduler


def make_scheduler(spec: SearchSpec, stop: StopRequest | None = None) -> Scheduler:
    """Return the scheduler of a search: ``asha`` or ``none``."""
    if spec.search.scheduler == "none":
        return FullScheduler(stop)
    spared = (0,) if spec.default_runs else ()
    return RungScheduler(rungs(spec), spec.search.reduction, spared, stop)


def resting(action: str, stop: StopRequest | None) -> str:
    """Turn "go on" into "stay where you are" in a search that was asked to end."""
    if action == TrialScheduler.CONTINUE and stop is not None and stop.asked is not None:
        return str(TrialScheduler.NOOP)
    return action
