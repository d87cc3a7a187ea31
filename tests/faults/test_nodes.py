"""Nodes of a cluster: one on which every trial fails is left out, a lost one is done without."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from searches import RANDOM, assert_nothing_lost, assert_the_same, search, spec_of

from desisky_tune.search.dispatch import FAILURES_IN_A_ROW, Dispatcher
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


async def dispatcher(engines: int, room: int = 9) -> tuple[Dispatcher, list[FakeEngine]]:
    """A dispatcher with engines that have started."""
    made = Dispatcher(expected=1)
    handles = [FakeEngine() for _ in range(engines)]
    await made.add([(handle, room) for handle in handles])
    await asyncio.gather(*made._watches)
    return made, handles


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
        made, _ = await dispatcher(3)
        for number in range(4 * FAILURES_IN_A_ROW):
            await made.place(number)
            assert await made.failed(number, "ValueError: no")
            await made.place(number)
            assert not await made.failed(number, "ValueError: no")
            await made.ended(number)
        assert made._news == []
        assert all(engine.lost is None for engine in made._engines)

    asyncio.run(scene())


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
