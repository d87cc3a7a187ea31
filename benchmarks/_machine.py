"""What a table of figures must say beside itself: the machine, the versions, the command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe(packages: Sequence[str], note: str = "") -> str:
    """Return machine, load, versions and command as Markdown lines."""
    found = [f"Python {platform.python_version()}"]
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    command = shlex.join(["python", *sys.argv])
    lines = [
        f"- machine: {_processor()}, {os.cpu_count()} cores{note}; load at the start {load}",
        f"- versions: {', '.join(found)}",
        f"- command: `{command}`",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
    ]
    return "\n".join(lines)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
