"""The search: a space, a study, trials on Ray Tune, a winner.

The names below are imported when they are first used: Ray, Optuna and JAX stay out of
a process that does not need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "SearchSpec": "space",
    "load_spec": "space",
    "run_search": "run",
    "resume_search": "run",
    "SearchResult": "run",
    "TrialRecord": "records",
    "Ledger": "records",
    "export_trial": "export",
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
