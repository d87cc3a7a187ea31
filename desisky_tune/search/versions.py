"""What a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "desisky_tune",
    "ray",
    "jax",
    "jaxlib",
    "equinox",
    "optax",
    "optuna",
    "numpy",
    "astropy",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a trial's numbers depend on.

    ``cpu core`` says which of the two trains on this machine's CPU.
    """
    from desisky_tune.training.native import missing_because

    reason = missing_because()
    found = {
        "python": platform.python_version(),
        "cpu core": "native" if reason is None else f"xla: {reason}",
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
