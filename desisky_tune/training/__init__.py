"""Training of broadband models: datasets and loaders, losses, `BroadbandTrainer`.

The names here import JAX only when one that needs it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from desisky_tune.training.config import TrainingConfig, TrainingHistory
    from desisky_tune.training.dataset import (
        NumpyLoader,
        SkyBrightnessDataset,
        gather_full_data,
        numpy_collate,
    )
    from desisky_tune.training.losses import loss_func, loss_huber, loss_l2
    from desisky_tune.training.scaling import Scaling, fold, unfold
    from desisky_tune.training.trainer import BroadbandTrainer

__all__ = [
    "BroadbandTrainer",
    "NumpyLoader",
    "Scaling",
    "SkyBrightnessDataset",
    "TrainingConfig",
    "TrainingHistory",
    "fold",
    "gather_full_data",
    "loss_func",
    "loss_huber",
    "loss_l2",
    "numpy_collate",
    "unfold",
]

_HOMES = {
    "BroadbandTrainer": "trainer",
    "NumpyLoader": "dataset",
    "Scaling": "scaling",
    "SkyBrightnessDataset": "dataset",
    "TrainingConfig": "config",
    "TrainingHistory": "config",
    "fold": "scaling",
    "gather_full_data": "dataset",
    "loss_func": "losses",
    "loss_huber": "losses",
    "loss_l2": "losses",
    "numpy_collate": "dataset",
    "unfold": "scaling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
