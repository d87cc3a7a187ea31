"""Hyperparameter search for DESI's broadband night-sky brightness models.

Importing this package imports neither Ray nor JAX: its rooms
(`desisky_tune.data`, `.training`, `.io`, `.search`, ...) do, when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from desisky_tune.search.loaded import load_run

__version__ = "0.1.0"

__all__ = ["__version__", "load_run"]


def __getattr__(name: str) -> Any:
    if name == "load_run":
        from desisky_tune.search.loaded import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
