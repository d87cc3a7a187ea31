"""A search's trial as Ray Tune sees it.

A trial is a thin class trainable: it asks a backend to take its configuration to
the next rung and reports what comes back. One process serves many trials in turn
(``reuse_actors``), so whatever a trial holds is released in `reset_config` as well as
in `cleanup`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from desisky_tune.errors import DispatcherError, EngineError
from desisky_tune.search.backend import Assignment, Backend, Member, stopped_by
from desisky_tune.search.dispatch import ask
from desisky_tune.search.verdicts import GO, STOP

#: Seconds that a first result waits for the other trial processes to start.
ROSTER_PATIENCE = 60.0


@dataclass(frozen=True)
class TrialPlan:
    """What every trial of a search shares.

    Attributes
    ----------
    rungs
        Epochs (in total) at which a trial reports, ascending; the last is the end.
    seed
        Seed of the initial weights and shuffles of every trial.
    backend
        Makes the backend inside the trial's process; called once per process.
    environment
        Set in the trial's process before JAX is imported there.
    members
        What each trial trains, where it is more than one training.
    keep_members
        Whether the weights of each training are kept.
    judged
        Whether a trial waits at each rung for a verdict (`desisky_tune.search.ordering`).
    """

    rungs: tuple[int, ...]
    seed: int
    backend: Callable[[], Backend]
    environment: Mapping[str, str]
    members: tuple[Member, ...] = ()
    keep_members: bool = False
    judged: bool = False


class SearchTrial(tune.Trainable):
    """One trial: advances to the next rung at each step."""

    _epochs: int
    #: Its last report.
    _reached: dict[str, Any] | None

    # Ray Tune calls setup with what `tune.with_parameters` was given.
    def setup(  # type: ignore[override]
        self, config: dict[str, Any], plan: TrialPlan, roster: Any = None
    ) -> None:
        """Begin the process's first trial."""
        os.environ.update(plan.environment)
        self._plan = plan
        self._backend = plan.backend()
        self._roster = roster
        self._judge = roster if plan.judged else None
        if roster is not None:
            roster.join.remote(f"{self._local_ip}:{os.getpid()}")
        self._begin(config)

    def step(self) -> dict[str, Any]:
        """Take the trial to its next rung.

        An exception in the backend ends this trial, with the reason in its result,
        and not the process: the same configuration would raise again. A fault of the
        machine (a full disk, engines or the dispatcher that are gone) is none of the trial's:
        it is raised.
        """
        if self._judge is not None and self._reached is not None:
            verdict = ask(self._judge, "verdict", self._assignment.number, self._epochs)
            if verdict != GO:
                return {**self._reached, "done": verdict == STOP}
        target = next(rung for rung in self._plan.rungs if rung > self._epochs)
        try:
            progress = self._backend.advance(self._assignment, target)
        except (OSError, EngineError, DispatcherError):
            raise
        except Exception as error:
            progress = stopped_by(error, self._epochs)
        if self._roster is not None:
            ask(self._roster, "wait", ROSTER_PATIENCE)
            self._roster = None
        self._epochs = progress.epochs
        done = progress.ends_at(self._plan.rungs[-1])
        self._reached = {
            **progress.as_result(self._plan.rungs),
            "seed": self._plan.seed,
            "members": len(self._assignment.trainings),
        }
        return {**self._reached, "done": done}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Release the trial that was, and begin the next in the same process."""
        self._backend.release(self._assignment)
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """Release the last trial of this process."""
        self._backend.release(self._assignment)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep nothing here: the backend has written the trial's state at its rung."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Take nothing from here: the backend goes on from the state that it wrote."""

    def _begin(self, config: dict[str, Any]) -> None:
        configuration = {name: value for name, value in config.items() if name != "trial"}
        self._assignment = Assignment(
            int(config["trial"]),
            configuration,
            self._plan.seed,
            self._plan.members,
            self._plan.keep_members,
        )
        self._epochs = 0
        self._reached = None
