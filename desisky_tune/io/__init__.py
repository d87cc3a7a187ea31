"""Checkpoints in desisky's format: `save`, `load`, `load_model`.

Looking at a header needs no JAX; `save` and `load` import it when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from desisky_tune.io.header import constant_features, feature_names, features_recorded, read_header
from desisky_tune.io.registry import (
    REGISTRY,
    ModelSpec,
    get_user_model_dir,
    load_model,
    register_model,
)

if TYPE_CHECKING:
    from desisky_tune.io.checkpoint import architecture, checkpoint_meta, load, save

__all__ = [
    "REGISTRY",
    "ModelSpec",
    "architecture",
    "checkpoint_meta",
    "constant_features",
    "feature_names",
    "features_recorded",
    "get_user_model_dir",
    "load",
    "load_model",
    "read_header",
    "register_model",
    "save",
]

_IN_CHECKPOINT = ("architecture", "checkpoint_meta", "load", "save")


def __getattr__(name: str) -> Any:
    if name in _IN_CHECKPOINT:
        from desisky_tune.io import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
