"""Models of the sky's brightness: the MLP (`broadband`) and what it is compared with.

The names here import JAX only when the MLP is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from desisky_tune.models.broadband import make_broadbandMLP, permute_inputs
    from desisky_tune.models.classical import ClassicalModel, ConstantModel

__all__ = ["ClassicalModel", "ConstantModel", "make_broadbandMLP", "permute_inputs"]


def __getattr__(name: str) -> Any:
    if name in ("make_broadbandMLP", "permute_inputs"):
        from desisky_tune.models import broadband

        return getattr(broadband, name)
    if name in ("ClassicalModel", "ConstantModel"):
        from desisky_tune.models import classical

        return getattr(classical, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
