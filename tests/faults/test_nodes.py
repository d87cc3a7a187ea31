"""Nodes of a cluster: one on which every trial fails is left out, a lost one is done without."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError, RayActorError
from searches import RANDOM, assert_nothing_lost, assert_the_same, search, spec_of

from desisky_tune.errors import DispatcherError
from desisky_tune.search import dispatch
from desisky_tune.search.backend import Assignment, Progress
from desisky_tune.search.dispatch import FAILURES_IN_A_ROW, TRIES, Dispatcher
from desisky_tune.search.engine import Engine
from desisky_tune.search.engine_client import EngineBackend
from desisky_tune.search.records import TrialRecord

ONE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 * 1024**2}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of nodes of one CPU each; `cluster_utils` gives each its own raylet."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**ONE, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.usefixtures("long_form")
def test_a_search_outlives_a_lost_node(
    tmp_path: Path, cluster: Any, undisturbed: list[TrialRecord]
) -> None:
    doomed = cluster.add_node(**ONE)
    command = search(tmp_path, "nodes", RANDOM, "--address", cluster.address)
    command.until("at epoch", "COMPLETE")
    cluster.remove_node(doomed, allow_graceful=False)
    assert command.ends() == 0, command.lines
    assert_the_same(assert_nothing_lost(tmp_path / "nodes", spec_of(RANDOM)), undisturbed)


@pytest.mark.usefixtures("long_form")
def test_a_search_does_without_a_node_on_which_every_process_dies(
    tmp_path: Path, cluster: Any, undisturbed: list[TrialRecord]
) -> None:
    # XLA ends every process there as soon as it is asked for a device, as a broken driver would.
    cluster.add_node(**ONE, env_vars={"XLA_FLAGS": "--xla_no_such_flag=1"})
    command = search(tmp_path, "nodes", RANDOM, "--address", cluster.address)
    assert command.ends(900) == 0, command.lines
    assert_the_same(assert_nothing_lost(tmp_path / "nodes", spec_of(RANDOM)), undisturbed)


class FakeCall:
    """A method of an actor that answers at once."""

    def remote(self, *arguments: Any) -> Any:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        answer.set_result(1)
        return answer


class FakeEngine:
    """As much of an engine's handle as the dispatcher calls."""

    ready = FakeCall()
    release = FakeCall()
    forget = FakeCall()


class Pending(FakeEngine):
    """An engine whose node has not come."""

    class _Never:
        def remote(self) -> Any:
            return asyncio.get_running_loop().create_future()

    ready = _Never()


async def dispatcher(engines: int, room: int = 9) -> tuple[Dispatcher, list[FakeEngine]]:
    """A dispatcher with engines that have started."""
    made = Dispatcher(expected=1)
    handles = [FakeEngine() for _ in range(engines)]
    names = [f"cpu-{at}" for at in range(engines)]
    await made.add([(handle, room) for handle in handles], names)
    await asyncio.gather(*made._watches)
    return made, handles


async def soon(placing: Any) -> int:
    """The engine that a trial is placed at, which it must be without waiting."""
    return int((await asyncio.wait_for(placing, 10.0))[0])


def test_an_engine_at_which_trials_fail_one_after_another_is_left_out() -> None:
    async def scene() -> None:
        made, _ = await dispatcher(2)
        moved = []
        for number in range(40):
            home, _ = await made.place(number)
            if home == 0:
                assert await made.failed(number, "no CUDA device")
                moved.append(number)
                assert (await made.place(number))[0] == 1
            await made.ended(number, well=True)
        assert len(moved) == FAILURES_IN_A_ROW
        (said,) = made._news
        assert "no more trials: 3 failed there" in said
        assert "no CUDA device" in said

    asyncio.run(scene())


def test_a_trial_that_fails_everywhere_is_to_blame_itself() -> None:
    async def scene() -> None:
        made, _ = await dispatcher(TRIES)
        for number in range(4 * FAILURES_IN_A_ROW):
            for _ in range(TRIES - 1):
                await made.place(number)
                assert await made.failed(number, "ValueError: no")
            await made.place(number)
            assert not await made.failed(number, "ValueError: no")
            await made.ended(number)
        assert made._news == []
        assert all(engine.lost is None for engine in made._engines)
        assert all(engine.failures == 0 for engine in made._engines)

    asyncio.run(scene())


def test_an_engine_that_was_left_out_for_trials_that_are_to_blame_is_taken_back() -> None:
    """All fail at the first engine before any of them has failed at the second."""

    async def scene() -> None:
        made, _ = await dispatcher(2)
        homes = {number: (await made.place(number))[0] for number in range(6)}
        first = [number for number, home in homes.items() if home == 0]
        assert len(first) == FAILURES_IN_A_ROW
        for number in first:
            assert await made.failed(number, "ValueError: no")
        assert made._engines[0].lost is not None
        for number in first:
            assert (await made.place(number))[0] == 1
            assert not await made.failed(number, "ValueError: no")
            await made.ended(number)
        assert made._engines[0].lost is None
        await asyncio.gather(*made._watches)  # it still is there
        assert await soon(made.place(7)) == 0

    asyncio.run(scene())


def test_two_bad_nodes_of_four_are_left_out_and_no_trial_fails() -> None:
    async def scene() -> None:
        made, _ = await dispatcher(4)
        for number in range(40):
            while (await made.place(number))[0] in (0, 1):
                assert await made.failed(number, "no CUDA device")
            await made.ended(number, well=True)
        assert [engine.left_out for engine in made._engines] == [True, True, False, False]

    asyncio.run(scene())


def test_a_full_disk_is_its_nodes_fault_while_the_others_can_write() -> None:
    async def scene() -> None:
        made, _ = await dispatcher(2)
        assert (await made.place(0))[0] == 0
        await made.tried_storage("cpu-0", "no space left")
        assert await made.failed(0, "no space left", storage=True)
        assert (await made.place(0))[0] == 1
        await made.ended(0, well=True)
        # Now the other one as well: it is the storage of all, and nobody is to blame.
        await made.tried_storage("cpu-1", "no space left")
        assert (await made.place(1))[0] == 0
        assert not await made.failed(1, "no space left", storage=True)
        await made.tried_storage("cpu-0", None)
        assert await made.failed(1, "no space left", storage=True)

    asyncio.run(scene())


def test_an_engine_that_is_left_out_for_its_disk_is_no_outage_any_more() -> None:
    async def scene() -> None:
        made, _ = await dispatcher(2)
        await made.tried_storage("cpu-0", "no space left")
        for number in range(FAILURES_IN_A_ROW):
            assert (await made.place(number))[0] == 0
            assert await made.failed(number, "no space left", storage=True)
            await made.ended(number)
        assert [why for _, why in made._attempts] == ["no space left", None]

    asyncio.run(scene())


def test_an_engine_whose_node_has_not_come_is_no_other_one() -> None:
    """With ``--workers`` above the room there is: an outage must not look like one node's."""

    async def scene() -> None:
        made, _ = await dispatcher(1)
        await made.add([(Pending(), 9)], ["cpu-1"])
        for number in range(2 * FAILURES_IN_A_ROW):
            assert await soon(made.place(number)) == 0
            await made.tried_storage("cpu-0", "no space left")
            assert not await made.failed(number, "no space left", storage=True)
            await made.ended(number)
        assert made._engines[0].lost is None
        assert made._failing == {"cpu-0"}

    asyncio.run(scene())


async def left_out_and_to_be_acquitted() -> tuple[Dispatcher, list[int]]:
    """A dispatcher whose first engine was left out for trials that are at the other one now."""
    made, _ = await dispatcher(2)
    homes = {number: await soon(made.place(number)) for number in range(6)}
    first = [number for number, home in homes.items() if home == 0]
    for number in first:
        assert await made.failed(number, "killed")
        assert await soon(made.place(number)) == 1
    assert made._engines[0].left_out
    return made, first


def test_an_engine_that_died_while_it_was_left_out_is_watched_when_it_is_taken_back() -> None:
    async def scene() -> None:
        made, first = await left_out_and_to_be_acquitted()
        await made.died(0)
        assert not await made.failed(first[0], "killed")
        await asyncio.gather(*made._watches)
        assert await soon(made.place(99)) == 0

    asyncio.run(scene())


def test_an_engine_that_was_lost_while_it_was_left_out_is_not_taken_back() -> None:
    async def scene() -> None:
        made, first = await left_out_and_to_be_acquitted()
        await made.lost(0, "its node is gone")
        assert not await made.failed(first[0], "killed")
        assert made._engines[0].lost == "its node is gone"
        assert await soon(made.place(99)) == 1
        # No other is left to try it at.
        assert not await made.failed(99, "killed")

    asyncio.run(scene())


def test_an_engine_that_was_left_out_is_taken_back_when_the_others_are_lost() -> None:
    async def scene() -> None:
        made, first = await left_out_and_to_be_acquitted()
        await made.lost(1, "its node is gone")
        assert await soon(made.place(first[0])) == 0
        assert await soon(made.place(99)) == 0
        # And it is the last one, which is not left out.
        assert not await made.failed(99, "killed")
        assert made._engines[0].lost is None

    asyncio.run(scene())


def test_a_trial_goes_back_where_it_failed_when_the_other_engine_is_lost() -> None:
    async def scene() -> None:
        made, _ = await dispatcher(2)
        assert await soon(made.place(0)) == 0
        assert await made.failed(0, "no space left")
        assert await soon(made.place(0)) == 1
        await made.lost(1, "its node is gone")
        assert await soon(made.place(0)) == 0
        # And its place at the other one is not taken up for ever.
        assert made._engines[1].trials == set()

    asyncio.run(scene())


def test_a_trial_that_is_to_blame_clears_an_engine_once() -> None:
    async def scene() -> None:
        made, _ = await dispatcher(2)
        made._engines[0].failures = FAILURES_IN_A_ROW - 1
        assert await soon(made.place(0)) == 0
        assert await made.failed(0, "killed")
        made._engines[0].failures = 5
        assert await soon(made.place(0)) == 1
        for _ in range(3):  # as often as it kills the engine there
            assert not await made.failed(0, "killed")
        assert made._engines[0].failures == 4

    asyncio.run(scene())


def test_an_engine_that_died_is_not_awaited_to_write_again() -> None:
    async def scene() -> None:
        made, _ = await dispatcher(2)
        await made.tried_storage("cpu-0", "no space left")
        await made.died(0)
        assert made._failing == set()
        assert [why for _, why in made._attempts] == ["no space left", None]

    asyncio.run(scene())


@settings(max_examples=60, deadline=None)
@given(
    bad=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    poison=st.sets(st.integers(0, 39)),
    pending=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_trial_ends_whatever_engines_do_while_one_is_there(
    bad: list[float], poison: set[int], pending: bool, seed: int
) -> None:
    """Trials that fail by the engine's fault or their own, engines that die and are lost.

    The first engine is always there; `bad` is how often a trial fails at the others.
    """
    draw = random.Random(seed)

    async def trial(made: Dispatcher, number: int, handles: list[FakeEngine]) -> str:
        while True:
            home, handle = await made.place(number)
            assert handle is handles[home]
            await asyncio.sleep(0)
            at_fault = home > 0 and draw.random() < bad[home - 1]
            if at_fault and draw.random() < 0.1:
                await made.lost(home, "its node is gone")
                continue
            if not at_fault and number not in poison:
                await made.ended(number, well=True)
                return "COMPLETE"
            how = draw.choice(["raises", "kills", "cannot write"])
            if how == "kills":
                await made.died(home)
            storage = how == "cannot write"
            if storage:
                await made.tried_storage(f"cpu-{home}", "no space left")
            if await made.failed(number, "why", storage=storage):
                continue
            await made.ended(number)
            return "FAIL"

    async def scene() -> None:
        made, handles = await dispatcher(1 + len(bad), room=3)
        if pending:
            handles.append(Pending())
            await made.add([(handles[-1], 9)], ["to come"])
        ends = [trial(made, number, handles) for number in range(40)]
        states = await asyncio.wait_for(asyncio.gather(*ends), 60.0)
        assert len(states) == 40
        # Nothing is held by a trial that has ended.
        assert all(engine.trials == set() for engine in made._engines)
        assert made._homes == {}
        assert made._engines[0].lost is None or made._engines[0].left_out
        assert made._begun()
        for watch in made._watches:
            watch.cancel()

    asyncio.run(scene())


class Dying(FakeEngine):
    """An engine whose process dies whenever it is started."""

    class _Dead:
        def remote(self) -> Any:
            answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            answer.set_exception(ActorUnavailableError("The actor is restarting.", None))
            return answer

    ready = _Dead()


def test_an_engine_that_dies_at_each_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "START_NOTICE", 0.0)
    monkeypatch.setattr(dispatch, "START_PATIENCE", 0.05)
    monkeypatch.setattr(dispatch, "START_PAUSE", 0.0)
    killed: list[Any] = []
    monkeypatch.setattr(Dispatcher, "_kill", staticmethod(killed.append))

    async def scene() -> None:
        made, (good,) = await dispatcher(1)
        dying = Dying()
        await made.add([(dying, 9)])
        await asyncio.wait_for(asyncio.gather(*made._watches), 10.0)
        assert killed == [dying]
        assert "is not up again after" in str(made._engines[1].lost)
        soon, lost = made._news
        assert soon.startswith("an engine died and is not up again")
        assert lost.startswith("an engine is lost")
        # One whose process dies later is not given trials until it is up again.
        made._engines[0].handle = dying
        await made.died(0)
        waiting = asyncio.create_task(made.place(3))
        made._engines[0].handle = good
        await asyncio.wait_for(asyncio.gather(*made._watches), 10.0)
        assert (await asyncio.wait_for(waiting, 10.0))[0] == 0

    asyncio.run(scene())


class FullDisk:
    """A backend whose machine cannot write."""

    lanes = room = 1

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        raise OSError(28, "No space left on device")

    def release(self, trial: Assignment) -> None:
        """Keep nothing."""


class Fine(FullDisk):
    """A backend that trains at once."""

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        return Progress(epochs, 1 / epochs, epochs - 1, {}, 0.0, 0.0, 0.0)


@contextmanager
def running(ray: Any, *backends: Any) -> Iterator[Any]:
    """A dispatcher with an engine for each backend, all of them up."""
    # The classes travel whole: a worker knows nothing of this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    desk = ray.remote(Dispatcher).options(num_cpus=0).remote(1)
    actor = ray.remote(Engine).options(num_cpus=0)
    engines = [
        actor.remote(f"cpu-{at}", "cpu", 1, "run", None, None, backend)
        for at, backend in enumerate(backends)
    ]
    try:
        ray.get(desk.add.remote([(engine, 3) for engine in engines]))
        ray.get([engine.ready.remote() for engine in engines])
        yield desk
    finally:
        for actor in (desk, *engines):
            ray.kill(actor)
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_trials_of_a_node_with_a_full_disk_go_elsewhere(ray_instance: Any) -> None:
    with running(ray_instance, FullDisk(), Fine()) as desk:
        for number in range(6):
            progress = EngineBackend(desk).advance(Assignment(number, {"width": 8}, seed=0), 9)
            assert (progress.epochs, progress.reason) == (9, None)
            ray_instance.get(desk.ended.remote(number, well=True))
        _, said, _ = ray_instance.get(desk.news.remote())
    (left_out,) = said
    assert "gets no more trials" in left_out
    assert "No space left on device" in left_out


def test_a_full_disk_of_the_only_engine_is_raised(ray_instance: Any) -> None:
    with (
        running(ray_instance, FullDisk()) as desk,
        pytest.raises(OSError, match="No space left on device"),
    ):
        EngineBackend(desk).advance(Assignment(0, {"width": 8}, seed=0), 9)


def test_a_dispatcher_that_is_gone_is_no_fault_of_a_trials(ray_instance: Any) -> None:
    with running(ray_instance, Fine()) as desk:
        ray_instance.kill(desk)
        with suppress(RayActorError):
            while True:  # until it is
                ray_instance.get(desk.processes.remote())
        with pytest.raises(DispatcherError, match="the dispatcher is gone"):
            EngineBackend(desk).advance(Assignment(0, {"width": 8}, seed=0), 9)


def test_one_good_trial_clears_an_engine() -> None:
    async def scene() -> None:
        made, _ = await dispatcher(2)
        for number in range(6 * FAILURES_IN_A_ROW):
            home, _ = await made.place(number)
            if home == 0 and made._engines[0].failures < FAILURES_IN_A_ROW - 1:
                assert await made.failed(number, "killed")
                await made.place(number)
            await made.ended(number, well=True)
        assert made._news == []

    asyncio.run(scene())


def test_trials_of_a_lost_engine_do_not_wait_for_those_whose_processes_went_with_it() -> None:
    """The node that is left has the engine of some, and the processes of the others."""

    async def scene() -> None:
        made, _ = await dispatcher(2, room=3)
        homes = {number: (await made.place(number))[0] for number in range(6)}
        there = [number for number, home in homes.items() if home == 1]
        here = [number for number, home in homes.items() if home == 0]
        await made.lost(1, "the node is gone")
        waiting = [asyncio.create_task(made.place(number)) for number in there]
        for _ in range(9):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        for number in here:
            await made.interrupted(number)
        placed = await asyncio.wait_for(asyncio.gather(*waiting), 10.0)
        assert [home for home, _ in placed] == [0, 0, 0]
        for number in here:
            assert (await asyncio.wait_for(made.place(number), 10.0))[0] == 0
        for number in range(6):
            await made.ended(number)
        assert made._engines[0].trials == set()

    asyncio.run(scene())


def test_the_only_engine_is_never_left_out() -> None:
    async def scene() -> None:
        made, _ = await dispatcher(1)
        for number in range(9):
            await made.place(number)
            assert not await made.failed(number, "raised")
            await made.ended(number)
        assert made._engines[0].lost is None

    asyncio.run(scene())
