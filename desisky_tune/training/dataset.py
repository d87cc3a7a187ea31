"""Exposures as a sequence of (inputs, magnitudes, spectrum), and batches of them.

They follow the sequence protocol that PyTorch's `random_split`, `Subset` and `DataLoader` rely
on, without PyTorch: an object with `dataset` and `indices` is a subset, whoever made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from desisky_tune.data.columns import TARGETS
from desisky_tune.errors import InputError

Sample = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


class SkyBrightnessDataset:
    """Observing conditions, magnitudes in V, g, r, z, and sky spectra.

    Parameters
    ----------
    metadata
        Table (pandas) with a row per exposure: the input features, and SKY_MAG_V_SPEC,
        SKY_MAG_G_SPEC, SKY_MAG_R_SPEC, SKY_MAG_Z_SPEC.
    flux
        Spectra, shape ``(n, n_w)``; None where there are none (the spectra are then empty).
    input_features
        Names of the columns to use as inputs, in the order in which the model shall take them.
    transform
        Called with (inputs, targets, spectrum) of each item; what it returns is the item.

    Attributes
    ----------
    inputs, targets
        Float32, shapes ``(n, f)`` and ``(n, 4)``.

    Raises
    ------
    InputError
        When a column is missing, or spectra and metadata differ in number (a `ValueError`).
    """

    def __init__(
        self,
        metadata: Any,
        flux: Any,
        input_features: Sequence[str],
        transform: Callable[[Any, Any, Any], tuple[Any, Any, Any]] | None = None,
    ) -> None:
        features = list(input_features)
        columns = list(metadata.columns)
        for names, what in ((features, "Input features"), (list(TARGETS), "Target columns")):
            missing = [name for name in names if name not in columns]
            if missing:
                raise InputError(
                    f"{what} not found in metadata: {', '.join(missing)}"
                    f" (it has {', '.join(map(str, columns))})"
                )
        if not features:
            raise InputError("Input features not found: none were named")
        self.metadata = metadata.reset_index(drop=True)
        self.flux = np.empty((len(metadata), 0), np.float32) if flux is None else flux
        if len(self.flux) != len(self.metadata):
            raise InputError(
                f"{len(self.flux)} spectra and {len(self.metadata)} rows of metadata: they must"
                " be of the same exposures"
            )
        self.input_features = features
        self.transform = transform
        self.inputs = self.metadata[features].to_numpy(dtype=np.float32)
        self.targets = self.metadata[list(TARGETS)].to_numpy(dtype=np.float32)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Any) -> Sample:
        """Return one item, or the stacked items of a list or slice of indices.

        Returns
        -------
        inputs, targets, spectrum
            Shapes ``(f,)``, ``(4,)``, ``(n_w,)``; for several, with a leading axis.
        """
        if hasattr(index, "tolist"):
            index = index.tolist()
        item = self.inputs[index], self.targets[index], self.flux[index]
        if self.transform is not None:
            item = self.transform(*item)
        inputs, targets, spectrum = item
        return np.array(inputs), np.array(targets), np.array(spectrum)


def numpy_collate(batch: Sequence[Any]) -> Any:
    """Stack samples into arrays: a list of arrays for samples that are tuples or lists.

    Pass it as `collate_fn` to a PyTorch `DataLoader` to get NumPy arrays out of it.
    """
    if isinstance(batch[0], tuple | list):
        return [numpy_collate(part) for part in zip(*batch, strict=True)]
    if isinstance(batch[0], np.ndarray):
        return np.stack(batch)
    return np.array(batch)


class NumpyLoader:
    """Batches of a dataset as lists of NumPy arrays, [inputs, targets, spectra].

    Parameters
    ----------
    dataset
        Anything with `__len__` and `__getitem__`.
    batch_size
        Rows a batch.
    shuffle
        A new order each time it is iterated. `BroadbandTrainer` draws the order itself, from
        its seed.
    sampler
        Iterable of indices, in place of `shuffle`.
    batch_sampler
        Iterable of lists of indices, in place of `batch_size`, `shuffle`, `sampler`, `drop_last`.
    drop_last
        Leave out the rows that do not fill a batch.
    generator
        Source of the order: a `numpy.random.Generator`, an integer seed, or anything with
        `initial_seed()`, as a `torch.Generator`.
    num_workers, pin_memory, timeout, worker_init_fn
        Accepted for compatibility, and not used: the rows are in memory already.

    Raises
    ------
    InputError
        When arguments exclude each other, or `batch_size` is below 1.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[Sequence[int]] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        generator: Any = None,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(
                f"NumpyLoader: batch_size is {batch_size!r}; it must be a whole number of at"
                " least 1"
            )
        if sampler is not None and shuffle:
            raise InputError("NumpyLoader: sampler and shuffle exclude each other")
        if batch_sampler is not None and (batch_size != 1 or shuffle or sampler or drop_last):
            raise InputError(
                "NumpyLoader: batch_sampler excludes batch_size, shuffle, sampler and drop_last"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.sampler = sampler
        self.batch_sampler = batch_sampler
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.timeout = timeout
        self.worker_init_fn = worker_init_fn
        self.generator = generator
        self._random = _random_source(generator)

    def __len__(self) -> int:
        """Return the number of batches."""
        if self.batch_sampler is not None:
            return len(self.batch_sampler)  # type: ignore[arg-type]
        rows = len(self.dataset if self.sampler is None else self.sampler)  # type: ignore[arg-type]
        return rows // self.batch_size if self.drop_last else math.ceil(rows / self.batch_size)

    def __iter__(self) -> Iterator[list[NDArray[Any]]]:
        for indices in self._batches():
            yield fetch(self.dataset, indices)

    def _batches(self) -> Iterator[list[int]]:
        if self.batch_sampler is not None:
            for indices in self.batch_sampler:
                yield [int(index) for index in indices]
            return
        if self.sampler is not None:
            order = [int(index) for index in self.sampler]
        elif self.shuffle:
            order = self._random.permutation(len(self.dataset)).tolist()
        else:
            order = list(range(len(self.dataset)))
        yield from in_batches(order, self.batch_size, self.drop_last)


def in_batches(order: Sequence[int], size: int, drop_last: bool) -> Iterator[list[int]]:
    """Cut an order of rows into batches."""
    stop = len(order) - len(order) % size if drop_last else len(order)
    for start in range(0, stop, size):
        yield list(order[start : start + size])


def fetch(dataset: Any, indices: Sequence[int]) -> list[NDArray[Any]]:
    """Return the items of a dataset as stacked arrays."""
    base, rows = unwrap(dataset, indices)
    if isinstance(base, SkyBrightnessDataset) and base.transform is None:
        return list(base[rows])
    return numpy_collate([dataset[index] for index in indices])


def unwrap(dataset: Any, indices: Sequence[int] | None = None) -> tuple[Any, list[int]]:
    """Return the dataset under any subsets, and the rows of it that are meant."""
    rows = list(range(len(dataset))) if indices is None else [int(index) for index in indices]
    while hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        subset = dataset.indices
        rows = [int(subset[row]) for row in rows]
        dataset = dataset.dataset
    return dataset, rows


def gather_full_data(loader: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], Any]:
    """Collect all items of a loader's dataset, in the dataset's order.

    Parameters
    ----------
    loader
        A loader over a `SkyBrightnessDataset` or a subset of one.

    Returns
    -------
    inputs, targets, spectra, metadata
        Shapes ``(n, f)``, ``(n, 4)``, ``(n, n_w)``, and the rows of metadata, all aligned.

    Raises
    ------
    InputError
        When there is no `SkyBrightnessDataset` beneath, or it has no rows.
    """
    base, rows = unwrap(loader.dataset)
    if not hasattr(base, "metadata"):
        raise InputError(f"gather_full_data: {type(base).__name__} has no metadata")
    if not rows:
        raise InputError("gather_full_data: the loader's dataset has no rows")
    inputs, targets, spectra = fetch(loader.dataset, range(len(rows)))
    return inputs, targets, spectra, base.metadata.iloc[rows].reset_index(drop=True)


def _random_source(generator: Any) -> np.random.Generator:
    if isinstance(generator, np.random.Generator):
        return generator
    if hasattr(generator, "initial_seed"):
        return np.random.default_rng(generator.initial_seed())
    if generator is None or isinstance(generator, int | np.integer):
        return np.random.default_rng(generator)
    raise InputError(
        f"NumpyLoader: generator is {type(generator).__name__}; it must be a"
        " numpy.random.Generator, an integer, or have initial_seed()"
    )
