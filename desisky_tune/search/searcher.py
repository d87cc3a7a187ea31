"""The searcher: Ray Tune's `OptunaSearch` with a study that says what happened.

What Ray's class does otherwise, and this one corrects: it tells a trial that the
scheduler stopped COMPLETE with its low-budget value, keeps its last report from the
study, and leaves a trial with NaN RUNNING for ever. Here `finish` decides every state.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from desisky_tune.errors import RunError
from desisky_tune.search.drafts import draw_within
from desisky_tune.search.records import TrialRecord, finish, nested
from desisky_tune.search.samplers import make_sampler
from desisky_tune.search.schedulers import METRIC, MODE, TIME
from desisky_tune.search.space import SearchSpec
from desisky_tune.search.study import notes_of, objective_values
from desisky_tune.search.study_storage import StudyStorage

Pending = Sequence[tuple[int, Mapping[str, Any]]]


class StudySearch(OptunaSearch):
    """Suggests configurations, and tells the study how their trials end.

    A suggestion is a configuration with one more key, ``trial``: the trial's number in
    the study, which is its number everywhere.

    Parameters
    ----------
    spec
        The search.
    path
        The study's file (sqlite). It is made when missing; one that exists is continued.
    workers
        Trials in flight, for the record.
    """

    def __init__(self, spec: SearchSpec, path: str | Path, *, workers: int = 1) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.spec = spec
        self.path = Path(path)
        self.workers = workers
        self._numbers: dict[str, int] = {}
        self._configurations: dict[int, dict[str, Any]] = {}
        self._reports: dict[int, dict[int, float]] = {}
        self._ids: dict[int, int] = {}
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._gaps: list[int] | None = None
        self._end = 0
        self._store = StudyStorage(self.path)
        super().__init__(
            space=spec.suggest,
            metric=METRIC if len(spec.search.objectives) == 1 else [*spec.search.objectives],
            mode=MODE if len(spec.search.objectives) == 1 else [MODE] * len(spec.search.objectives),
            sampler=make_sampler(spec, 0),
            storage=self._store,
            study_name=spec.name,
        )
        self.records: dict[int, TrialRecord] = {}

    @property
    def study(self) -> optuna.Study:
        """The study."""
        study: Any = self._ot_study
        assert isinstance(study, optuna.Study)
        return study

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Any, **spec: Any
    ) -> bool:
        """Accept what is set here already; refuse anything else."""
        return metric in (None, METRIC) and mode in (None, MODE) and not config

    def prime(self, records: Iterable[TrialRecord], pending: Pending = ()) -> None:
        """Make ready to go on with a study that `rebuild_study` has written.

        Parameters
        ----------
        records
            The finished trials.
        pending
            (number, configuration) of the trials that were handed out and have not
            finished: they are suggested first, as they were.

        Raises
        ------
        RunError
            When the study does not hold these trials.
        """
        finished = {record.number for record in records}
        states = {trial.number: trial.state for trial in self.study.get_trials(deepcopy=False)}
        ended = {number for number, state in states.items() if state.is_finished()}
        if ended != finished:
            raise RunError(
                f"{self.path}: holds {len(ended)} finished trials, the ledger {len(finished)}; "
                "it must be written anew from the ledger"
            )
        for number, configuration in sorted(pending, key=lambda entry: entry[0]):
            if number not in finished:
                self._claim(number, configuration)
                self._waiting.append((number, dict(configuration)))

    def suggest(self, trial_id: str) -> Any:
        """Return the next configuration, or `FINISHED` when all trials were handed out."""
        if self._waiting:
            number, configuration = self._waiting.pop(0)
        else:
            number = self._next_number()
            if number >= self.spec.search.trials:
                return Searcher.FINISHED
            configuration = self._new(number)
        self._numbers[trial_id] = number
        self._configurations[number] = configuration
        self._reports[number] = {}
        return {"trial": number, **configuration}

    def repeat(
        self, trial_id: str, number: int, configuration: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Hand out trial `number` as it was handed out before."""
        self._claim(number, configuration)
        self._numbers[trial_id] = number
        self._configurations[number] = dict(configuration)
        self._reports[number] = {}
        return {"trial": number, **configuration}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Keep a report as an intermediate value at its epoch."""
        number = self._numbers[trial_id]
        told = self._reports.setdefault(number, {})
        reached = {**nested(result, "rungs"), str(result[TIME]): result[METRIC]}
        for epochs, objective in reached.items():
            if int(epochs) not in told:
                self._report(number, int(epochs), float(objective))

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study how a trial ended; the record is then in `records`."""
        number = self._numbers[trial_id]
        if number in self.records:
            return
        record = finish(
            number=number,
            configuration=self._configurations[number],
            result=result,
            max_epochs=self.spec.training.epochs,
            reason="the trial's process failed" if error else None,
            seed=self.spec.training.seed,
            rungs=self._reports.get(number),
        )
        self.tell(record)

    def tell(self, record: TrialRecord) -> None:
        """Tell the study how a trial ended, by its record."""
        number = record.number
        for epochs, objective in record.rungs.items():
            self._report(number, epochs, objective)
        trial = self._trial_id(number)
        for name, value in notes_of(record).items():
            self._store.set_trial_user_attr(trial, name, value)
        # Told to the storage, because a study that is told PRUNED takes no value of ours.
        self._store.set_trial_state_values(
            trial, TrialState[record.state], objective_values(self.spec, record)
        )
        self.records[number] = record

    def save(self, checkpoint_path: str) -> None:
        """Write what a later process needs to go on, beside the study's own file."""
        state = {
            name: getattr(self, name)
            for name in ("_numbers", "_configurations", "_reports", "_waiting", "records")
        }
        with open(checkpoint_path, "wb") as stream:
            pickle.dump(state, stream)

    def restore(self, checkpoint_path: str) -> None:
        """Take up what `save` wrote (a file of one's own: it is unpickled)."""
        with open(checkpoint_path, "rb") as stream:
            self.__dict__.update(pickle.load(stream))

    def keep(self) -> None:
        """Write the study's file, where it is behind the study for long."""
        self._store.keep()

    def close(self) -> bool:
        """Write the study's file, and let go of it; return whether it could be written."""
        return self._store.close()

    def _next_number(self) -> int:
        """The number of the next new trial: a gap that was left in the study, or its end.

        The study is read once: nobody else hands out its numbers.
        """
        if self._gaps is None:
            trials = self.study.get_trials(deepcopy=False)
            self._gaps = [trial.number for trial in trials if trial.state == TrialState.WAITING]
            self._end = len(trials)
        if self._gaps:
            return self._gaps.pop(0)
        self._end += 1
        return self._end - 1

    def _new(self, number: int) -> dict[str, Any]:
        first = self.spec.first_configurations()
        if number < len(first):
            self._claim(number, first[number])
            return first[number]
        if self.spec.constrained or self.spec.search.warm_start:
            return self._within_constraints(number)
        self.study.sampler = make_sampler(self.spec, number)
        trial = self.study.ask()
        if trial.number != number:
            raise RunError(f"{self.path}: something else is writing to this study")
        return self.spec.suggest(trial)

    def _within_constraints(self, number: int) -> dict[str, Any]:
        """Draw configurations until one may be trained; that one alone is written."""
        self._begin(number)
        frozen = self._store.get_trial(self._trial_id(number))
        configuration = draw_within(self.spec, number, self.study, frozen)
        self._keep(number, configuration)
        return configuration

    def _claim(self, number: int, configuration: Mapping[str, Any]) -> None:
        """Make trial `number` a running one with this configuration."""
        self._begin(number)
        self._keep(number, configuration)

    def _begin(self, number: int) -> None:
        for _ in range(len(self.study.get_trials(deepcopy=False)), number + 1):
            self.study.add_trial(optuna.create_trial(state=TrialState.WAITING))
        self._store.set_trial_state_values(self._trial_id(number), TrialState.RUNNING)

    def _keep(self, number: int, configuration: Mapping[str, Any]) -> None:
        trial = self._trial_id(number)
        params, distributions = self.spec.as_params(configuration)
        for name, distribution in distributions.items():
            inner = distribution.to_internal_repr(params[name])
            self._store.set_trial_param(trial, name, inner, distribution)

    def _report(self, number: int, epochs: int, objective: float) -> None:
        known = self._reports.setdefault(number, {})
        if math.isfinite(objective) and known.get(epochs) != objective:
            known[epochs] = objective
            trial = self._trial_id(number)
            self._store.set_trial_intermediate_value(trial, epochs, objective)

    def _trial_id(self, number: int) -> int:
        """The storage's own id of a trial."""
        if number not in self._ids:
            study = self._store.get_study_id_from_name(self.spec.name)
            found = self._store.get_trial_id_from_study_id_trial_number(study, number)
            self._ids[number] = int(found)
        return self._ids[number]
