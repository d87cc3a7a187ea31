"""A trial asks a backend for the next rung, and releases what it held."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from desisky_tune.search.backend import Assignment, Progress
from desisky_tune.search.dispatch import Roster
from desisky_tune.search.trial import SearchTrial, TrialPlan


class Recording:
    """A backend that notes what it is asked for; the objective is 1 / epochs."""

    def __init__(self, fault: Callable[[int], None] = lambda epochs: None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.released: list[int] = []
        self.fault = fault

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        self.asked.append((trial.number, epochs))
        self.fault(epochs)
        objective = float("nan") if trial.configuration["width"] == 0 else 1 / epochs
        return Progress(
            epochs=epochs,
            objective=objective,
            best_epoch=epochs - 1,
            rmse={},
            train_loss=0.0,
            test_loss=0.0,
            seconds=0.0,
        )

    def release(self, trial: Assignment) -> None:
        self.released.append(trial.number)


def begin(backend: Recording, config: dict[str, Any]) -> SearchTrial:
    trial = SearchTrial.__new__(SearchTrial)
    plan = TrialPlan(rungs=(2, 6, 18), seed=7, backend=lambda: backend, environment={})
    trial.setup(config, plan=plan)
    return trial


def test_a_trial_goes_from_rung_to_rung() -> None:
    backend = Recording()
    trial = begin(backend, {"trial": 4, "width": 8})
    results = [trial.step() for _ in range(3)]
    assert backend.asked == [(4, 2), (4, 6), (4, 18)]
    assert [result["epochs"] for result in results] == [2, 6, 18]
    assert [result["done"] for result in results] == [False, False, True]
    assert {result["seed"] for result in results} == {7}


def test_a_process_that_takes_another_trial_releases_the_first() -> None:
    backend = Recording()
    trial = begin(backend, {"trial": 0, "width": 8})
    trial.step()
    assert trial.reset_config({"trial": 1, "width": 8})
    trial.step()
    trial.cleanup()
    assert backend.asked == [(0, 2), (1, 2)]
    assert backend.released == [0, 1]


def test_a_number_that_is_none_ends_the_trial() -> None:
    result = begin(Recording(), {"trial": 0, "width": 0}).step()
    assert result["done"]
    assert math.isnan(result["objective"])


def test_an_exception_ends_the_trial_and_says_why() -> None:
    def fault(epochs: int) -> None:
        if epochs > 2:
            raise MemoryError("4 GiB were asked for\nand more")

    trial = begin(Recording(fault), {"trial": 0, "width": 8})
    assert not trial.step()["done"]
    result = trial.step()
    assert result["done"]
    assert result["reason"] == "MemoryError: 4 GiB were asked for"
    assert result["epochs"] == 2


def test_the_roster_opens_when_all_have_joined() -> None:
    async def scene() -> tuple[bool, bool]:
        roster = Roster(expected=2)
        await roster.join("a")
        await roster.join("a")
        early = asyncio.create_task(roster.wait(30.0))
        await asyncio.sleep(0)
        waiting = early.done()
        await roster.join("b")
        return waiting, await early

    assert asyncio.run(scene()) == (False, True)


def test_the_roster_gives_up_once_for_all() -> None:
    async def scene() -> tuple[bool, bool]:
        roster = Roster(expected=2)
        return await roster.wait(0.0), await roster.wait(30.0)

    assert asyncio.run(scene()) == (False, True)


@pytest.mark.parametrize("objective", [math.nan, math.inf])
def test_progress_that_is_no_number_has_failed(objective: float) -> None:
    progress = Progress(3, objective, 0, {}, 0.0, 0.0, 0.0)
    assert progress.failed
    assert not Progress(3, 0.5, 0, {}, 0.0, 0.0, 0.0).failed
