"""Which engine a trial goes to, and the roster that lets all trial processes in.

The dispatcher is one small asyncio actor beside the driver. Trials ask it once, when they
begin; how they are trained it never sees.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from desisky_tune.errors import DispatcherError, EngineError
from desisky_tune.search.figures import EngineFigures, added
from desisky_tune.search.outages import Attempt
from desisky_tune.search.verdicts import Verdicts

#: Trials that fail at one engine, none ending well between them, until it is left out.
FAILURES_IN_A_ROW = 3

#: Engines at which a trial is tried before it has failed.
TRIES = 3

#: How long an engine that has died may take to be up again before that is said, and until it is
#: given up (s): a node may have to come for it.
START_NOTICE = 60.0
START_PATIENCE = 600.0

#: Seconds between two looks at an engine that is being started again.
START_PAUSE = 0.2

#: How long an engine may take to tell its figures before they are left out (s).
FIGURES_PATIENCE = 2.0


class Roster:
    """Counts the trial processes that have started.

    Ray Tune hands a process that finished early the next trial and then kills the
    processes that are still starting; a whole search can end up in one process.
    Holding the first results until all have joined prevents it.
    """

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._joined: set[str] = set()
        self._full = asyncio.Event()
        if expected <= 1:
            self._full.set()

    async def join(self, member: str) -> None:
        """Count a process in; a second call by the same one changes nothing."""
        self._joined.add(member)
        if len(self._joined) >= self._expected:
            self._full.set()

    async def wait(self, patience: float) -> bool:
        """Return True once all have joined, False after `patience` seconds."""
        try:
            await asyncio.wait_for(self._full.wait(), patience)
        except TimeoutError:
            # One wait is enough: the rest of the search goes on with those that came.
            self._full.set()
            return False
        return True


@dataclass
class _Engine:
    """An engine as the dispatcher sees it."""

    handle: Any
    room: int
    name: str = ""
    #: Whether it was ever up: one that waits for a node to come may never be.
    begun: bool = False
    up: bool = False
    lost: str | None = None
    #: Lost to new trials because they failed there, not because it is gone.
    left_out: bool = False
    watched: bool = False
    trials: set[int] = field(default_factory=set)
    #: Trials that failed there one after another.
    failures: int = 0
    #: Figures of processes of it that have died, and the last ones told.
    past: list[EngineFigures] = field(default_factory=list)
    latest: EngineFigures | None = None

    @property
    def free(self) -> bool:
        return self.up and self.lost is None and len(self.trials) < self.room

    @property
    def load(self) -> float:
        return len(self.trials) / self.room


class Dispatcher(Roster, Verdicts):
    """Spreads trials over engines: the least loaded first, and a trial stays where it is.

    Parameters
    ----------
    expected
        Trial processes that there will be.
    rows
        What engines train on, for those that ask.
    """

    def __init__(self, expected: int, rows: Any = None) -> None:
        Roster.__init__(self, expected)
        Verdicts.__init__(self)
        self._rows = rows
        self._engines: list[_Engine] = []
        self._homes: dict[int, int] = {}
        self._over: set[int] = set()
        #: Engines at which a trial has failed, and the trials that are to blame themselves.
        self._tried: dict[int, set[int]] = {}
        self._blamed: set[int] = set()
        self._news: list[str] = []
        self._attempts: list[Attempt] = []
        #: Names of the engines whose storage fails.
        self._failing: set[str] = set()
        self._changed = asyncio.Condition()
        self._processes: set[str] = set()
        self._watches: list[asyncio.Task[None]] = []
        self._releases: set[asyncio.Future[Any]] = set()

    async def add(self, engines: Sequence[tuple[Any, int]], names: Sequence[str] = ()) -> None:
        """Take up engines: their handles, how many trials may be at each, and their names."""
        names = names or [f"engine {len(self._engines) + at}" for at in range(len(engines))]
        for (handle, room), name in zip(engines, names, strict=True):
            self._engines.append(_Engine(handle, room, name))
            self._watch_start(len(self._engines) - 1)

    async def rows(self) -> Any:
        """Return what engines train on, as it was given (a reference, not the rows)."""
        return self._rows

    async def started(self, process: str) -> None:
        """Count the process of an engine that has started, or started again."""
        self._processes.add(process)

    async def place(self, number: int) -> tuple[int, Any]:
        """Return the engine of a trial, by its number here and its handle.

        Waits where none has room for a new one.

        Raises
        ------
        EngineError
            When no engine is left.
        """
        async with self._changed:
            while True:
                home = self._homes.get(number)
                if home is not None and self._engines[home].lost is None:
                    self._engines[home].trials.add(number)
                    return home, self._engines[home].handle
                if self._engines and all(engine.lost is not None for engine in self._engines):
                    raise EngineError(f"no engine is left to train on: {self._engines[0].lost}")
                if number in self._over:
                    # Its process died while it waited here, and the driver gave it up.
                    raise EngineError(f"trial {number} is over")
                tried = self._tried.get(number, set())
                if not self._begun() - tried:
                    tried = set()  # where else it could go has gone since
                free = [
                    at for at, engine in enumerate(self._engines) if engine.free and at not in tried
                ]
                if free:
                    # One that failed elsewhere goes where nothing did: that tells who is to blame.
                    suspect = bool(tried)
                    home = min(
                        free,
                        key=lambda at: (
                            suspect and self._engines[at].failures,
                            self._engines[at].load,
                            at,
                        ),
                    )
                    if number in self._homes:
                        self._engines[self._homes[number]].trials.discard(number)
                    self._homes[number] = home
                    self._engines[home].trials.add(number)
                    return home, self._engines[home].handle
                await self._changed.wait()

    async def interrupted(self, number: int) -> None:
        """Hear that the process of a trial has died, and will be started again.

        Its engine remains its own, but until then it takes up no room there: where a node was
        lost, those that wait for this room may hold what the new process waits for.
        """
        async with self._changed:
            home = self._homes.get(number)
            if home is not None:
                self._engines[home].trials.discard(number)
                self._changed.notify_all()

    async def lost(self, at: int, why: str) -> None:
        """Hear that an engine is dead and will not be started again."""
        async with self._changed:
            engine = self._engines[at]
            if engine.lost is None or engine.left_out:
                engine.lost, engine.left_out = why, False
                self._news.append(f"an engine is lost, and its trials go on elsewhere: {why}")
            self._writes_no_more(engine)
            if not self._begun():
                for left, each in enumerate(self._engines):
                    if each.left_out:
                        self._take_back(left, "it is the last one")
            self._changed.notify_all()

    async def died(self, at: int) -> None:
        """Hear that the process of an engine has died: it gets no trials until it is up again."""
        self._engines[at].up = False
        self._writes_no_more(self._engines[at])
        self._watch_start(at)

    async def failed(self, number: int, why: str, *, storage: bool = False) -> bool:
        """Hear that a trial raised or killed its engine; return whether to try it elsewhere.

        What fails at one engine and not at another is the fault of its machine. So a trial is
        tried at `TRIES` engines, and one that fails at all of them is to blame itself; an
        engine at which `FAILURES_IN_A_ROW` trials failed gets no more of them, unless it turns
        out that they were to blame, or the others are lost. The last one is never left out: then
        the trials fail, and the search ends by itself.

        Files that cannot be written (`storage`) are the machine's fault unless most engines meet
        the same: then it is the storage's, and is to be waited for.
        """
        async with self._changed:
            home = self._homes.get(number)
            if home is None or number in self._blamed or (storage and self._storage_fails):
                return False
            engine, tried = self._engines[home], self._tried.setdefault(number, set())
            tried.add(home)
            others = self._begun() - tried
            if (len(tried) >= TRIES and engine.lost is None) or not others:
                self._blamed.add(number)
                for at in tried - {home}:
                    self._acquit(at)
                return False
            engine.failures += 1
            if engine.failures >= FAILURES_IN_A_ROW and engine.lost is None:
                engine.lost, engine.left_out = f"left out: {why}", True
                self._writes_no_more(engine)
                self._news.append(
                    f"an engine gets no more trials: {engine.failures} failed there one after "
                    f"another, the last with: {why}"
                )
            self._homes.pop(number)
            # Its state is on disk: another engine goes on from there, and its weights are that
            # one's to write.
            self._let_go(engine, number, keep=False)
            self._changed.notify_all()
            return True

    @property
    def _storage_fails(self) -> bool:
        """Whether it is not one machine that cannot write."""
        begun = sum(engine.begun for engine in self._engines)
        return len(self._failing) > max(1, begun // 2)

    def _begun(self) -> set[int]:
        """Return the engines that were up, and are not lost."""
        return {
            at for at, engine in enumerate(self._engines) if engine.begun and engine.lost is None
        }

    def _acquit(self, at: int) -> None:
        """Take back that a trial failed at an engine: it failed elsewhere as well."""
        engine = self._engines[at]
        engine.failures = max(0, engine.failures - 1)
        if engine.left_out and engine.failures < FAILURES_IN_A_ROW:
            self._take_back(at, "they were to blame")

    def _take_back(self, at: int, why: str) -> None:
        engine = self._engines[at]
        engine.lost, engine.left_out, engine.up = None, False, False
        self._news.append(f"an engine that was left out gets trials again: {why}")
        self._watch_start(at)  # if it still is there

    def _writes_no_more(self, engine: _Engine) -> None:
        """Forget that an engine cannot write: it will not say when it can again."""
        if engine.name in self._failing:
            self._failing.discard(engine.name)
            if not self._failing:
                self._attempts.append((time.time(), None))

    async def tried_storage(self, engine: str, why: str | None) -> None:
        """Hear from an engine that storage fails, or (None) that it works again."""
        if why is None:
            self._failing.discard(engine)
        else:
            self._failing.add(engine)
        # By the clock of this machine, which is the driver's.
        self._attempts.append((time.time(), why))

    async def news(self) -> tuple[list[EngineFigures], list[str], list[Attempt]]:
        """Return the engines' figures, and what there is new since the last time.

        That is what a person should know, and the attempts at storage that failed, or
        succeeded after that.
        """
        figures = await self.figures()
        said, self._news = self._news, []
        attempts, self._attempts = self._attempts, []
        return figures, said, attempts

    async def ended(self, number: int, *, well: bool = False) -> None:
        """Hear that a trial is over (`well`: with a figure): its engine keeps its weights.

        The driver says so of every trial, also of one whose process has died: that is what
        ends the trial's lease on its engine.
        """
        async with self._changed:
            self._over.add(number)
            self._changed.notify_all()
            home = self._homes.pop(number, None)
            if home is None:
                return
            engine = self._engines[home]
            if well:
                engine.failures = 0
            self._let_go(engine, number)
            self._changed.notify_all()

    def _let_go(self, engine: _Engine, number: int, *, keep: bool = True) -> None:
        engine.trials.discard(number)
        if engine.lost is None:
            call = engine.handle.release if keep else engine.handle.forget
            release = asyncio.ensure_future(_quietly(call.remote(number)))
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)

    async def drain(self) -> None:
        """Wait until the engines have kept what was released."""
        while self._releases:
            await asyncio.wait(set(self._releases))

    async def figures(self) -> list[EngineFigures]:
        """Return what each engine did so far, its earlier processes included."""
        up = [engine for engine in self._engines if engine.up and engine.lost is None]
        told = await asyncio.gather(*(self._ask(engine) for engine in up))
        for engine, figures in zip(up, told, strict=True):
            before = engine.latest
            if figures is None:
                continue
            if before is not None and figures.seconds < before.seconds:
                engine.past.append(replace(before, slots=0, busy=0, lanes=0))
            engine.latest = figures
        return [
            replace(
                added([engine.latest, *engine.past]),
                engine=engine.latest.engine,
            )
            for engine in self._engines
            if engine.latest is not None
        ]

    async def processes(self) -> dict[str, int]:
        """Return how many processes were started, by kind."""
        return {
            "engines": len(self._processes),
            "trials": len(self._joined),
            "dispatcher": 1,
        }

    async def _ask(self, engine: _Engine) -> EngineFigures | None:
        try:
            answer = _quietly(engine.handle.figures.remote())
            return await asyncio.wait_for(answer, FIGURES_PATIENCE)
        except TimeoutError:
            return None

    @staticmethod
    def _kill(handle: Any) -> None:
        """End an engine that was given up: Ray would start it again and again."""
        import ray

        ray.kill(handle)

    def _watch_start(self, at: int) -> None:
        engine = self._engines[at]
        if not engine.watched and engine.lost is None:
            engine.watched = True
            self._watches = [watch for watch in self._watches if not watch.done()]
            self._watches.append(asyncio.create_task(self._watch(at)))

    async def _watch(self, at: int) -> None:
        """Open an engine to trials when it has started; give up one that dies again and again."""
        from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayActorError

        engine, first, said = self._engines[at], None, False
        while True:
            try:
                await engine.handle.ready.remote()
            except (ActorDiedError, ActorUnschedulableError) as error:
                await self.lost(at, death_of(error))
                return
            except RayActorError as error:
                now = time.monotonic()
                first = now if first is None else first
                why = f"died and is not up again after {now - first:.0f} s: {death_of(error)}"
                if now - first > START_PATIENCE:
                    await self.lost(at, why)
                    self._kill(engine.handle)
                    return
                if now - first > START_NOTICE and not said:
                    said = True
                    self._news.append(f"an engine {why}")
                await asyncio.sleep(START_PAUSE)  # it is being started again
            else:
                break
        engine.watched, engine.begun = False, True
        async with self._changed:
            engine.up = True
            self._changed.notify_all()


def ask(dispatcher: Any, method: str, *arguments: Any, **named: Any) -> Any:
    """Return what a dispatcher answers, for a process that may wait for it.

    Raises
    ------
    DispatcherError
        When its process is gone.
    Exception
        What was raised there.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return ray.get(getattr(dispatcher, method).remote(*arguments, **named))
    except RayActorError as error:
        raise DispatcherError(f"the dispatcher is gone: {death_of(error)}") from error
    except RayTaskError as error:
        raise error.cause from error


async def _quietly(reference: Any) -> Any:
    """Await an engine's answer; None where it has died meanwhile."""
    from ray.exceptions import RayError

    try:
        return await reference
    except RayError:
        return None


def death_of(error: Exception) -> str:
    """Return why an actor died, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # What its constructor raised stands in the last line that names an error; the kind of
    # death in the first line.
    named = [line for line in lines if "Error: " in line]
    return (named[-1] if named else lines[0])[:500]
