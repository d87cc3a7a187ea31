"""What a session of Ray Tune runs: the search itself, or its finalists once more.

A stage says how many trials there are, which ledger keeps them, what each of them trains,
and who suggests and who stops them. The study is that of the search alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray.tune.search import Searcher

from desisky_tune.search.arrays import SearchArrays
from desisky_tune.search.backend import Member
from desisky_tune.search.engines import SPARE
from desisky_tune.search.folds import (
    finalist_arrays,
    finalist_members,
    search_arrays,
    search_members,
)
from desisky_tune.search.ordering import OrderedScheduler, OrderedSearch, Ordering
from desisky_tune.search.origin import SearchRun
from desisky_tune.search.records import TrialRecord
from desisky_tune.search.schedulers import FullScheduler, Scheduler, make_scheduler
from desisky_tune.search.searcher import StudySearch
from desisky_tune.search.space import rungs
from desisky_tune.search.stopping import StopRequest
from desisky_tune.search.study import rebuild_study


class Stage(Protocol):
    """Trials of a run that are run and ranked together."""

    name: str
    sessions: str
    total: int
    ledger: Path
    rungs: tuple[int, ...]
    members: tuple[Member, ...]
    keep_members: bool
    time_limit: float | None
    ordered: bool
    spare: int

    def arrays(self) -> SearchArrays:
        """Return the rows that its trials see."""
        ...

    def begin(
        self, known: Sequence[TrialRecord], workers: int, stop: StopRequest
    ) -> tuple[Any, Any]:
        """Return the searcher (with a `close`) and the scheduler of a session."""
        ...

    def conclude(self, records: Sequence[TrialRecord]) -> None:
        """Put in order what a session that ended early has left."""
        ...


class SearchStage:
    """The trials of the search, suggested by its sampler."""

    name = "search"
    sessions = "session"
    ordered = True
    keep_members = False
    spare = SPARE

    def __init__(self, run: SearchRun) -> None:
        self._run = run
        self.total = run.spec.search.trials
        self.ledger = run.folder.ledger
        self.rungs = tuple(rungs(run.spec))
        self.members = search_members(run.spec)
        self.time_limit = run.spec.search.time_limit

    def arrays(self) -> SearchArrays:
        """Return the rows of the split, or of the search's folds."""
        return search_arrays(self._run)

    def begin(
        self, known: Sequence[TrialRecord], workers: int, stop: StopRequest
    ) -> tuple[Any, Any]:
        """Write the study anew, and put trials that were under way first."""
        spec, folder = self._run.spec, self._run.folder
        finished = {record.number for record in known}
        handed_out = sorted(folder.read_started().items())
        # Also where no trial has begun: a killed driver may have left a study with one in it.
        if spec.search.deterministic:
            return self._begin_ordered(known, handed_out, workers, stop)
        rebuild_study(folder.study, spec, known)
        searcher = StudySearch(spec, folder.study, workers=workers)
        searcher.prime(known, [(n, c) for n, c in handed_out if n not in finished])
        scheduler = make_scheduler(spec, stop)
        scheduler.prime(known)
        return searcher, scheduler

    def _begin_ordered(
        self,
        known: Sequence[TrialRecord],
        handed_out: Sequence[tuple[int, Mapping[str, Any]]],
        workers: int,
        stop: StopRequest,
    ) -> tuple[OrderedSearch, OrderedScheduler]:
        """Go through all of the search again, up to where it stands."""
        spec, folder = self._run.spec, self._run.folder
        rebuild_study(folder.study, spec, ())
        searcher = StudySearch(spec, folder.study, workers=workers)
        try:
            ordering = Ordering(searcher, make_scheduler(spec), workers, known, dict(handed_out))
        except BaseException:
            searcher.close()
            raise
        return OrderedSearch(ordering, searcher), OrderedScheduler(ordering, stop)

    def conclude(self, records: Sequence[TrialRecord]) -> None:
        """Write the study anew: trials under way were not told to it."""
        rebuild_study(self._run.folder.study, self._run.spec, records)


class FinalistStage:
    """The finalists: given configurations, each trained in full on folds, with several seeds.

    Parameters
    ----------
    run
        The run.
    configurations
        By number of the trial.
    """

    name = "finalists"
    sessions = "finalists"
    ordered = False
    keep_members = True
    #: Each trains for seconds at least; a process that waits beside it costs as much to start.
    spare = 0
    time_limit: float | None = None

    def __init__(self, run: SearchRun, configurations: Mapping[int, Mapping[str, Any]]) -> None:
        self._run = run
        self._configurations = dict(configurations)
        self.total = len(self._configurations)
        self.ledger = run.folder.finalists
        self.rungs = tuple(rungs(run.spec))
        self.members = finalist_members(run.spec)

    def arrays(self) -> SearchArrays:
        """Return the training and validation rows, in the finalists' folds."""
        return finalist_arrays(self._run)

    def begin(
        self, known: Sequence[TrialRecord], workers: int, stop: StopRequest
    ) -> tuple[GivenSearch, Scheduler]:
        """Suggest the finalists that have no record yet."""
        finished = {record.number for record in known}
        waiting = {n: c for n, c in self._configurations.items() if n not in finished}
        return GivenSearch(waiting), FullScheduler(stop)

    def conclude(self, records: Sequence[TrialRecord]) -> None:
        """There is no study of the finalists."""


class GivenSearch(Searcher):
    """Suggests given configurations in turn, the lowest number first."""

    def __init__(self, configurations: Mapping[int, Mapping[str, Any]]) -> None:
        super().__init__()
        self._waiting = [(n, dict(configurations[n])) for n in sorted(configurations)]

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Any, **spec: Any
    ) -> bool:
        """Accept any metric: none is looked at."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Return the next configuration, or `FINISHED` when all were handed out."""
        if not self._waiting:
            return Searcher.FINISHED
        number, configuration = self._waiting.pop(0)
        return {"trial": number, **configuration}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing is learnt from a finalist."""

    def save(self, checkpoint_path: str) -> None:
        """A session that is cut off begins again from its ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""

    def keep(self) -> None:
        """There is no study of the finalists."""

    def close(self) -> bool:
        """Nothing is held open."""
        return True
