"""What the fault tests are held against: a search that nothing can happen to."""

from __future__ import annotations

import fcntl
import os
from typing import Any

import pytest
from searches import RANDOM, spec_of
from virtual_clock import in_process

from desisky_tune.search.records import Ledger, TrialRecord


@pytest.fixture
def long_form() -> None:
    """Marks a test that waits for minutes: run with ``--kills`` above the default."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what waits for minutes, before the searches that it is held against are run."""
    if "long_form" in getattr(item, "fixturenames", ()) and item.config.getoption("--kills") <= 3:
        pytest.skip("long form: pytest tests/faults --kills 20")


@pytest.fixture(scope="session")
def address(ray_instance: Any) -> str:
    """Of the test session's Ray: a search that joins it need not start one."""
    return str(ray_instance.get_runtime_context().gcs_address)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[TrialRecord]:
    """The trials of `RANDOM`, trained one after another by the first process that needs them."""
    # The folder that all processes of this test session have in common.
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    with open(shared / "undisturbed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = Ledger(shared / "undisturbed.jsonl")
        if not kept.records():
            folder = shared / "undisturbed"
            folder.mkdir()
            for record in in_process(spec_of(RANDOM), folder):
                kept.append(record)
        return sorted(kept.records(), key=lambda record: record.number)
