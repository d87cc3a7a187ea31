"""The driver's side of the engines: which there are, their start, their figures, their end."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray.tune import Callback

from desisky_tune.errors import RunError
from desisky_tune.search.dispatch import Dispatcher
from desisky_tune.search.engine import Device, Engine, Rows, Work
from desisky_tune.search.events import EnginesReported, EventSink, Note
from desisky_tune.search.figures import EngineFigures, SessionFigures, added
from desisky_tune.search.local import process_environment
from desisky_tune.search.outages import Outages

if TYPE_CHECKING:
    from desisky_tune.search.arrays import SearchArrays
    from desisky_tune.search.ordering import OrderedScheduler, Ordering
    from desisky_tune.search.sections import ResourceSpec

#: What Ray reserves for a light trial (CPU).
TRIAL_CPUS = 0.01

#: Trials at an engine beyond its slots: one that waits is taken up the moment a slot is free.
SPARE = 2

#: Trials in flight on one GPU at most, each with a light process of its own.
MOST_PER_GPU = 64

#: How often an engine's process may die before it is given up: often, because a trial that
#: kills it is found out much earlier (`desisky_tune.search.engine_client`).
MAX_RESTARTS = 1000

#: Seconds between two looks at the engines' figures.
FIGURES_PERIOD = 2.0

#: How long the engines may take to keep the last weights, when a session ends (s).
CLOSING_PATIENCE = 120.0

#: The same where the search was asked to end, or cannot write: a resume makes up for it (s).
LEAVING_PATIENCE = 5.0


@dataclass(frozen=True)
class Node:
    """A node of Ray: its id, what a person calls it, and what it has."""

    id: str
    address: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class EnginePlan:
    """An engine to be started.

    Attributes
    ----------
    name
        For figures and metrics.
    device
        ``cpu`` or ``gpu``.
    slots
        Trials at a time.
    spare
        Trials that may wait there beside them.
    cpus, gpus
        What Ray reserves for it.
    node
        Where it must run; None: wherever Ray finds room, also on a node that is to come.
    """

    name: str
    device: Device
    slots: int
    spare: int
    cpus: float
    gpus: int
    node: str | None

    @property
    def room(self) -> int:
        """Trials that may be at it, trained or waiting."""
        return self.slots + self.spare


def nodes_of(ray: Any) -> list[Node]:
    """Return the nodes of a Ray that are alive."""
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def plan_engines(
    nodes: Sequence[Node],
    asked: ResourceSpec,
    emit: EventSink,
    *,
    local: bool,
    members: int = 1,
    spare: int = SPARE,
) -> list[EnginePlan]:
    """Return the engines of a search: one per node for the CPUs, or one per GPU.

    Parameters
    ----------
    nodes
        What there is now.
    asked
        What a trial uses, and how many are trained at a time.
    emit
        Told where less is there than was asked for.
    local
        Whether Ray lives in this process: what it has not now it will never have.
    members
        Trainings of each trial.
    spare
        Trials that may wait at each engine of a CPU.

    Raises
    ------
    RunError
        When not one trial fits, and nothing can come that it would fit on.
    """
    device: Device = "gpu" if asked.gpus_per_trial else "cpu"
    per_gpu = _per_gpu(asked, members)
    places = [place for node in nodes for place in _places(node, asked, per_gpu)]
    room = sum(slots for _, slots in places)
    have = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    needs = (
        f"a trial asks for {asked.cpus_per_trial:g} CPU and {asked.gpus_per_trial:g} GPU; "
        f"Ray has {have[0]:g} CPU and {have[1]:g} GPU"
    )
    if room < 1 and (local or asked.workers is None):
        later = "" if local else "; with --workers N the search waits for nodes that are to come"
        raise RunError(f"resources: {needs}{later}")
    wanted = room if asked.workers is None else asked.workers
    if wanted > room:
        emit(Note(f"{wanted} workers were asked for: {needs}"))
    sizes = _spread(min(wanted, room), [slots for _, slots in places])
    chosen: list[tuple[Node | None, int]] = [
        (node, size) for (node, _), size in zip(places, sizes, strict=True) if size
    ]
    if wanted > room and not local:
        # Ray's autoscaler sees what waits for room, and starts nodes for it.
        usual = max((slots for _, slots in places), default=max(1, per_gpu))
        missing = wanted - room
        whole, rest = divmod(missing, usual)
        chosen += [(None, usual)] * whole + [(None, rest)] * bool(rest)
    # One trial at a time is a promise: what the sampler knows is then always the same.
    if wanted == 1 and asked.workers == 1:
        spare = 0
    elif device == "gpu":
        spare = SPARE
    return [
        _plan(f"{device}-{at}", device, node, slots, spare, asked)
        for at, (node, slots) in enumerate(chosen)
    ]


def _per_gpu(asked: ResourceSpec, members: int) -> int:
    """Trials at a time on one GPU; 0 where none is asked for."""
    if not asked.gpus_per_trial:
        return 0
    fill = min(MOST_PER_GPU, (asked.slots or 0) // members)
    return max(1, math.floor(1 / asked.gpus_per_trial + 1e-9), fill)


def _places(node: Node, asked: ResourceSpec, per_gpu: int) -> list[tuple[Node, int]]:
    """Return the engines that a node has room for: the node and the slots of each."""
    if not asked.gpus_per_trial:
        slots = math.floor(node.cpus / asked.cpus_per_trial + 1e-9)
        return [(node, slots)] if slots else []
    engines = math.floor(node.gpus / max(1.0, asked.gpus_per_trial))
    engines = min(engines, math.floor(node.cpus / asked.cpus_per_trial + 1e-9))
    return [(node, per_gpu)] * engines


def _spread(wanted: int, slots: Sequence[int]) -> list[int]:
    """Divide `wanted` trials among engines as evenly as their slots allow."""
    sizes = [0] * len(slots)
    while wanted:
        for at, most in enumerate(slots):
            if wanted and sizes[at] < most:
                sizes[at] += 1
                wanted -= 1
    return sizes


def _plan(
    name: str, device: Device, node: Node | None, slots: int, spare: int, asked: ResourceSpec
) -> EnginePlan:
    used = asked.cpus_per_trial * (slots if device == "cpu" else 1)
    return EnginePlan(
        name=name if node is None else f"{name} on {node.address}",
        device=device,
        slots=slots,
        spare=spare,
        # The light trials take their share of the same CPUs.
        cpus=max(0.0, round(used - TRIAL_CPUS * (slots + spare), 4)),
        gpus=0 if device == "cpu" else max(1, int(asked.gpus_per_trial)),
        node=None if node is None else node.id,
    )


def with_room_for_all(plans: Sequence[EnginePlan], trials: int) -> list[EnginePlan]:
    """Return plans with room at each engine for all trials in flight.

    Trials that wait for a verdict keep their places: others must find one beside them, on
    however small a machine, and with however many engines lost.
    """
    missing = max(0, trials - sum(plan.room for plan in plans))
    return [
        replace(
            plan,
            spare=max(plan.spare, trials - plan.slots),
            cpus=max(0.0, round(plan.cpus - TRIAL_CPUS * missing, 4)),
        )
        for plan in plans
    ]


class RunningEngines:
    """Engines that were started, and the dispatcher between them and the trials."""

    def __init__(
        self, ray: Any, plans: Sequence[EnginePlan], work: Work, arrays: SearchArrays, trials: int
    ) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        here = ray.get_runtime_context().get_node_id()
        # Held here: an engine that is started again asks for them again.
        self._rows = Rows(ray.put((work, arrays)))
        name = f"desisky-tune-{work.run}-{secrets.token_hex(4)}"
        self.dispatcher = (
            ray.remote(Dispatcher)
            .options(
                num_cpus=0,
                name=name,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            )
            .remote(trials, self._rows)
        )
        self._engines = []
        for plan in plans:
            where = (
                "DEFAULT"
                if plan.node is None
                else NodeAffinitySchedulingStrategy(plan.node, soft=False)
            )
            actor = ray.remote(Engine).options(
                num_cpus=plan.cpus,
                num_gpus=plan.gpus,
                max_restarts=MAX_RESTARTS,
                max_task_retries=0,
                scheduling_strategy=where,
            )
            environment = engine_environment(plan.device)
            # Not as Ray's runtime environment: no process that Ray holds ready would do then.
            self._engines.append(
                actor.remote(plan.name, plan.device, plan.slots, work.run, name, environment)
            )
        known = [(engine, plan.room) for engine, plan in zip(self._engines, plans, strict=True)]
        self.dispatcher.add.remote(known, [plan.name for plan in plans])

    def take_verdicts(self, ordering: Ordering, scheduler: OrderedScheduler) -> None:
        """Let verdicts reach the trials, which wait at the dispatcher for them."""
        ordering.judged_by(self.dispatcher.judge.remote)
        scheduler.rest = self.dispatcher.rest.remote

    def close(
        self, watch: EngineWatch, trials: int, patience: float = CLOSING_PATIENCE
    ) -> SessionFigures:
        """Let the engines keep what they still hold, and return what they did.

        Parameters
        ----------
        watch
            Passes on what there is new meanwhile.
        trials
            That ended in the session.
        patience
            How long each answer may take (s).
        """
        figures: list[EngineFigures] = []
        processes: dict[str, int] = {}
        with suppress(self._ray.exceptions.RayError):
            figures = self._ray.get(self.dispatcher.figures.remote(), timeout=patience)
            drained, deadline = self.dispatcher.drain.remote(), time.monotonic() + patience
            while not self._ray.wait([drained], timeout=FIGURES_PERIOD)[0]:
                watch.look()
                if time.monotonic() > deadline:
                    break
            watch.look()
            processes = self._ray.get(self.dispatcher.processes.remote(), timeout=patience)
        return SessionFigures(tuple(figures), processes, trials)

    def kill(self) -> None:
        """End the engines at once; what they were training goes on from its last rung."""
        for actor in (*self._engines, self.dispatcher):
            self._ray.kill(actor)


def engine_environment(device: Device) -> dict[str, str]:
    """What must stand in an engine's environment before JAX starts there.

    On a CPU each slot is a thread that trains, and XLA's own pool must not add its threads to
    them: it takes their number from NPROC.
    """
    environment = process_environment(gpu=device == "gpu")
    if device == "cpu":
        environment["NPROC"] = "1"
    return environment


@contextmanager
def running_engines(
    ray: Any, plans: Sequence[EnginePlan], work: Work, arrays: SearchArrays, trials: int
) -> Iterator[RunningEngines]:
    """Start engines for a session of `trials` light trial processes; end them after it."""
    engines = RunningEngines(ray, plans, work, arrays, trials)
    try:
        yield engines
    finally:
        with suppress(ray.exceptions.RayError):
            engines.kill()


class EngineWatch(Callback):
    """Tells the dispatcher of trials that are over, and the watcher what the engines do.

    Parameters
    ----------
    ray
        The module, connected.
    dispatcher
        Handle of the dispatcher.
    emit
        Told the engines' figures from time to time.
    outages
        Told how the engines' writing to storage fares.
    """

    def __init__(self, ray: Any, dispatcher: Any, emit: EventSink, outages: Outages) -> None:
        self._ray = ray
        self._dispatcher = dispatcher
        self._emit = emit
        self._outages = outages
        self._asked: Any = None
        self._next = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing of the session: Ray Tune pickles its callbacks to disk."""
        return {}

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """End the lease of a trial that ended or was stopped."""
        self._end(trial, well=(trial.last_result or {}).get("reason") is None)

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Give away the room of a trial whose process died, until it has another one."""
        self._dispatcher.interrupted.remote(int(trial.config["trial"]))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """End the lease of a trial whose process died once too often."""
        self._end(trial)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Ask for figures, or pass on those that have come; never wait for them."""
        if self._asked is None:
            if time.monotonic() >= self._next:
                self._asked = self._dispatcher.news.remote()
            return
        if not self._ray.wait([self._asked], timeout=0)[0]:
            return
        self.look()

    def look(self) -> None:
        """Pass on what has come, or ask for it; wait for the answer."""
        with suppress(self._ray.exceptions.RayError):
            asked = self._asked or self._dispatcher.news.remote()
            figures, said, attempts = self._ray.get(asked, timeout=LEAVING_PATIENCE)
            for text in said:
                self._emit(Note(text))
            self._outages.heard(attempts)
            if figures:
                self._emit(EnginesReported(added(figures), tuple(figures)))
        self._asked, self._next = None, time.monotonic() + FIGURES_PERIOD

    def _end(self, trial: Any, *, well: bool = False) -> None:
        self._dispatcher.ended.remote(int(trial.config["trial"]), well=well)
