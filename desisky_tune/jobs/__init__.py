"""A search as a job on a Ray cluster: submit it, watch it, stop it, fetch what it found.

Everything goes over HTTP to the dashboard of the cluster's head, through Ray's own client;
that is also where a token of ``RAY_AUTH_TOKEN`` or ``~/.ray/auth_token`` is added. The names
below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Cluster": "client",
    "Job": "client",
    "submit_search": "submit",
    "resume_job": "submit",
    "fetch_from_cluster": "fetch",
    "fetch_from_storage": "fetch",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
