"""A Ray of ours listens on the loopback address alone, the dashboard included."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads Linux's tables of sockets in /proc"
)

#: A Ray with its dashboard and a worker process, until standard input ends.
SCRIPT = """
import sys
from desisky_tune.ray_session import ray_session

with ray_session(num_cpus=1, num_gpus=0, dashboard=True) as ray:
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    print("ready", flush=True)
    sys.stdin.read()
"""

LISTEN = "0A"  # the state of a socket in /proc/net/tcp


@pytest.fixture(scope="module")
def pids() -> Iterator[list[int]]:
    """The processes of a Ray, started with nothing of Ray in the environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=clean,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    try:
        assert driver.stdout.readline().strip() == "ready"
        tree = [driver.pid, *(p.pid for p in psutil.Process(driver.pid).children(recursive=True))]
        yield tree
    finally:
        driver.stdin.close()
        driver.wait(timeout=60)
        driver.stdout.close()


def sockets_of(pid: int) -> set[str]:
    """Inodes of a process's sockets."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            inodes.add(target.removeprefix("socket:[").rstrip("]"))
    return inodes


def listening() -> dict[str, tuple[str, int]]:
    """Every listening TCP socket of this machine: inode -> address, port."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not Path(table).exists():
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                address, port = fields[1].split(":")
                found[fields[9]] = (readable(address), int(port, 16))
    return found


def readable(digits: str) -> str:
    """An address as /proc writes it: 32-bit words in the machine's byte order, in hex."""
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def test_addresses_are_read_as_the_kernel_writes_them() -> None:
    assert readable("0100007F") == "127.0.0.1"
    assert readable("00000000") == "0.0.0.0"
    assert readable("00000000000000000000000001000000") == "::1"
    assert readable("0000000000000000FFFF00000100007F") == "127.0.0.1"


def test_every_socket_of_ray_listens_on_loopback(pids: list[int]) -> None:
    assert len(pids) > 4  # driver, control store, raylet, dashboard, worker at least
    everything = listening()
    owned = set().union(*(sockets_of(pid) for pid in pids))
    ours = {everything[inode] for inode in owned & set(everything)}
    assert len(ours) >= 4
    beyond = {address for address, _ in ours if not ipaddress.ip_address(address).is_loopback}
    assert not beyond
