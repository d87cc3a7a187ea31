"""Datasets and loaders by the sequence protocol, with and without PyTorch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from desisky_tune.data.columns import FEATURES, TARGETS
from desisky_tune.errors import InputError
from desisky_tune.training import (
    NumpyLoader,
    SkyBrightnessDataset,
    gather_full_data,
    numpy_collate,
)
from desisky_tune.training.batches import epoch_batches, gather, loader_order
from desisky_tune.training.shuffle import epoch_order

ORDER = ["MOONSEP", "MOONFRAC", "MOONALT", "OBSALT", "TRANSPARENCY_GFA", "ECLIPSE_FRAC"]


class Subset:
    """What PyTorch's Subset is, to the eye of a loader."""

    def __init__(self, dataset, indices):
        self.dataset = dataset
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]


@pytest.fixture
def frame() -> pd.DataFrame:
    values = np.random.default_rng(1).normal(size=(20, 10)) + 20
    table = pd.DataFrame(values, columns=[*FEATURES, *TARGETS], index=range(100, 120))
    table["EXPID"] = np.arange(20) + 5000
    return table


@pytest.fixture
def dataset(frame) -> SkyBrightnessDataset:
    flux = np.arange(60, dtype=np.float32).reshape(20, 3)
    return SkyBrightnessDataset(frame, flux, ORDER)


def test_an_item_is_inputs_magnitudes_and_spectrum_in_the_callers_order(frame, dataset):
    inputs, targets, spectrum = dataset[3]
    np.testing.assert_array_equal(inputs, frame.iloc[3][ORDER].to_numpy(np.float32))
    np.testing.assert_array_equal(targets, frame.iloc[3][list(TARGETS)].to_numpy(np.float32))
    np.testing.assert_array_equal(spectrum, [9, 10, 11])
    assert (inputs.dtype, targets.dtype) == (np.float32, np.float32)
    assert len(dataset) == 20
    assert dataset.metadata.index[0] == 0


def test_several_items_come_stacked(dataset):
    for index in ([4, 1], np.array([4, 1]), slice(4, 0, -3)):
        inputs, targets, spectra = dataset[index]
        np.testing.assert_array_equal(inputs[1], dataset[1][0])
        assert (inputs.shape, targets.shape, spectra.shape) == ((2, 6), (2, 4), (2, 3))


def test_an_item_is_a_copy(dataset):
    dataset[0][0][:] = 0
    assert dataset[0][0].all()


def test_an_index_beyond_the_end_raises_indexerror(dataset):
    with pytest.raises(IndexError):
        dataset[20]


def test_a_transform_makes_the_item(frame):
    doubled = SkyBrightnessDataset(
        frame, np.zeros((20, 3)), ORDER, transform=lambda x, y, s: (2 * x, y + 1, s[:1])
    )
    inputs, targets, spectrum = doubled[0]
    np.testing.assert_allclose(inputs, 2 * frame.iloc[0][ORDER].to_numpy(np.float32))
    np.testing.assert_allclose(targets, frame.iloc[0][list(TARGETS)].to_numpy(np.float32) + 1)
    assert spectrum.shape == (1,)


def test_missing_columns_are_named(frame):
    with pytest.raises(ValueError, match=r"^Input features not found in metadata: SEEING"):
        SkyBrightnessDataset(frame, np.zeros((20, 1)), ["MOONSEP", "SEEING"])
    with pytest.raises(ValueError, match=r"^Target columns not found in metadata: SKY_MAG_R_SPEC"):
        SkyBrightnessDataset(frame.drop(columns="SKY_MAG_R_SPEC"), np.zeros((20, 1)), ORDER)


def test_spectra_of_other_exposures_are_refused(frame):
    with pytest.raises(InputError, match="19 spectra and 20 rows"):
        SkyBrightnessDataset(frame, np.zeros((19, 1)), ORDER)


def test_a_loader_gives_every_row_once_in_order(dataset):
    loader = NumpyLoader(dataset, batch_size=8)
    batches = list(loader)
    assert [len(batch[0]) for batch in batches] == [8, 8, 4]
    assert len(loader) == 3
    assert all(isinstance(part, np.ndarray) for part in batches[0])
    np.testing.assert_array_equal(np.concatenate([b[0] for b in batches]), dataset.inputs)
    np.testing.assert_array_equal(np.concatenate([b[2] for b in batches]), dataset.flux)


def test_drop_last_leaves_the_short_batch_out(dataset):
    loader = NumpyLoader(dataset, batch_size=8, drop_last=True)
    assert [len(batch[0]) for batch in loader] == [8, 8]
    assert len(loader) == 2


class SeedOnly:
    def initial_seed(self):
        return 7


@pytest.mark.parametrize("generator", [7, SeedOnly(), "fresh"])
def test_shuffling_is_a_permutation_that_a_seed_repeats(dataset, generator):
    def epochs():
        source = np.random.default_rng(7) if generator == "fresh" else generator
        loader = NumpyLoader(dataset, batch_size=8, shuffle=True, generator=source)
        return [np.concatenate([batch[2][:, 0] for batch in loader]) for _ in range(2)]

    first, second = epochs()
    assert sorted(first) == sorted(dataset.flux[:, 0])
    assert list(first) != list(second)
    np.testing.assert_array_equal([first, second], epochs())


def test_samplers_decide_alone(dataset):
    sampled = NumpyLoader(dataset, batch_size=2, sampler=[5, 5, 1])
    assert [batch[2][:, 0].tolist() for batch in sampled] == [[15, 15], [3]]
    assert len(sampled) == 2
    grouped = NumpyLoader(dataset, batch_sampler=[[0], [1, 2]])
    assert [batch[2][:, 0].tolist() for batch in grouped] == [[0], [3, 6]]
    assert len(grouped) == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"sampler": [1], "shuffle": True}, "exclude each other"),
        ({"batch_sampler": [[1]], "drop_last": True}, "batch_sampler excludes"),
        ({"generator": "seed"}, "generator is str"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(dataset, arguments, reason):
    with pytest.raises(InputError, match=reason):
        NumpyLoader(dataset, **arguments)


def test_collate_stacks_what_samples_hold():
    inputs, scalars = numpy_collate([(np.ones(2), 1.5), (np.zeros(2), 2.5)])
    np.testing.assert_array_equal(inputs, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(scalars, [1.5, 2.5])
    np.testing.assert_array_equal(numpy_collate([np.ones(2), np.ones(2)]), np.ones((2, 2)))


def test_gathering_a_subset_of_a_subset_keeps_everything_aligned(frame, dataset):
    subset = Subset(Subset(dataset, [3, 9, 4, 17]), [2, 0])  # rows 4 and 3
    inputs, targets, spectra, metadata = gather_full_data(NumpyLoader(subset, batch_size=1))
    np.testing.assert_array_equal(inputs, dataset.inputs[[4, 3]])
    np.testing.assert_array_equal(targets, dataset.targets[[4, 3]])
    np.testing.assert_array_equal(spectra, dataset.flux[[4, 3]])
    assert metadata["EXPID"].tolist() == [5004, 5003]
    assert metadata.index.tolist() == [0, 1]


def test_gathering_without_rows_or_metadata_is_refused(dataset):
    with pytest.raises(InputError, match="no rows"):
        gather_full_data(NumpyLoader(Subset(dataset, [])))
    with pytest.raises(InputError, match="list has no metadata"):
        gather_full_data(NumpyLoader([(1, 2, 3)]))


def test_only_loaders_that_cannot_surprise_are_gathered(frame, dataset):
    gathered = gather(NumpyLoader(Subset(dataset, [2, 0]), batch_size=4, shuffle=True))
    np.testing.assert_array_equal(gathered.targets, dataset.targets[[2, 0]])
    assert (gathered.order.batch_size, gathered.order.shuffle) == (4, True)
    transformed = SkyBrightnessDataset(frame, None, ORDER, transform=lambda *item: item)
    assert gather(NumpyLoader(transformed)) is None
    assert gather(NumpyLoader(dataset, sampler=range(20))) is None
    assert gather(NumpyLoader(dataset, batch_sampler=[[1]])) is None
    assert gather([(dataset.inputs, dataset.targets)]) is None

    class Own(NumpyLoader):
        def __iter__(self):
            return iter(())

    assert gather(Own(dataset)) is None


def test_batches_of_an_epoch_follow_the_compiled_order(dataset):
    loader = NumpyLoader(dataset, batch_size=8, shuffle=True)
    order = np.asarray(epoch_order(5, 2, 20))
    inputs = np.concatenate([batch[0] for batch in epoch_batches(loader, 5, 2)])
    np.testing.assert_array_equal(inputs, dataset.inputs[order])


@pytest.mark.parametrize("count", [1, 2, 7, 1351, 70_000])
def test_the_order_of_an_epoch_is_a_permutation(count):
    order = np.asarray(epoch_order(0, 0, count))
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(np.asarray(epoch_order(s, e, 50)).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_every_row_comes_to_every_place_about_equally_often():
    # 4000 permutations of 5: each (row, place) count is binomial(4000, 1/5), sd 25.
    counts = np.zeros((5, 5))
    for epoch in range(4000):
        counts[np.arange(5), np.asarray(_order_of_five(epoch))] += 1
    assert np.abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


def _order_of_five(epoch: int) -> np.ndarray:
    from desisky_tune.training.shuffle import compiled_epoch_order

    return np.asarray(compiled_epoch_order(1, epoch, 5))


def test_nothing_here_imports_torch_pandas_or_jax():
    code = (
        "import sys, desisky_tune.training.dataset\n"
        "print([name for name in ('torch', 'pandas', 'jax', 'ray') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


#: Why these are skipped: the package works with PyTorch where a user has it.
NO_TORCH = "PyTorch is no dependency; it is not installed here"


class TestWithTorch:
    """The documented quick start's own loaders."""

    def test_random_split_subset_and_dataloader(self, dataset):
        torch = pytest.importorskip("torch", reason=NO_TORCH)
        from torch.utils.data import DataLoader, random_split

        parts = random_split(dataset, [0.7, 0.3], generator=torch.Generator().manual_seed(42))
        assert [len(part) for part in parts] == [14, 6]
        ours = list(NumpyLoader(parts[0], batch_size=4))
        theirs = list(DataLoader(parts[0], batch_size=4, collate_fn=numpy_collate))
        for left, right in zip(ours, theirs, strict=True):
            for a, b in zip(left, right, strict=True):
                np.testing.assert_array_equal(a, b)
        gathered = gather(NumpyLoader(parts[0], batch_size=4))
        np.testing.assert_array_equal(gathered.inputs, np.concatenate([b[0] for b in ours]))

    def test_a_torch_generator_seeds_the_order(self, dataset):
        torch = pytest.importorskip("torch", reason=NO_TORCH)

        def first_epoch():
            generator = torch.Generator().manual_seed(3)
            loader = NumpyLoader(dataset, batch_size=20, shuffle=True, generator=generator)
            return next(iter(loader))[2][:, 0].tolist()

        assert first_epoch() == first_epoch()

    def test_torchs_loader_is_gathered_unless_it_has_its_own_way(self, dataset):
        torch = pytest.importorskip("torch", reason=NO_TORCH)
        from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

        order = loader_order(DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True))
        assert (order.batch_size, order.shuffle, order.drop_last) == (8, True, True)
        assert not loader_order(DataLoader(dataset, batch_size=8)).shuffle
        assert loader_order(DataLoader(dataset, sampler=SubsetRandomSampler([1, 2]))) is None
        assert loader_order(DataLoader(dataset, collate_fn=lambda items: items)) is None
        tensors = TensorDataset(torch.ones(5, 6), torch.zeros(5, 4))
        assert gather(DataLoader(tensors, batch_size=2)).inputs.shape == (5, 6)
