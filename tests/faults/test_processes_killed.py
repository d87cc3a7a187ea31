"""Processes that die under a search that goes on: a trial's, and a whole node's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import psutil
from searches import RANDOM, assert_nothing_lost, assert_the_same, spec_of

from desisky_tune.search.events import Event, Note, TrialFinished, TrialReported
from desisky_tune.search.records import TrialRecord
from desisky_tune.search.run import run_search


def processes(*names: str) -> list[psutil.Process]:
    """The processes of this test session's Ray whose names begin so."""
    mine = psutil.Process().children(recursive=True)
    return sorted((p for p in mine if p.name().startswith(names)), key=lambda p: p.pid)


def test_trials_whose_process_is_killed_go_on(
    long_form: None, ray_instance: Any, tmp_path: Path, undisturbed: list[TrialRecord]
) -> None:
    moment = random.Random(7)
    due = [moment.randrange(1, 4), moment.randrange(5, 9), moment.randrange(10, 14)]
    seen = killed = 0

    def kill_now_and_then(event: Event) -> None:
        nonlocal seen, killed
        seen += isinstance(event, TrialReported | TrialFinished)
        if not due or seen < due[0]:
            return
        if victims := processes("ray::SearchTria", "ray::Engine"):
            due.pop(0)
            moment.choice(victims).kill()
            killed += 1

    result = run_search(spec_of(RANDOM), runs=tmp_path, name="shot", on_event=kill_now_and_then)
    assert killed >= 2
    assert_the_same(assert_nothing_lost(result.run_dir, spec_of(RANDOM)), undisturbed)


def test_a_search_goes_on_with_a_new_dispatcher_where_its_own_is_killed(
    ray_instance: Any, tmp_path: Path, undisturbed: list[TrialRecord]
) -> None:
    said: list[str] = []
    seen = 0

    def kill_once(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Note):
            said.append(event.text)
        seen += isinstance(event, TrialReported | TrialFinished)
        if seen == 5 and isinstance(event, TrialReported | TrialFinished):
            (victim,) = processes("ray::Dispatcher")
            victim.kill()

    result = run_search(spec_of(RANDOM), runs=tmp_path, name="shot", on_event=kill_once)
    assert [text for text in said if "new processes: the dispatcher is gone" in text]
    assert_the_same(assert_nothing_lost(result.run_dir, spec_of(RANDOM)), undisturbed)
