"""A search whose decisions do not depend on the clock: ``search.deterministic``.

What a sampler suggests and a scheduler stops depends on what has ended before, and that on how
busy the machine is. Here results are handed on in the order of a virtual clock instead, on which
a trial takes as long as its arithmetic. So many trials run on it as are in flight: one that is
at its rung early waits for its verdict, a trial that ended early leaves its place empty until
its virtual end. Whatever the real durations are, the same is suggested and the same stopped.

An interrupted search is taken up by going through all of it again: what the ledger knows is not
trained a second time, and everything after it is decided as it would have been.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from desisky_tune.errors import RunError
from desisky_tune.search.records import TrialRecord, nested, parameter_count
from desisky_tune.search.schedulers import METRIC, TIME, Scheduler, resting
from desisky_tune.search.space import rungs
from desisky_tune.search.stopping import StopRequest
from desisky_tune.search.verdicts import GO, STOP, Verdict

if TYPE_CHECKING:
    from desisky_tune.search.origin import SearchRun
    from desisky_tune.search.searcher import StudySearch

#: Tells a trial (by number) that waits at so many epochs what becomes of it.
Judge = Callable[[int, int, Verdict], None]

#: What a step costs beside its arithmetic, in weights times rows.
STEP_COST = 64_000

Result = Mapping[str, Any]


class Ordering:
    """Hands results on to a searcher and a scheduler in the order of a virtual clock.

    Parameters
    ----------
    searcher
        With an empty study.
    scheduler
        That has counted nothing.
    workers
        Trials in flight; part of what decides the order.
    known
        Records of trials that have ended.
    started
        Configurations that were handed out before, by number.
    """

    def __init__(
        self,
        searcher: StudySearch,
        scheduler: Scheduler,
        workers: int,
        known: Sequence[TrialRecord] = (),
        started: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        self._searcher = searcher
        self._scheduler = scheduler
        self._spec = searcher.spec
        self._rungs = rungs(searcher.spec)
        self._known = {record.number: record for record in known}
        self._started = {number: dict(each) for number, each in (started or {}).items()}
        self._configurations: dict[int, dict[str, Any]] = {}
        #: Reports by trial and epochs, and how trials ended, as they really came.
        self._reports: dict[int, dict[int, Result]] = {}
        self._ends: dict[int, tuple[Result | None, bool]] = {}
        #: (virtual time, number, rung) of what comes next of each trial in flight.
        self._events: list[tuple[float, int, int]] = []
        self._over: set[int] = set()
        self._clock = 0.0
        self._judge: Judge = _nobody
        self.ready: deque[dict[str, Any]] = deque()
        self.finished = False
        for _ in range(workers):
            self._hand_out()
        self._go_on()

    def judged_by(self, judge: Judge) -> None:
        """Say how verdicts reach the trials; none is given before the first report."""
        self._judge = judge

    def reported(self, number: int, result: Result) -> None:
        """Take the report of a trial at a rung."""
        reports = self._reports.setdefault(number, {})
        for epochs, objective in nested(result, "rungs").items():
            # A trial that an earlier process took further reports where it stands alone.
            reports.setdefault(int(epochs), {TIME: int(epochs), METRIC: float(objective)})
        reports[int(result[TIME])] = result
        self._go_on()

    def ended(self, number: int, result: Result | None, *, error: bool) -> None:
        """Take the end of a trial; of one that was stopped here it is known."""
        if number not in self._over:
            self._ends[number] = (result, error)
            self._go_on()

    def _hand_out(self) -> None:
        """Let the next trial begin, now on the virtual clock."""
        number = len(self._configurations)
        if number >= self._spec.search.trials:
            self.finished = True
            return
        record = self._known.get(number)
        before = self._started.get(number) if record is None else record.configuration
        if before is None:
            configuration = self._searcher.suggest(str(number))
        else:
            configuration = self._searcher.repeat(str(number), number, before)
        if configuration["trial"] != number:
            raise RunError(f"{self._searcher.path}: something else is writing to this study")
        self._configurations[number] = configuration
        if record is None:
            self.ready.append(configuration)
        self._expect(number, self._rungs[0], 0)

    def _expect(self, number: int, rung: int, after: int) -> None:
        spent = (rung - after) * self._epoch_cost(self._configurations[number])
        heapq.heappush(self._events, (self._clock + spent, number, rung))

    def _epoch_cost(self, configuration: Mapping[str, Any]) -> float:
        """Return the virtual time of an epoch, in units that cancel."""
        overhead = STEP_COST / float(configuration["batch_size"])
        if self._spec.resources.gpus_per_trial:
            return overhead  # many slots share a step: the width is not what takes time
        return parameter_count(configuration, inputs=len(self._spec.data.features)) + overhead

    def _go_on(self) -> None:
        """Hand on whatever is next on the virtual clock and has really come."""
        while self._events:
            time, number, rung = self._events[0]
            if number in self._known:
                ends = self._replay(self._known[number], rung)
            elif rung in self._reports.get(number, {}):
                ends = self._decide(number, rung, self._reports[number][rung])
            elif number in self._ends:
                result, error = self._ends[number]
                self._end(number, result, error=error)
                ends = True
            else:
                return
            heapq.heappop(self._events)
            self._clock = time
            if ends:
                self._over.add(number)
                self._hand_out()
            else:
                self._expect(number, self._next_rung(rung), rung)

    def _decide(self, number: int, rung: int, result: Result) -> bool:
        """Let the scheduler decide at a rung; return whether the trial ends there."""
        action = self._scheduler.decide(number, rung, float(result[METRIC]))
        if action == TrialScheduler.CONTINUE:
            self._searcher.on_trial_result(str(number), result)
            self._judge(number, rung, GO)
            return False
        self._searcher.on_trial_complete(str(number), result)
        self._judge(number, rung, STOP)
        return True

    def _end(self, number: int, result: Result | None, *, error: bool) -> None:
        """Hand on that a trial ended by itself, or failed."""
        if result and result.get("stopped"):
            self._scheduler.ended_early(number, int(result[TIME]), float(result[METRIC]))
        self._searcher.on_trial_complete(str(number), result, error=error)

    def _replay(self, record: TrialRecord, rung: int) -> bool:
        """Hand on what the ledger knows of a trial at a rung; return whether it ends there."""
        goes_on = record.epochs > rung or (record.state == "FAIL" and rung in record.rungs)
        if rung in record.rungs and (goes_on or record.state == "PRUNED"):
            self._scheduler.decide(record.number, rung, record.rungs[rung])
        if goes_on and rung < self._rungs[-1]:
            if rung in record.rungs:
                report = {TIME: rung, METRIC: record.rungs[rung]}
                self._searcher.on_trial_result(str(record.number), report)
            return False
        if record.state == "COMPLETE" and record.objective is not None:
            self._scheduler.ended_early(record.number, record.epochs, record.objective)
        self._searcher.tell(record)
        return True

    def _next_rung(self, rung: int) -> int:
        return next(each for each in self._rungs if each > rung)


class OrderedSearch(Searcher):
    """The searcher that Ray Tune sees: suggests what the ordering has made ready."""

    def __init__(self, ordering: Ordering, searcher: StudySearch) -> None:
        super().__init__()
        self.ordering = ordering
        self._searcher = searcher
        self._numbers: dict[str, int] = {}

    @property
    def starting(self) -> int:
        """Trials that begin at once."""
        return len(self.ordering.ready)

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Any, **spec: Any
    ) -> bool:
        """Pass on to the searcher."""
        return self._searcher.set_search_properties(metric, mode, config, **spec)

    def suggest(self, trial_id: str) -> Any:
        """Return the next configuration; None while results are waited for."""
        if self.ordering.ready:
            configuration = self.ordering.ready.popleft()
            self._numbers[trial_id] = int(configuration["trial"])
            return configuration
        return Searcher.FINISHED if self.ordering.finished else None

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Hand on how a trial ended."""
        self.ordering.ended(self._numbers[trial_id], result, error=error)

    def save(self, checkpoint_path: str) -> None:
        """A session that is cut off begins again from its ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""

    def keep(self) -> None:
        """Write the study's file, where it is behind the study for long."""
        self._searcher.keep()

    def close(self) -> bool:
        """Write the study's file, and let go of it; return whether it could be written."""
        return self._searcher.close()


class OrderedScheduler(FIFOScheduler):
    """The scheduler that Ray Tune sees: every trial goes on, to wait for its verdict.

    Parameters
    ----------
    ordering
        Told of each report.
    stop
        Whether the search was asked to end: then no trial begins another rung.
    rest
        Tells the trials that wait to report where they are, and no more.
    """

    def __init__(self, ordering: Ordering, stop: StopRequest | None = None) -> None:
        super().__init__()
        self._ordering = ordering
        self._stop = stop
        self.rest: Callable[[], None] = _nothing

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accept any metric: the ordering's scheduler looks at its own."""
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Result) -> str:
        """Hand a report on."""
        if self._stop is not None and self._stop.asked is not None:
            self.rest()
        else:
            self._ordering.reported(int(trial.config["trial"]), result)
        return resting(TrialScheduler.CONTINUE, self._stop)


def fixed_in_flight(run: SearchRun, in_flight: int) -> int:
    """Return the trials in flight of a deterministic run: those of its first session.

    Their number is written into `search.json`, because the order of the decisions goes by it.
    """
    content = run.folder.read_search()
    if "in_flight" in content:
        return int(content["in_flight"])
    kept = {key: value for key, value in content.items() if key != "schema"}
    run.folder.write_search({**kept, "in_flight": in_flight})
    return in_flight


def _nobody(number: int, epochs: int, verdict: Verdict) -> None:
    """Nobody waits."""


def _nothing() -> None:
    """Nobody waits."""
