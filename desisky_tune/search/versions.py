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
    """Return the versions of Python and of the packages that a trial's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
