"""The engine and the dispatcher without training: who gets in, who is refused, who is counted."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from desisky_tune.errors import EngineError, RunError, StorageError
from desisky_tune.search.backend import Assignment, Progress
from desisky_tune.search.dispatch import Dispatcher
from desisky_tune.search.engine import Engine, Gate
from desisky_tune.search.engines import Node, plan_engines
from desisky_tune.search.events import Event, Note
from desisky_tune.search.figures import EngineFigures, Meter, added
from desisky_tune.search.sections import ResourceSpec


def at(number: int) -> Assignment:
    return Assignment(number, {"width": 8}, seed=0)


def after(epochs: int) -> Progress:
    return Progress(epochs, 1 / epochs, epochs - 1, {}, 0.0, 0.0, 0.0)


class Scripted:
    """A backend whose trials wait for their event, or raise."""

    def __init__(self, faults: dict[int, Exception] | None = None) -> None:
        self.faults = faults or {}
        self.may_go = threading.Event()
        self.may_go.set()
        self.inside = 0
        self.most = 0
        self.released: list[int] = []
        self.lock = threading.Lock()

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.may_go.wait(10)
        with self.lock:
            self.inside -= 1
        if trial.number in self.faults:
            raise self.faults[trial.number]
        return after(epochs)

    def release(self, trial: Assignment) -> None:
        self.released.append(trial.number)


def engine(backend: Any, slots: int = 2) -> Engine:
    return Engine("cpu-0", "cpu", slots, "run", None, backend=backend)


def test_a_trial_that_is_not_known_is_refused_until_it_registers() -> None:
    async def scene() -> list[Progress | None]:
        served = engine(Scripted())
        before = await served.advance(3, 5)
        assert not await served.turn(3)
        await served.register(at(3))
        return [before, await served.advance(3, 5)]

    assert asyncio.run(scene()) == [None, after(5)]


def test_no_more_trials_are_trained_at_a_time_than_there_are_slots() -> None:
    async def scene() -> tuple[int, EngineFigures]:
        backend = Scripted()
        backend.may_go.clear()
        served = engine(backend, slots=2)
        for number in range(5):
            await served.register(at(number))
        calls = [asyncio.create_task(served.advance(number, 4)) for number in range(5)]
        while backend.inside < 2:
            await asyncio.sleep(0)
        figures = await served.figures()
        backend.may_go.set()
        await asyncio.gather(*calls)
        return backend.most, figures

    most, figures = asyncio.run(scene())
    assert most == 2
    assert (figures.busy, figures.slots, figures.lanes) == (2, 2, 2)


def test_a_suspect_is_trained_alone_and_before_those_who_wait() -> None:
    async def scene() -> list[str]:
        gate, order = Gate(2), []

        async def take(name: str, *, alone: bool = False) -> None:
            await gate.enter(alone=alone)
            order.append(f"{name} {gate.inside}")
            await asyncio.sleep(0)
            await gate.leave()

        await gate.enter()
        waiting = [
            asyncio.create_task(take("suspect", alone=True)),
            asyncio.create_task(take("a")),
            asyncio.create_task(take("b")),
        ]
        await asyncio.sleep(0)
        await gate.leave()
        await asyncio.gather(*waiting)
        return order

    order = asyncio.run(scene())
    assert order[0] == "suspect 1"
    assert {name.split()[0] for name in order[1:]} == {"a", "b"}


def test_a_trial_that_goes_on_elsewhere_is_forgotten_and_not_released() -> None:
    class Forgetful(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.forgotten: list[int] = []

        def forget(self, trial: Assignment) -> None:
            self.forgotten.append(trial.number)

    async def scene() -> None:
        backend = Forgetful()
        served = engine(backend)
        await served.register(at(1))
        assert await served.turn(1)
        await served.forget(1)
        assert (backend.forgotten, backend.released) == ([1], [])
        assert await served.advance(1, 3) is None
        # It had the engine for itself: others are let in again.
        await served.register(at(2))
        assert await asyncio.wait_for(served.advance(2, 3), 10) == after(3)

    asyncio.run(scene())


def test_a_released_trial_gives_back_the_turn_that_it_never_used() -> None:
    async def scene() -> Progress | None:
        backend = Scripted()
        served = engine(backend)
        for number in (1, 2):
            await served.register(at(number))
        assert await served.turn(1)
        await served.release(1)
        assert backend.released == [1]
        return await asyncio.wait_for(served.advance(2, 3), 10)

    assert asyncio.run(scene()) == after(3)


def test_an_exception_ends_its_trial_alone_and_a_full_disk_is_none_of_its() -> None:
    async def scene() -> tuple[Any, Any]:
        served = engine(Scripted({1: MemoryError("4 GiB"), 2: StorageError("disk full")}))
        for number in range(3):
            await served.register(at(number))
        with pytest.raises(StorageError, match="disk full"):
            await served.advance(2, 3)
        return await asyncio.gather(served.advance(0, 3), served.advance(1, 3))

    good, bad = asyncio.run(scene())
    assert good == after(3)
    assert (bad.reason, bad.failed) == ("MemoryError: 4 GiB", True)


# ------------------------------------------------------------------------- dispatcher


class Handle:
    """Stands for an engine's handle in the dispatcher."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return _Remote(self, method)


class _Remote:
    def __init__(self, handle: Handle, method: str) -> None:
        self.handle, self.method = handle, method

    def remote(self, *arguments: Any) -> Any:
        self.handle.asked.append((self.method, arguments))

        async def answer() -> None:
            return None

        return answer()


async def dispatcher_of(*rooms: int) -> tuple[Dispatcher, list[Handle]]:
    dispatcher, handles = Dispatcher(1), [Handle() for _ in rooms]
    await dispatcher.add(list(zip(handles, rooms, strict=True)))
    for _ in range(5):
        await asyncio.sleep(0)  # they come up
    return dispatcher, handles


def test_trials_go_to_the_least_loaded_engine_and_stay_there() -> None:
    async def scene() -> list[int]:
        dispatcher, _ = await dispatcher_of(4, 2)
        homes = [(await dispatcher.place(number))[0] for number in range(6)]
        again = [(await dispatcher.place(number))[0] for number in range(6)]
        assert again == homes
        return homes

    homes = asyncio.run(scene())
    assert homes.count(0) == 4
    assert homes[:2] == [0, 1]


def test_a_trial_waits_until_another_is_over() -> None:
    async def scene() -> Handle:
        dispatcher, (handle,) = await dispatcher_of(1)
        await dispatcher.place(0)
        waiting = asyncio.create_task(dispatcher.place(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        await dispatcher.ended(0)
        assert (await asyncio.wait_for(waiting, 10))[0] == 0
        await dispatcher.drain()
        return handle

    assert ("release", (0,)) in asyncio.run(scene()).asked


def test_the_trials_of_a_lost_engine_go_to_another_while_there_is_one() -> None:
    async def scene() -> None:
        dispatcher, _ = await dispatcher_of(2, 2)
        assert (await dispatcher.place(7))[0] == 0
        await dispatcher.lost(0, "its node is gone")
        assert (await dispatcher.place(7))[0] == 1
        await dispatcher.lost(1, "so is this")
        await dispatcher.place(7)

    with pytest.raises(EngineError, match="no engine is left to train on: its node is gone"):
        asyncio.run(scene())


def test_a_trial_that_was_given_up_while_it_waited_takes_no_room() -> None:
    async def scene() -> None:
        dispatcher, _ = await dispatcher_of(1)
        await dispatcher.place(0)
        waiting = asyncio.create_task(dispatcher.place(1))
        await asyncio.sleep(0)
        await dispatcher.ended(1)
        with pytest.raises(EngineError, match="trial 1 is over"):
            await asyncio.wait_for(waiting, 10)

    asyncio.run(scene())


# ------------------------------------------------------------------------------ plans


def planned(nodes: list[Node], *, local: bool = False, **asked: Any) -> tuple[list[Any], list[str]]:
    events: list[Event] = []
    plans = plan_engines(nodes, ResourceSpec(**asked), events.append, local=local)
    return plans, [event.text for event in events if isinstance(event, Note)]


HEAD, BIG, SMALL = (
    Node("h", "10.0.0.1", cpus=0, gpus=0),
    Node("b", "10.0.0.2", cpus=8, gpus=4),
    Node("s", "10.0.0.3", cpus=2, gpus=0),
)


def test_a_node_has_one_engine_with_a_slot_for_each_cpu() -> None:
    plans, notes = planned([HEAD, BIG, SMALL])
    assert [(plan.node, plan.slots, plan.gpus) for plan in plans] == [("b", 8, 0), ("s", 2, 0)]
    assert notes == []
    # Engines and light trials together fit on what there is.
    for plan, node in zip(plans, (BIG, SMALL), strict=True):
        assert plan.room == plan.slots + 2
        assert plan.cpus + 0.01 * plan.room == pytest.approx(node.cpus)


def test_workers_are_spread_over_the_nodes() -> None:
    assert [plan.slots for plan in planned([BIG, SMALL], workers=4)[0]] == [2, 2]
    assert [plan.slots for plan in planned([BIG, SMALL], workers=7)[0]] == [5, 2]
    assert [plan.slots for plan in planned([BIG], cpus_per_trial=3.0)[0]] == [2]


def test_one_worker_is_one_trial_in_flight() -> None:
    (plan,), _ = planned([SMALL], workers=1)
    assert (plan.slots, plan.room) == (1, 1)


def test_each_gpu_has_an_engine_of_its_own() -> None:
    plans, _ = planned([HEAD, BIG], gpus_per_trial=0.25)
    assert [(plan.device, plan.node, plan.gpus) for plan in plans] == [("gpu", "b", 1)] * 4
    assert [plan.slots for plan in plans] == [4] * 4
    assert [plan.slots for plan in planned([BIG], gpus_per_trial=0.25, workers=6)[0]] == [
        2,
        2,
        1,
        1,
    ]
    assert [plan.gpus for plan in planned([BIG], gpus_per_trial=2.0)[0]] == [2, 2]


def test_slots_that_were_asked_for_are_filled() -> None:
    def on_gpus(**asked: Any) -> list[int]:
        resources = ResourceSpec(gpus_per_trial=0.5, **asked)
        plans = plan_engines([BIG], resources, lambda event: None, local=True, members=15)
        return [plan.slots for plan in plans]

    assert on_gpus() == [2] * 4
    assert on_gpus(slots=480) == [32] * 4
    assert on_gpus(slots=15) == [2] * 4


def test_what_a_cluster_has_not_yet_waits_for_nodes_to_come() -> None:
    plans, notes = planned([HEAD], gpus_per_trial=0.5, workers=5)
    assert [(plan.node, plan.slots) for plan in plans] == [(None, 2), (None, 2), (None, 1)]
    assert "5 workers were asked for" in notes[0]
    plans, _ = planned([SMALL], workers=5)
    assert [(plan.node, plan.slots) for plan in plans] == [("s", 2), (None, 2), (None, 1)]
    assert [plan.slots for plan in planned([SMALL], workers=5, local=True)[0]] == [2]


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(RunError, match="a trial asks for 4 CPU and 0 GPU; Ray has 2 CPU"):
        planned([SMALL], cpus_per_trial=4.0, workers=1, local=True)
    with pytest.raises(RunError, match="a trial asks for 1 CPU and 1 GPU"):
        planned([HEAD], gpus_per_trial=1.0)


# ---------------------------------------------------------------------------- figures


def test_a_meter_counts_what_is_under_way() -> None:
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    with meter.spending("compiling"):
        now[0] = 2.0
        with meter.spending("training"):
            now[0] = 5.0
            assert meter.seconds() == {"compiling": 5.0, "training": 3.0}
    now[0] = 9.0
    meter.add("training", 1.5)
    assert meter.seconds() == {"compiling": 5.0, "training": 4.5}


def test_keeping_counts_only_where_a_place_stands_empty_for_it() -> None:
    now = [0.0]
    meter = Meter(2, clock=lambda: now[0])
    now[0] = 1.0
    assert meter.keeping() == 0  # two empty places, and nothing to do
    with meter.working(), meter.working(), meter.working():
        now[0] = 3.0
        assert meter.keeping() == 4  # three trials, and places for two: for 2 s
        with meter.spending("training"):
            now[0] = 6.0
            assert meter.keeping() == 7  # one place empty: for 3 s
            with meter.spending("compiling"):
                now[0] = 10.0
    assert meter.keeping() == 7  # no place empty: what is done beside them costs nothing
    now[0] = 20.0
    assert meter.keeping() == 7


def test_shares_add_up_and_what_is_left_is_waiting() -> None:
    one = EngineFigures("a", 2, 1, 3, 2, seconds=40, compiling=4, training=20, keeping=6)
    assert one.shares() == {"compiling": 0.1, "training": 0.5, "keeping": 0.15, "waiting": 0.25}
    assert one.waiting == 10
    assert one.trials_per_minute == 3 / (20 / 60)
    both = added([one, EngineFigures("b", 1, 1, 1, 1, 20, 2, 16, 0)])
    assert (both.slots, both.busy, both.trials, both.seconds) == (3, 2, 4, 60)
    assert sum(both.shares().values()) == pytest.approx(1)
    nothing = added([])
    assert nothing.shares()["waiting"] == 1
    assert nothing.trials_per_minute == 0
