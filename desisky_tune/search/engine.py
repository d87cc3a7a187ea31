"""The engine: one process per device that holds the rows and trains the trials given to it.

Ray Tune's trials are light processes that ask an engine to take their configuration to its
next rung. The engine lives through the whole search: what was compiled for one trial serves
the next, and the device never waits for a process to start.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from desisky_tune.search.backend import Assignment, Backend, Progress, stopped_by
from desisky_tune.search.figures import EngineFigures, Meter
from desisky_tune.search.outages import EngineStorage

if TYPE_CHECKING:
    from desisky_tune.search.arrays import SearchArrays
    from desisky_tune.search.patience import StorageWatch
    from desisky_tune.search.pretraining import Pretraining
    from desisky_tune.search.sections import TrainingSpec
    from desisky_tune.search.storage import RunMirror

Device = Literal["cpu", "gpu"]

#: Seconds between two settings of Ray's metrics: a gauge vanishes 20 s after its last one.
METRICS_PERIOD = 5.0


@dataclass(frozen=True)
class Work:
    """What the engines of a search train.

    Attributes
    ----------
    run
        Name of the run, for metrics.
    training
        What all trials share: epochs, loss.
    folder
        Where the states and the checkpoints of the trials are written.
    header
        Further keys for the header of each checkpoint.
    trainings
        Trainings of one shape that a GPU may have under way at a time; None for any number.
    mirror
        Where these files are put as well, for a run on a URL.
    slots
        Trainings side by side in a program of a GPU; None for a calibration.
    pretraining
        What trainings begin with; None where their weights are drawn.
    """

    run: str
    training: TrainingSpec
    folder: Path
    header: Mapping[str, Any]
    trainings: int | None = None
    mirror: RunMirror | None = None
    slots: int | None = None
    pretraining: Pretraining | None = None


@dataclass(frozen=True)
class Rows:
    """What is trained and the rows, in Ray's object store: whoever put them keeps them there.

    They are no arguments of an engine: Ray would not keep large ones for its next start.
    """

    reference: Any

    def get(self) -> tuple[Work, SearchArrays]:
        """Return both; the rows are not copied."""
        import ray

        found: tuple[Work, SearchArrays] = ray.get(self.reference)
        return found


def make_backend(
    device: Device,
    slots: int,
    work: Work,
    arrays: SearchArrays,
    storage: StorageWatch | None = None,
) -> Backend:
    """Return what trains on a device. Nothing else decides it.

    `storage` is told where the files of the trials cannot be written, and when they can again.

    `Backend.advance` is called by as many threads at a time as the engine has slots, or as the
    backend has `room` for: one that lets only some of them train at a time does the rest of its
    work beside that. A backend that has a `meter` (`desisky_tune.search.figures.Meter`) tells by
    it what its time goes into; one that runs all slots in one program has ``lanes = 1``.
    """
    if device == "gpu":
        from desisky_tune.search.slot_backend import SlotBackend

        return SlotBackend(
            arrays,
            work.training,
            work.folder,
            work.header,
            work.mirror,
            slots=work.slots,
            expected=work.trainings,
            pretraining=work.pretraining,
            storage=storage,
            of_run=True,
        )
    # JAX now, while the trials' processes start: not when the first of them asks.
    importlib.import_module("desisky_tune.training.program")

    from desisky_tune.search.local import LocalBackend

    return LocalBackend(
        arrays,
        work.training,
        work.folder,
        work.header,
        work.mirror,
        lanes=slots,
        pretraining=work.pretraining,
        storage=storage,
        of_run=True,
    )


class Gate:
    """Lets as many trainings in as there are slots, or one alone.

    Who asks to be alone goes before those who wait for a slot: nobody new is let in until
    it has come and gone.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._changed = asyncio.Condition()
        self._waiting_alone = 0
        self._alone = False
        self.inside = 0

    async def enter(self, *, alone: bool = False) -> None:
        """Wait for a slot, or for the whole engine."""
        async with self._changed:
            if alone:
                self._waiting_alone += 1
                try:
                    await self._changed.wait_for(lambda: not self.inside)
                finally:
                    self._waiting_alone -= 1
                self._alone = True
            else:
                await self._changed.wait_for(
                    lambda: (
                        not self._alone and not self._waiting_alone and self.inside < self._slots
                    )
                )
            self.inside += 1

    async def leave(self) -> None:
        """Give the slot, or the engine, to the next."""
        async with self._changed:
            self.inside -= 1
            self._alone = False
            self._changed.notify_all()


class Engine:
    """Trains the trials that are registered with it (an asyncio Ray actor).

    A call about a trial that it does not know is refused (`advance` returns None): an engine
    that was started again has forgotten all, and must not begin a trial from nothing. Its
    trial registers again, and the backend goes on from the state on disk.

    Parameters
    ----------
    name
        What it is called in figures and metrics.
    device
        ``cpu`` or ``gpu``.
    slots
        Trials that are trained at a time, each in a thread of its own.
    run
        Name of the run, for metrics.
    dispatcher
        Its name among Ray's actors. Told that this process has started, and asked for what
        is trained on which rows; None with a `backend`.
    environment
        Set in this process, where JAX is not imported yet.
    backend
        In place of the device's own, for tests.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        slots: int,
        run: str,
        dispatcher: str | None,
        environment: Mapping[str, str] | None = None,
        backend: Backend | None = None,
    ) -> None:
        os.environ.update(environment or {})
        if dispatcher is not None:
            import ray

            # By its name: a handle among the arguments makes Ray warn at each start.
            desk: Any = ray.get_actor(dispatcher)
            desk.started.remote(f"{name}:{os.getpid()}")
            if backend is None:
                work, arrays = ray.get(desk.rows.remote()).get()
                backend = make_backend(device, slots, work, arrays, EngineStorage(desk, name))
        assert backend is not None
        self._name = name
        self._slots = slots
        self._run = run
        self._backend = backend
        self._meter: Meter = getattr(backend, "meter", None) or Meter(slots)
        self._lanes = int(getattr(backend, "lanes", slots))
        room = int(getattr(backend, "room", slots))
        self._threads = ThreadPoolExecutor(room, thread_name_prefix="trial")
        self._gate = Gate(room)
        self._trials: dict[int, Assignment] = {}
        self._turns: set[int] = set()
        self._finished = 0
        self._busy: set[int] = set()
        self._ready_at = time.perf_counter()
        self._metrics: asyncio.Task[None] | None = None

    async def ready(self) -> int:
        """Return the process's id, once it can take trials."""
        if self._metrics is None:
            self._metrics = asyncio.create_task(self._tell_metrics())
        return os.getpid()

    async def register(self, trial: Assignment) -> None:
        """Take a trial up; one that is known stays as it is."""
        self._trials.setdefault(trial.number, trial)

    async def turn(self, number: int) -> bool:
        """Wait until a trial can be trained alone; return False when it is not known.

        The next `advance` of this trial is then the only one, so that whoever sees the
        engine die during it knows which trial to suspect.
        """
        if number not in self._trials:
            return False
        if number not in self._turns:
            await self._gate.enter(alone=True)
            self._turns.add(number)
        return True

    async def advance(self, number: int, epochs: int) -> Progress | None:
        """Take a trial to `epochs` epochs in total; None when it is not known.

        An exception of the backend ends this trial alone, with the reason in its result: the
        same configuration would raise again.

        Raises
        ------
        OSError
            A fault of the machine (a full disk), which is none of the trial's.
        """
        trial = self._trials.get(number)
        if trial is None:
            return None
        async with self._slot(number):
            loop = asyncio.get_running_loop()
            try:
                return await loop.run_in_executor(
                    self._threads, self._backend.advance, trial, epochs
                )
            except OSError:
                raise
            except Exception as error:
                return stopped_by(error, 0)

    async def release(self, number: int) -> None:
        """Keep the best weights of a trial, and forget it; nothing where it is not known."""
        if number in self._turns:
            self._turns.discard(number)
            await self._gate.leave()
        trial = self._trials.pop(number, None)
        if trial is None:
            return
        self._finished += 1
        # In a thread of its own: the slots are for training.
        await asyncio.to_thread(self._backend.release, trial)

    async def forget(self, number: int) -> None:
        """Let go of a trial that goes on at another engine: its weights are that one's to write."""
        if number in self._turns:
            self._turns.discard(number)
            await self._gate.leave()
        trial = self._trials.pop(number, None)
        if trial is not None:
            # In a thread: whoever is at work on it may have to be waited for.
            await asyncio.to_thread(getattr(self._backend, "forget", self._backend.release), trial)

    async def figures(self) -> EngineFigures:
        """Return what the time of this process went into."""
        now = time.perf_counter()
        spent = self._meter.seconds()
        # Where all slots are one program, the trials' calls are no measure of what it does.
        keeping = self._meter.keeping() if self._lanes == self._slots else 0.0
        return EngineFigures(
            engine=self._name,
            slots=self._slots,
            busy=min(len(self._busy), self._slots),
            trials=self._finished,
            lanes=self._lanes,
            seconds=self._lanes * (now - self._ready_at),
            compiling=spent["compiling"],
            training=spent["training"],
            keeping=keeping,
        )

    @asynccontextmanager
    async def _slot(self, number: int) -> AsyncIterator[None]:
        """Hold a slot for a trial, unless it has the whole engine already."""
        if number not in self._turns:
            await self._gate.enter()
        self._turns.discard(number)
        self._busy.add(number)
        try:
            with self._meter.working():
                yield
        finally:
            self._busy.discard(number)
            await self._gate.leave()

    async def _tell_metrics(self) -> None:
        from desisky_tune.search.engine_metrics import EngineMetrics

        metrics = EngineMetrics(self._run, self._name)
        while True:
            metrics.tell(await self.figures())
            await asyncio.sleep(METRICS_PERIOD)
