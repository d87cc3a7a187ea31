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

#: From the start of a driver to the end of its search (s).
LIFETIME = 15.0

#: From the first report on: most moments are those in which trials run.
RUNNING = 3.0


def kill_until_done(
    runs: Path, name: str, overrides: tuple[str, ...], kills: int, *more: str
) -> list[Path]:
    """Kill the driver of a search `kills` times, then let it end; the moments are seeded.

    Where it is done before, another search takes its place.
    """
    moment = random.Random(f"{name} {kills}")
    searches = [f"{name}-0"]
    for attempt in range(4 * kills):
        command = search(runs, searches[-1], overrides, *more)
        if attempt % 2 == 0:
            command.until("at epoch", "COMPLETE", "search finished")
            delay = moment.uniform(0.0, RUNNING)
        else:
            delay = moment.uniform(0.0, LIFETIME)
        if command.kill_after(delay):
            kills -= 1
            if kills == 0:
                break
        else:
            assert command.process.returncode == 0, command.lines
            searches.append(f"{name}-{len(searches)}")
    assert kills == 0, f"{kills} kills came too late"
    # Its specification may not have been written yet, or it may have been killed at its last step.
    last = search(runs, searches[-1], overrides, *more)
    assert last.ends() == 0, last.lines
    return [runs / each for each in searches]


@pytest.fixture(scope="session")
def split(kills: int) -> tuple[int, int]:
    """Kills for the search whose figures are known, and for the one that adapts."""
    return kills - kills // 3, kills // 3


def test_no_trial_is_lost_or_changed(
    tmp_path: Path, undisturbed: list[TrialRecord], split: tuple[int, int], kills: int, address: str
) -> None:
    # In the long form with a Ray of each driver's own, which dies with it.
    more = () if kills > 3 else ("--address", address)
    for run in kill_until_done(tmp_path, "random", RANDOM, split[0], *more):
        assert_the_same(assert_nothing_lost(run, spec_of(RANDOM)), undisturbed)


def test_ledger_study_and_tables_agree_where_trials_depend_on_one_another(
    tmp_path: Path, split: tuple[int, int], address: str
) -> None:
    # On a Ray that outlives its drivers, as a cluster's does.
    for run in kill_until_done(tmp_path, "adaptive", ADAPTIVE, split[1], "--address", address):
        assert_nothing_lost(run, spec_of(ADAPTIVE))
