"""What a loader is: rows that can be gathered once, or batches that must be asked for.

A compiled training needs all rows as arrays. That is safe for a loader over a fixed table, whose
only freedom is the order. Whatever may give other batches each time (a transform, a sampler,
an iterable of the user's own) is iterated, epoch by epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from desisky_tune.errors import InputError
from desisky_tune.training.dataset import (
    NumpyLoader,
    SkyBrightnessDataset,
    fetch,
    in_batches,
    unwrap,
)
from desisky_tune.training.shuffle import compiled_epoch_order

Batch = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Order:
    """How a loader goes through its dataset, where that is all there is to it."""

    batch_size: int
    shuffle: bool
    drop_last: bool


@dataclass(frozen=True)
class GatheredRows:
    """All rows of a loader, in the dataset's order."""

    inputs: NDArray[np.float32]
    targets: NDArray[np.float32]
    order: Order

    def visited(self) -> GatheredRows:
        """Return the rows that an unshuffled pass visits: fewer where the last are dropped."""
        stop = len(self.inputs)
        if self.order.drop_last and not self.order.shuffle:
            stop -= stop % self.order.batch_size
        return GatheredRows(self.inputs[:stop], self.targets[:stop], self.order)


def loader_order(loader: Any) -> Order | None:
    """Return how a loader orders its dataset; None when it may do anything else."""
    if isinstance(loader, NumpyLoader):
        own_way = loader.sampler is not None or loader.batch_sampler is not None
        if own_way or type(loader).__iter__ is not NumpyLoader.__iter__:
            return None
        return Order(loader.batch_size, loader.shuffle, loader.drop_last)
    return _torch_order(loader)


def gather(loader: Any) -> GatheredRows | None:
    """Return all rows of a loader as arrays, or None when it must be iterated."""
    order = loader_order(loader)
    if order is None:
        return None
    base, rows = unwrap(loader.dataset)
    if isinstance(base, SkyBrightnessDataset) and base.transform is None:
        return GatheredRows(base.inputs[rows], base.targets[rows], order)
    tensors = getattr(base, "tensors", None)
    if type(base).__name__ == "TensorDataset" and tensors is not None and len(tensors) >= 2:
        inputs, targets = (np.asarray(part, np.float32)[rows] for part in tensors[:2])
        return GatheredRows(inputs, targets, order)
    return None


def epoch_batches(loader: Any, seed: int, epoch: int) -> Iterator[Batch]:
    """Yield the batches of an epoch, in the order that a compiled training would take.

    Where the loader only shuffles, the order is drawn from (seed, epoch); anything else decides
    for itself.
    """
    order = loader_order(loader)
    source: Any = loader
    if order is not None and order.shuffle:
        dataset = loader.dataset
        rows = np.asarray(compiled_epoch_order(seed, epoch, len(dataset))).tolist()
        parts = in_batches(rows, order.batch_size, order.drop_last)
        source = (fetch(dataset, part) for part in parts)
    for number, batch in enumerate(source):
        yield _checked(batch, f"epoch {epoch}, batch {number}")


def all_batches(loader: Any, what: str) -> Iterator[Batch]:
    """Yield the batches of a loader as it gives them."""
    for number, batch in enumerate(loader):
        yield _checked(batch, f"{what}, batch {number}")


def feature_names(loader: Any) -> list[str] | None:
    """Return the names of the inputs, where the dataset knows them."""
    dataset: Any = getattr(loader, "dataset", None)
    while hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        dataset = dataset.dataset
    names = getattr(dataset, "input_features", None)
    return None if names is None else [str(name) for name in names]


def refuse_one_shot(loader: Any, what: str) -> None:
    """Refuse a loader that can be iterated only once."""
    if not hasattr(loader, "__iter__"):
        raise InputError(f"{what}: {type(loader).__name__} cannot be iterated")
    if iter(loader) is loader:
        raise InputError(
            f"{what}: a {type(loader).__name__} can be iterated only once; give a list of"
            " batches or a loader"
        )


def _checked(batch: Any, where: str) -> Batch:
    try:
        inputs, targets = (np.asarray(part, np.float32) for part in tuple(batch)[:2])
    except (TypeError, ValueError):
        raise InputError(f"{where}: no (inputs, targets, ...) of arrays") from None
    if inputs.ndim != 2 or targets.ndim != 2 or len(inputs) != len(targets) or not len(inputs):
        raise InputError(
            f"{where}: inputs of shape {inputs.shape} and targets of shape {targets.shape};"
            " needed: (rows, columns), the same rows"
        )
    if not (np.isfinite(inputs).all() and np.isfinite(targets).all()):
        raise InputError(f"{where}: values that are not finite")
    return inputs, targets


def _torch_order(loader: Any) -> Order | None:
    """Recognise PyTorch's own DataLoader by what it is made of, without importing it."""
    parts: list[Any] = [
        getattr(loader, name, None) for name in ("sampler", "batch_sampler", "collate_fn")
    ]
    if any(part is None for part in parts):
        return None
    sampler, batch_sampler, collate = parts
    iterates = getattr(type(loader).__iter__, "__module__", "")
    stacks = getattr(collate, "__module__", "").startswith("torch.utils.data") or (
        getattr(collate, "__name__", "") == "numpy_collate"
    )
    known = (
        iterates.startswith("torch.utils.data")
        and stacks
        and type(batch_sampler).__module__.startswith("torch.utils.data")
        and type(batch_sampler).__name__ == "BatchSampler"
        and type(sampler).__module__.startswith("torch.utils.data")
        and not getattr(sampler, "replacement", False)
        and len(sampler) == len(loader.dataset)
    )
    kind = type(sampler).__name__
    if not known or kind not in ("SequentialSampler", "RandomSampler"):
        return None
    return Order(int(loader.batch_size), kind == "RandomSampler", bool(loader.drop_last))
