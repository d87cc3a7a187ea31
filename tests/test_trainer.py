"""`BroadbandTrainer`: the documented behaviour, by both ways of training."""

from __future__ import annotations

import _thread
import math
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from desisky_tune.data.columns import FEATURES, TARGETS
from desisky_tune.errors import CheckpointError, DesiskyTuneError, InputError
from desisky_tune.io import load_model
from desisky_tune.training import (
    BroadbandTrainer,
    NumpyLoader,
    SkyBrightnessDataset,
    TrainingConfig,
    TrainingHistory,
)
from desisky_tune.training.metrics import band_rmse
from desisky_tune.training.shuffle import epoch_order

ROWS, TRAIN = 90, 60
ORDER = ["MOONSEP", "MOONFRAC", "MOONALT", "OBSALT", "TRANSPARENCY_GFA", "ECLIPSE_FRAC"]


class Subset:
    """What PyTorch's Subset is, to the eye of a loader."""

    def __init__(self, dataset, indices):
        self.dataset = dataset
        self.indices = list(indices)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]


def exposures() -> pd.DataFrame:
    random = np.random.default_rng(0)
    spread, middle = [30, 10, 20, 0.2, 0.1, 0], [60, 50, 30, 0.7, 0.9, 0]
    inputs = random.normal(size=(ROWS, 6)) * spread + middle
    targets = 20 + np.tanh(inputs[:, :4] / 40) + random.normal(0, 0.1, (ROWS, 4))
    return pd.DataFrame(np.hstack([inputs, targets]), columns=[*FEATURES, *TARGETS])


def loaders(batch_size=16, shuffle=True, transform=None, **settings):
    dataset = SkyBrightnessDataset(exposures(), np.zeros((ROWS, 2)), ORDER, transform)
    rows = np.random.default_rng(1).permutation(ROWS).tolist()
    return (
        NumpyLoader(Subset(dataset, rows[:TRAIN]), batch_size, shuffle=shuffle, **settings),
        NumpyLoader(Subset(dataset, rows[TRAIN:]), batch_size),
    )


def unchanged(*item):
    return item


def mlp(seed=0):
    return eqx.nn.MLP(6, 4, 16, 2, key=jax.random.PRNGKey(seed))


def config(tmp_path, **settings):
    given = {"epochs": 8, "learning_rate": 3e-3, "loss": "huber", "huber_delta": 0.25}
    return TrainingConfig(**{**given, "save_dir": tmp_path, "print_every": 0, **settings})


def rows_of(loader):
    return tuple(np.concatenate(part) for part in list(zip(*loader, strict=True))[:2])


def magnitudes(model, inputs):
    return np.asarray(jax.vmap(model)(jnp.asarray(inputs)))


# ---------------------------------------------------------------- what training gives


def test_standardize_false_is_the_documented_arithmetic_to_the_letter(tmp_path):
    train, test = loaders(shuffle=False)
    _, history = BroadbandTrainer(mlp(), config(tmp_path)).train(train, test)

    model, optimizer = mlp(), optax.adam(3e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    def value(model, inputs, targets):
        return optax.huber_loss(jax.vmap(model)(inputs), targets, delta=0.25).mean()

    train_losses, test_losses = [], []
    for _ in range(8):
        total = 0.0
        for inputs, targets, _ in train:
            lost, gradient = eqx.filter_value_and_grad(value)(model, inputs, targets)
            updates, state = optimizer.update(gradient, state)
            model = eqx.apply_updates(model, updates)
            total += float(lost) * len(inputs)
        train_losses.append(total / TRAIN)
        test_losses.append(float(value(model, *map(jnp.asarray, rows_of(test)))))
    np.testing.assert_allclose(history.train_losses, train_losses, rtol=1e-4)
    np.testing.assert_allclose(history.test_losses, test_losses, rtol=1e-4)


@pytest.mark.parametrize("standardize", [False, True])
def test_the_best_model_comes_back_with_its_history(tmp_path, standardize):
    settings = config(tmp_path, epochs=40, learning_rate=3e-2, standardize=standardize)
    trainer = BroadbandTrainer(mlp(), settings)
    train, test = loaders()
    model, history = trainer.train(train, test)
    assert isinstance(history, TrainingHistory)
    assert (trainer.model, trainer.history, history.config) == (model, history, settings)
    assert len(history.train_losses) == len(history.test_losses) == 40
    assert history.best_epoch == int(np.argmin(history.test_losses))
    assert history.best_test_loss == min(history.test_losses)
    inputs, targets = rows_of(test)
    again = optax.huber_loss(magnitudes(model, inputs), targets, delta=0.25).mean()
    assert float(again) == pytest.approx(history.best_test_loss, rel=1e-3)


def test_standardizing_works_in_magnitudes_and_gives_a_raw_model(tmp_path):
    train, test = loaders()
    model, history = BroadbandTrainer(
        mlp(), config(tmp_path, epochs=150, standardize=True, loss="l2")
    ).train(train, test)
    inputs, targets = rows_of(test)
    squared = np.mean((magnitudes(model, inputs) - targets) ** 2)
    assert history.best_test_loss == pytest.approx(squared, rel=1e-3)
    assert history.best_test_loss < 0.5 * np.var(targets, axis=0).mean()


def test_the_seed_orders_the_rows_and_nothing_else_does(tmp_path):
    def losses(seed):
        train, test = loaders()
        return BroadbandTrainer(mlp(), config(tmp_path, seed=seed)).train(train, test)[1]

    assert losses(0).train_losses == losses(0).train_losses
    assert losses(0).train_losses != losses(1).train_losses


def test_validate_every_leaves_epochs_out(tmp_path):
    train, test = loaders()
    settings = config(tmp_path, epochs=10, validate_every=4)
    _, history = BroadbandTrainer(mlp(), settings).train(train, test)
    assert (len(history.train_losses), len(history.test_losses)) == (10, 3)
    assert history.best_epoch in (0, 4, 8)


def test_any_optimizer_and_any_loss(tmp_path):
    def worst(pred, targets):
        return jnp.max(jnp.abs(pred - targets))

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    trainer = BroadbandTrainer(mlp(), config(tmp_path, loss=worst), optimizer=optimizer)
    assert trainer.optimizer is optimizer
    train, test = loaders()
    model, history = trainer.train(train, test)
    inputs, targets = rows_of(test)
    expected = np.abs(magnitudes(model, inputs) - targets).max()
    assert history.best_test_loss == pytest.approx(expected, rel=1e-4)
    _, meta = load_model("broadband", path=trainer.checkpoint_path)
    assert meta["training"]["config"]["loss"] == "worst (custom)"


def test_any_module_trains(tmp_path):
    class Linear(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, row):
            return self.layer(row / 50) + 20

    model = Linear(eqx.nn.Linear(6, 4, key=jax.random.PRNGKey(0)))
    best, history = BroadbandTrainer(model, config(tmp_path, save_best=False)).train(*loaders())
    assert isinstance(best, Linear)
    assert history.test_losses[-1] < history.test_losses[0]


# ---------------------------------------------------------------- both ways to train


def curves(train_test, settings, **options):
    history = BroadbandTrainer(mlp(), settings, **options).train(*train_test)[1]
    return history.train_losses, history.test_losses


@pytest.mark.parametrize("standardize", [False, True])
def test_batch_by_batch_gives_the_curve_of_the_compiled_program(tmp_path, standardize):
    settings = config(tmp_path, standardize=standardize)
    compiled = curves(loaders(), settings)
    iterated = curves(loaders(transform=unchanged), settings)
    np.testing.assert_allclose(iterated, compiled, rtol=2e-5)


def test_a_list_of_batches_trains_as_a_loader_that_keeps_the_order(tmp_path):
    train, test = loaders(shuffle=False)
    compiled = curves((train, test), config(tmp_path, validate_every=3))
    batches = [tuple(batch) for batch in train], [tuple(batch) for batch in test]
    history = BroadbandTrainer(mlp(), config(tmp_path, validate_every=3)).train(*batches)[1]
    np.testing.assert_allclose(history.train_losses, compiled[0], rtol=2e-5)
    np.testing.assert_allclose(history.test_losses, compiled[1], rtol=2e-5)


def test_a_sampler_is_obeyed(tmp_path):
    train, test = loaders(shuffle=False)
    order = np.asarray(epoch_order(3, 0, TRAIN)).tolist()
    sampled = NumpyLoader(train.dataset, 16, sampler=order)
    shuffled = NumpyLoader(train.dataset, 16, shuffle=True)
    settings = config(tmp_path, epochs=1, seed=3)
    np.testing.assert_allclose(
        curves((sampled, test), settings), curves((shuffled, test), settings), rtol=2e-5
    )


def test_a_transform_that_changes_is_asked_each_epoch(tmp_path):
    calls = []

    def noisy(inputs, targets, spectrum):
        calls.append(1)
        return inputs, targets, spectrum

    train, _ = loaders(transform=noisy)
    _, test = loaders()
    BroadbandTrainer(mlp(), config(tmp_path, epochs=3)).train(train, test)
    assert len(calls) == 3 * TRAIN


def test_on_epoch_end_sees_the_model_of_each_epoch(tmp_path):
    train, test = loaders()
    seen = []

    def keep(model, history, epoch):
        seen.append((model, len(history.test_losses), epoch))

    plain = curves((train, test), config(tmp_path, standardize=True))
    watched = curves((train, test), config(tmp_path, standardize=True), on_epoch_end=keep)
    np.testing.assert_array_equal(watched, plain)
    assert [epoch for _, _, epoch in seen] == list(range(8))
    assert [count for _, count, _ in seen] == list(range(1, 9))
    inputs, targets = rows_of(test)
    for model, count, _ in seen:
        loss = optax.huber_loss(magnitudes(model, inputs), targets, delta=0.25).mean()
        assert float(loss) == pytest.approx(plain[1][count - 1], rel=1e-3)


# ---------------------------------------------------------------- checkpoints


def test_the_checkpoint_holds_the_best_model_and_the_documented_header(tmp_path):
    train, test = loaders()
    settings = config(tmp_path, epochs=30, learning_rate=3e-2, run_name="mine", standardize=True)
    trainer = BroadbandTrainer(mlp(), settings)
    model, history = trainer.train(train, test)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.eqx"]
    loaded, meta = load_model("broadband", path=tmp_path / "mine.eqx")
    inputs, targets = rows_of(test)
    np.testing.assert_array_equal(magnitudes(loaded, inputs), magnitudes(model, inputs))
    assert meta["schema"] == 1
    assert meta["arch"] == {"in_size": 6, "out_size": 4, "width_size": 16, "depth": 2}
    training = meta["training"]
    assert training["epoch"] == history.best_epoch
    assert training["test_loss"] == history.best_test_loss
    assert training["train_loss"] == history.train_losses[history.best_epoch]
    assert list(training["per_band_rmse"]) == ["V", "g", "r", "z"]
    np.testing.assert_allclose(
        list(training["per_band_rmse"].values()),
        band_rmse(magnitudes(model, inputs), targets),
        atol=1e-4,
    )
    assert (
        training["config"].items()
        >= {
            "epochs": 30,
            "learning_rate": 3e-2,
            "loss": "huber",
            "huber_delta": 0.25,
        }.items()
    )
    assert meta["features"] == ORDER
    assert meta["constant_features"] == ["ECLIPSE_FRAC"]


def test_the_default_folder_is_the_documented_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trainer = BroadbandTrainer(mlp(), TrainingConfig(1, 1e-3, print_every=0))
    trainer.train(*loaders())
    path = tmp_path / ".cache/desisky/saved_models/broadband/broadband_training.eqx"
    assert trainer.checkpoint_path == path
    assert path.is_file()


def test_save_best_false_writes_nothing(tmp_path):
    BroadbandTrainer(mlp(), config(tmp_path, save_best=False)).train(*loaders())
    assert not list(tmp_path.iterdir())


def test_a_model_from_a_checkpoint_is_unfolded_before_it_trains_on(tmp_path):
    train, test = loaders()
    settings = config(tmp_path, epochs=200, standardize=True, loss="l2")
    BroadbandTrainer(mlp(), settings).train(train, test)
    loaded, meta = load_model("broadband", path=tmp_path / "broadband_training.eqx")
    best = meta["training"]["test_loss"]
    gentle = config(tmp_path, epochs=1, learning_rate=1e-6, standardize=True, loss="l2")
    _, carried_on = BroadbandTrainer(loaded, gentle).train(train, test)
    assert carried_on.test_losses[0] == pytest.approx(best, rel=0.02)
    _, from_scratch = BroadbandTrainer(loaded, gentle, raw_space=False).train(train, test)
    assert from_scratch.test_losses[0] > 2 * best


def test_training_again_goes_on_from_the_best_model(tmp_path):
    train, test = loaders()
    trainer = BroadbandTrainer(mlp(), config(tmp_path, epochs=100, standardize=True))
    _, first = trainer.train(train, test)
    _, second = trainer.train(train, test)
    assert len(second.train_losses) == 100
    assert second.train_losses[0] < first.train_losses[0] / 3


# ---------------------------------------------------------------- lines, interrupts, failures


def test_a_line_every_print_every_epochs(tmp_path, capsys):
    BroadbandTrainer(mlp(), config(tmp_path, epochs=7, print_every=3)).train(*loaders())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "0"], ["epoch", "3"], ["epoch", "6"]]
    assert all("test loss" in line for line in lines)


def test_ctrl_c_leaves_the_best_checkpoint_and_says_where(tmp_path, capsys):
    def interrupt(model, history, epoch):
        if epoch >= 4:  # one that meets a finaliser is lost, as any Ctrl-C there
            _thread.interrupt_main()

    train, test = loaders()
    trainer = BroadbandTrainer(
        mlp(), config(tmp_path, epochs=10_000, standardize=True), on_epoch_end=interrupt
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train(train, test)
    assert str(tmp_path / "broadband_training.eqx") in capsys.readouterr().out
    loaded, meta = load_model("broadband", path=tmp_path / "broadband_training.eqx")
    history = trainer.history
    assert meta["training"]["epoch"] == history.best_epoch == int(np.argmin(history.test_losses))
    inputs, _ = rows_of(test)
    np.testing.assert_array_equal(magnitudes(loaded, inputs), magnitudes(trainer.model, inputs))


def test_a_training_that_diverges_at_once_says_so(tmp_path):
    with (
        pytest.warns(RuntimeWarning, match="stopped after epoch"),
        pytest.raises(DesiskyTuneError, match=r"diverged in epoch 0.*learning_rate \(now 1e\+30\)"),
    ):
        BroadbandTrainer(mlp(), config(tmp_path, learning_rate=1e30, loss="l2")).train(*loaders())
    assert not list(tmp_path.iterdir())


def test_a_training_that_diverges_later_keeps_its_best(tmp_path):
    rate = optax.piecewise_constant_schedule(1e-3, {20: 1e35})
    with pytest.warns(RuntimeWarning, match="not finite"):
        model, history = BroadbandTrainer(
            mlp(), config(tmp_path, epochs=50, loss="l2"), optimizer=optax.adam(rate)
        ).train(*loaders())
    assert 0 <= history.best_epoch < len(history.train_losses) - 1 < 49
    assert math.isfinite(history.best_test_loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 2.0}, "epochs is 2.0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"huber_delta": -1}, "huber_delta is -1"),
        ({"loss": "mae"}, "Unknown loss: 'mae'"),
        ({"run_name": "a/b"}, "run_name is 'a/b'"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_settings_out_of_range_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        TrainingConfig(**{"epochs": 1, "learning_rate": 1e-3, **settings})


def test_the_signature_is_the_documented_one():
    settings = TrainingConfig(500, 1e-4)
    assert (settings.loss, settings.huber_delta, settings.save_best) == ("l2", 1.0, True)
    assert (settings.save_dir, settings.run_name) == (None, "broadband_training")
    assert (settings.print_every, settings.validate_every) == (50, 1)
    assert (settings.seed, settings.standardize) == (0, False)
    with pytest.raises(TypeError):
        TrainingConfig(500, 1e-4, "l2", 1.0, True, None, "name", 50, 1, 0)
    history = TrainingHistory()
    assert (history.train_losses, history.test_losses) == ([], [])
    assert (history.best_test_loss, history.best_epoch, history.config) == (math.inf, -1, None)


def test_what_cannot_be_standardized_is_refused_before_training(tmp_path):
    model = eqx.nn.Linear(6, 4, key=jax.random.PRNGKey(0))
    trainer = BroadbandTrainer(model, config(tmp_path, standardize=True, save_best=False))
    with pytest.raises(InputError, match="not Linear"):
        trainer.train(*loaders())


@pytest.mark.parametrize(
    ("save_best", "kind", "reason"),
    [
        (True, CheckpointError, "5 features are named, the model takes 6"),
        (False, InputError, "5 inputs and 4 targets, and a model that maps 6 to 4"),
    ],
)
def test_a_model_of_another_size_is_refused_before_training(tmp_path, save_best, kind, reason):
    loader = NumpyLoader(SkyBrightnessDataset(exposures(), None, ORDER[1:]), 16)
    with pytest.raises(kind, match=reason):
        BroadbandTrainer(mlp(), config(tmp_path, save_best=save_best)).train(loader, loader)


def test_training_and_test_rows_of_different_features_are_refused(tmp_path):
    one, other = (
        NumpyLoader(SkyBrightnessDataset(exposures(), None, names), 16)
        for names in (ORDER, ORDER[::-1])
    )
    with pytest.raises(InputError, match="training and test rows have different inputs"):
        BroadbandTrainer(mlp(), config(tmp_path)).train(one, other)


def test_loaders_that_cannot_train_are_refused(tmp_path):
    train, test = loaders()
    batches = [tuple(batch) for batch in train]
    trainer = BroadbandTrainer(mlp(), config(tmp_path))
    with pytest.raises(InputError, match="can be iterated only once"):
        trainer.train(iter(batches), test)
    with pytest.raises(InputError, match="gave no batch"):
        trainer.train([], test)
    with pytest.raises(InputError, match="epoch 0, batch 1: values that are not finite"):
        trainer.train([batches[0], (batches[1][0] * np.nan, batches[1][1])], test)
    with pytest.raises(InputError, match=r"no \(inputs, targets"):
        trainer.train([(1,)], test)


def test_rows_that_are_not_finite_are_counted(tmp_path):
    frame = exposures()
    frame.loc[[3, 5], "TRANSPARENCY_GFA"] = np.nan
    loader = NumpyLoader(SkyBrightnessDataset(frame, None, ORDER), 16)
    with pytest.raises(InputError, match="2 of 90 rows are not finite"):
        BroadbandTrainer(mlp(), config(tmp_path)).train(loader, loader)


def test_the_test_loss_falls_on_the_whole(tmp_path):
    train, test = loaders()
    settings = config(tmp_path, epochs=60, standardize=True)
    _, history = BroadbandTrainer(mlp(), settings).train(train, test)
    smooth = np.mean(np.reshape(history.test_losses, (6, 10)), axis=1)
    assert all(later < earlier for earlier, later in pairwise(smooth[:3]))
