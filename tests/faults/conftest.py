"""What the fault tests are held against: a search that nothing happened to."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from filelock import FileLock
from searches import RANDOM, spec_of

from desisky_tune.search.folder import RunFolder
from desisky_tune.search.records import Ledger, TrialRecord
from desisky_tune.search.run import run_search


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
def undisturbed(
    ray_instance: Any, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> list[TrialRecord]:
    """The trials of `RANDOM`: of one search, whichever of the session's processes asks first."""
    base = tmp_path_factory.getbasetemp()
    ledger = (base if worker_id == "master" else base.parent) / "undisturbed.jsonl"
    with FileLock(f"{ledger}.lock"):
        if not ledger.exists():
            run = run_search(spec_of(RANDOM), runs=tmp_path_factory.mktemp("whole")).run_dir
            shutil.copyfile(RunFolder(run).ledger, ledger)
    return sorted(Ledger(ledger).records(), key=lambda record: record.number)
