"""A light trial's side of the engine: nothing here trains, and nothing imports JAX."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from desisky_tune.search.backend import Assignment, Progress, stopped_by
from desisky_tune.search.dispatch import ask, death_of

#: Seconds between two looks at an engine that is being started again.
RESTART_PAUSE = 0.2


class EngineDiedError(Exception):
    """The engine's process died more often than it may while it trained one trial alone."""


class EngineBackend:
    """Asks an engine to train, wherever the dispatcher has placed the trial.

    An engine that dies is started again by Ray, and the trial goes on from its last rung.
    After a death each trial that was there takes its next rung alone: should the engine die
    again, it is known by whom, and that trial fails while its neighbours go on. Where there
    is another engine, it is tried there first: the machine may be to blame.

    Parameters
    ----------
    dispatcher
        Handle of the `desisky_tune.search.dispatch.Dispatcher`.
    max_deaths
        How often the engine may die while it trains a trial alone, until the trial has failed.
    """

    def __init__(self, dispatcher: Any, max_deaths: int = 2) -> None:
        self._dispatcher = dispatcher
        self._max_deaths = max_deaths
        self._number: int | None = None
        self._home = 0
        self._engine: Any = None
        self._suspect = False
        self._deaths = 0
        self._epochs = 0

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        """Take a trial to `epochs` epochs in total, however often its engine dies meanwhile.

        Raises
        ------
        EngineError
            When no engine is left.
        DispatcherError
            When the dispatcher's process is gone.
        OSError
            When the engine cannot write the trial's files, nor another one.
        """
        from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayActorError

        if self._number != trial.number:
            self._number, self._engine = trial.number, None
            self._suspect, self._deaths, self._epochs = False, 0, 0
        while True:
            alone = False
            try:
                if self._engine is None:
                    self._home, self._engine = ask(self._dispatcher, "place", trial.number)
                    self._ask("register", trial)
                if self._suspect:
                    alone = self._ask("turn", trial.number)
                if alone or not self._suspect:
                    progress = self._ask("advance", trial.number, epochs)
                    if progress is not None:
                        self._suspect = False
                        if _raised(progress) and self._goes_elsewhere(str(progress.reason)):
                            continue
                        return self._reached(progress)
                self._ask("register", trial)
            except OSError as error:
                # A full disk of its machine, or the storage of all.
                if not self._goes_elsewhere(f"{type(error).__name__}: {error}", storage=True):
                    raise
            except (RayActorError, ActorUnschedulableError) as error:
                self._deaths += alone
                if alone and self._goes_elsewhere(death_of(error)):
                    continue
                if self._deaths > self._max_deaths:
                    return stopped_by(
                        EngineDiedError(
                            f"the engine's process died {self._deaths} times while it trained "
                            "this trial alone (out of memory?)"
                        ),
                        self._epochs,
                    )
                self._suspect = True
                # A node that has gone takes its engine along: it cannot be started again.
                # Or it dies at each start, and the dispatcher has given it up: ask where to go.
                self._engine = None
                if isinstance(error, ActorDiedError | ActorUnschedulableError):
                    ask(self._dispatcher, "lost", self._home, death_of(error))
                else:
                    self._dispatcher.died.remote(self._home)
                    time.sleep(RESTART_PAUSE)

    def _goes_elsewhere(self, why: str, *, storage: bool = False) -> bool:
        """Return whether a trial that failed here is to be tried at another engine."""
        moves = bool(ask(self._dispatcher, "failed", self._number, why, storage=storage))
        if moves:
            self._engine = None
        return moves

    def _reached(self, progress: Progress) -> Progress:
        """Note how far a trial is; one that an exception ended is where it was before."""
        self._epochs = max(self._epochs, progress.epochs)
        return replace(progress, epochs=self._epochs)

    def release(self, trial: Assignment) -> None:
        """Leave it to the driver, which ends the lease of every trial (`Dispatcher.ended`)."""

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Return the engine's answer, or raise what was raised there."""
        import ray
        from ray.exceptions import RayTaskError

        try:
            return ray.get(getattr(self._engine, method).remote(*arguments))
        except RayTaskError as error:
            raise error.cause from error


def _raised(progress: Progress) -> bool:
    """Whether an exception ended a trial: an engine says so before any epoch of its own."""
    return progress.failed and progress.epochs == 0
