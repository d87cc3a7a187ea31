"""Shared by all tests: one Ray for the whole session, started on loopback."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from desisky_tune.ray_session import LOOPBACK_ENVIRONMENT

# Before anything imports Ray: what it listens on is settled then.
for name, value in LOOPBACK_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# A shell starts what it puts into the background deaf to Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the fault tests go on (tests/faults)."""
    parser.addoption(
        "--kills",
        type=int,
        default=3,
        metavar="N",
        help="how often the fault tests kill a search's driver (default: 3)",
    )


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """How often a search's driver is killed."""
    return int(request.config.getoption("--kills"))


@pytest.fixture(scope="session")
def ray_instance() -> Iterator[Any]:
    """The `ray` module, connected to a Ray of this test session's own."""
    from desisky_tune.ray_session import ray_session

    with ray_session(num_cpus=4, num_gpus=0) as ray:
        yield ray
