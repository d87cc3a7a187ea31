"""The driver killed with SIGKILL at any moment, again and again, until the search is done."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from searches import (
    ADAPTIVE,
    RANDOM,
    assert_nothing_lost,
    assert_the_same,
    search,
    spec_of,
)

from desisky_tune.search.records import TrialRecord

#: From the start of a driver to the end of its search, on a slow machine (s).
LIFETIME = 25.0

#: From the first report on: most moments are those in which trials run.
RUNNING = 3.0


def kill_until_done(runs: Path, name: str, overrides: tuple[str, ...], kills: int) -> Path:
    """Start a search and kill it `kills` times, then let it end; the moments are seeded."""
    moment = random.Random(f"{name} {kills}")
    for number in range(kills):
        command = search(runs, name, overrides)
        if number % 2 == 0:
            command.until("at epoch", "COMPLETE", "search finished")
            delay = moment.uniform(0.0, RUNNING)
        else:
            delay = moment.uniform(0.0, LIFETIME)
        killed = command.kill_after(delay)
        if not killed:
            # It was done before; a search that has ended resumes to itself.
            assert command.process.returncode == 0, command.lines
    last = search(runs, name, overrides)
    assert last.ends() == 0, last.lines
    return runs / name


@pytest.fixture(scope="session")
def split(kills: int) -> tuple[int, int]:
    """Kills for the search whose figures are known, and for the one that adapts."""
    return kills - kills // 3, kills // 3


def test_no_trial_is_lost_or_changed(
    tmp_path: Path, undisturbed: list[TrialRecord], split: tuple[int, int]
) -> None:
    run = kill_until_done(tmp_path, "random", RANDOM, split[0])
    assert_the_same(assert_nothing_lost(run, spec_of(RANDOM)), undisturbed)


def test_ledger_study_and_tables_agree_where_trials_depend_on_one_another(
    tmp_path: Path, split: tuple[int, int]
) -> None:
    run = kill_until_done(tmp_path, "adaptive", ADAPTIVE, split[1])
    assert_nothing_lost(run, spec_of(ADAPTIVE))
