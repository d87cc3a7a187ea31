"""The compiled core against an independent loop, and its promises of exactness."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from desisky_tune.errors import CheckpointError, InputError, MissingFileError
from desisky_tune.training.metrics import band_rmse
from desisky_tune.training.program import (
    Hyperparameters,
    Program,
    program_for,
    training_arrays,
)
from desisky_tune.training.scaling import Scaling, fold
from desisky_tune.training.shuffle import epoch_order

ROWS, TEST_ROWS = 75, 30
DEFAULT = Hyperparameters(learning_rate=3e-3, huber_delta=0.25)
SHAPE = {"in_size": 6, "out_size": 4, "width": 16, "depth": 3}


def table(seed: int = 0) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(ROWS + TEST_ROWS, 6)) * [30, 10, 20, 0.3, 0.1, 0.2]
    targets = 20 + np.tanh(inputs[:, :4] / 20) + random.normal(0, 0.1, (len(inputs), 4))
    return inputs[:ROWS], targets[:ROWS], inputs[ROWS:], targets[ROWS:]


def scaled_arrays(seed: int = 0):
    rows = table(seed)
    scaling = Scaling.fit(*rows[:2])
    return training_arrays(*rows, scaling), scaling


def mlp(seed: int = 0, depth: int = 3) -> eqx.nn.MLP:
    return eqx.nn.MLP(6, 4, 16, depth, key=jax.random.PRNGKey(seed))


def loop(model, rows, order_of, *, epochs, batch, loss, optimizer, scaling=None):
    """Train by the book: one Python step a batch, optax, jax.grad. No code of the package."""
    train_x, train_y, test_x, test_y = (jnp.asarray(part, jnp.float32) for part in rows)
    mean, sd = jnp.zeros(4), jnp.ones(4)
    if scaling is not None:
        mean, sd = jnp.asarray(scaling.target_mean), jnp.asarray(scaling.target_sd)
        train_x, test_x = (
            jnp.asarray((part - scaling.input_mean) / scaling.input_sd, jnp.float32)
            for part in (rows[0], rows[2])
        )

    def value(model, inputs, targets):
        return loss(jax.vmap(model)(inputs) * sd + mean, targets)

    @eqx.filter_jit
    def step(model, state, inputs, targets):
        lost, gradient = eqx.filter_value_and_grad(value)(model, inputs, targets)
        updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, lost

    state = optimizer.init(eqx.filter(model, eqx.is_array))
    train_losses, test_losses, rmse = [], [], []
    for epoch in range(epochs):
        order = order_of(epoch)
        total = 0.0
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            model, state, lost = step(model, state, train_x[part], train_y[part])
            total += float(lost) * len(part)
        train_losses.append(total / len(order))
        test_losses.append(float(value(model, test_x, test_y)))
        rmse.append(band_rmse(jax.vmap(model)(test_x) * sd + mean, test_y))
    return model, np.array(train_losses), np.array(test_losses), np.array(rmse)


def huber(pred, targets):
    return optax.huber_loss(pred, targets, delta=0.25).mean()


def l2(pred, targets):
    return jnp.mean((pred - targets) ** 2)


def equal(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("core", ["auto", "xla"])
@pytest.mark.parametrize(("batch", "depth"), [(7, 1), (32, 3), (64, 3), (200, 1)])
def test_the_curve_is_that_of_a_plain_loop_with_optax(batch, depth, core):
    arrays, scaling = scaled_arrays()
    program = program_for(**{**SHAPE, "depth": depth}, batch_size=batch, core=core)
    state, curve = program.advance(program.init(5, mlp(depth=depth)), arrays, DEFAULT, 6)
    model, train, test, rmse = loop(
        mlp(depth=depth),
        table(),
        lambda epoch: np.asarray(epoch_order(5, epoch, ROWS)),
        epochs=6,
        batch=batch,
        loss=huber,
        optimizer=optax.adam(DEFAULT.learning_rate),
        scaling=scaling,
    )
    np.testing.assert_allclose(curve.train_loss, train, rtol=3e-5)
    np.testing.assert_allclose(curve.test_loss, test, rtol=3e-5)
    np.testing.assert_allclose(curve.rmse, rmse, rtol=3e-5)
    np.testing.assert_allclose(curve.objective, rmse.mean(axis=1), rtol=3e-5)
    for ours, theirs in zip(
        jax.tree.leaves(eqx.filter(program.last_model(state), eqx.is_array)),
        jax.tree.leaves(eqx.filter(model, eqx.is_array)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("core", ["auto", "xla"])
@pytest.mark.parametrize(("name", "loss"), [("l2", l2), ("huber", huber)])
def test_without_scaling_or_shuffle_it_is_the_documented_arithmetic(name, loss, core):
    rows = table()
    program = program_for(**SHAPE, batch_size=32, loss=name, shuffle=False, core=core)
    arrays = training_arrays(*rows)
    _, curve = program.advance(program.init(0, mlp(3)), arrays, DEFAULT, 5)
    _, train, test, _ = loop(
        mlp(3),
        rows,
        lambda epoch: np.arange(ROWS),
        epochs=5,
        batch=32,
        loss=loss,
        optimizer=optax.adam(DEFAULT.learning_rate),
    )
    np.testing.assert_allclose(curve.train_loss, train, rtol=1e-4)
    np.testing.assert_allclose(curve.test_loss, test, rtol=1e-4)


def test_any_module_optimizer_and_loss():
    class Bowl(eqx.Module):
        weight: jax.Array
        centre: jax.Array

        def __call__(self, row):
            return self.weight @ (row - self.centre) ** 2 + 20

    model = Bowl(0.01 * jnp.ones((4, 6)), jnp.zeros(6))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-4, momentum=0.9))

    def absolute(pred, targets):
        return jnp.abs(pred - targets).mean()

    rows = table()
    program = Program(
        model, batch_size=32, loss=absolute, optimizer=optimizer, shuffle=False, select="loss"
    )
    state, curve = program.advance(program.init(0, model), training_arrays(*rows), DEFAULT, 4)
    _, train, test, _ = loop(
        model,
        rows,
        lambda epoch: np.arange(ROWS),
        epochs=4,
        batch=32,
        loss=absolute,
        optimizer=optimizer,
    )
    np.testing.assert_allclose(curve.train_loss, train, rtol=1e-4)
    np.testing.assert_allclose(curve.test_loss, test, rtol=1e-4)
    assert isinstance(program.best_model(state), Bowl)


def test_the_lean_step_agrees_with_the_general_one():
    arrays, _ = scaled_arrays()
    curves = []
    for lean in (True, False):
        program = Program(mlp(), batch_size=16, lean=lean)
        curves.append(program.advance(program.init(1, mlp()), arrays, DEFAULT, 10)[1])
    np.testing.assert_allclose(curves[0].train_loss, curves[1].train_loss, rtol=1e-4)


def test_drop_last_leaves_the_short_batch_out():
    rows = table()
    program = program_for(**SHAPE, batch_size=32, shuffle=False, drop_last=True)
    _, curve = program.advance(program.init(0, mlp()), training_arrays(*rows), DEFAULT, 3)
    _, train, _, _ = loop(
        mlp(),
        rows,
        lambda epoch: np.arange(64),
        epochs=3,
        batch=32,
        loss=huber,
        optimizer=optax.adam(DEFAULT.learning_rate),
    )
    np.testing.assert_allclose(curve.train_loss, train, rtol=1e-4)
    too_few = program_for(**SHAPE, batch_size=76, drop_last=True)
    with pytest.raises(InputError, match="no batch of 76 out of 75"):
        too_few.advance(too_few.init(0), training_arrays(*rows), DEFAULT, 1)


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("core", ["auto", "xla"])
def test_twenty_five_chunks_are_one_run_bit_for_bit(core):
    arrays, _ = scaled_arrays()
    program = program_for(**SHAPE, batch_size=32, core=core)
    whole, curve = program.advance(program.init(2), arrays, DEFAULT, 500)
    state, pieces = program.init(2), []
    for _ in range(25):
        state, piece = program.advance(state, arrays, DEFAULT, 20)
        pieces.append(piece)
    assert equal(state, whole)
    for name in ("train_loss", "test_loss", "rmse", "objective"):
        joined = np.concatenate([getattr(piece, name) for piece in pieces])
        np.testing.assert_array_equal(joined, getattr(curve, name))


def test_more_epochs_than_the_capacity_are_the_same_run():
    arrays, _ = scaled_arrays()
    small, large = (
        program_for(**SHAPE, batch_size=32, epochs=size, core="xla") for size in (4, 64)
    )
    left, left_curve = small.advance(small.init(2), arrays, DEFAULT, 11)
    right, right_curve = large.advance(large.init(2), arrays, DEFAULT, 11)
    assert equal(left, right)
    np.testing.assert_array_equal(left_curve.rmse, right_curve.rmse)


def test_a_state_goes_through_a_file_in_mid_run(tmp_path):
    arrays, _ = scaled_arrays()
    program = program_for(**SHAPE, batch_size=32)
    whole, _ = program.advance(program.init(2), arrays, DEFAULT, 30)
    half, _ = program.advance(program.init(2), arrays, DEFAULT, 13)
    program.save_state(tmp_path / "trial.state", half)
    again, _ = program.load_state(tmp_path / "trial.state")
    assert equal(again, half)
    assert equal(program.advance(again, arrays, DEFAULT, 17)[0], whole)
    assert [path.name for path in tmp_path.iterdir()] == ["trial.state"]


def test_notes_come_back_with_a_state(tmp_path):
    program = program_for(**SHAPE, batch_size=32)
    notes = {"trial": 3, "curve": {"V": [0.5, 0.25]}}
    program.save_state(tmp_path / "trial.state", program.init(0), notes)
    assert program.load_state(tmp_path / "trial.state")[1] == notes


def test_a_state_stays_valid_after_it_was_advanced():
    arrays, _ = scaled_arrays()
    program = program_for(**SHAPE, batch_size=32)
    state = program.init(2)
    first, _ = program.advance(state, arrays, DEFAULT, 5)
    second, _ = program.advance(state, arrays, DEFAULT, 5)
    assert equal(first, second)


def test_nothing_is_compiled_twice():
    arrays, _ = scaled_arrays()
    program = Program(mlp(), batch_size=16)
    state = program.init(0)
    for epochs, rate, delta in ((1, 1e-3, 0.25), (7, 1e-4, 0.25), (300, 1e-2, 1.0), (3, 1.0, 0.01)):
        state, _ = program.advance(state, arrays, Hyperparameters(rate, delta), epochs)
        state = program.init(epochs)
    assert program._advance._cache_size() == 1
    assert program._begin._cache_size() == 1


def test_a_shape_asked_for_again_is_the_same_program():
    assert program_for(**SHAPE, batch_size=32) is program_for(**SHAPE, batch_size=32)
    assert program_for(**SHAPE, batch_size=32) is not program_for(**SHAPE, batch_size=16)


def test_seeds_begin_differently_and_repeat():
    arrays, _ = scaled_arrays()
    program = program_for(**SHAPE, batch_size=32)
    curves = [program.advance(program.init(seed), arrays, DEFAULT, 3)[1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(curves[0].rmse, curves[1].rmse)
    assert not np.array_equal(curves[0].rmse, curves[2].rmse)


@pytest.mark.parametrize("core", ["auto", "xla"])
def test_the_initial_weights_are_those_of_the_seeds_key(core):
    program = program_for(**SHAPE, batch_size=32, core=core)
    assert equal(
        eqx.filter(program.last_model(program.init(9)), eqx.is_array),
        eqx.filter(mlp(9), eqx.is_array),
    )


# ---------------------------------------------------------------- the best epoch


@pytest.mark.parametrize("core", ["auto", "xla"])
@pytest.mark.parametrize("select", ["rmse", "loss"])
def test_the_best_model_is_of_the_lowest_epoch(select, core):
    arrays, scaling = scaled_arrays()
    rows = table()
    rate = Hyperparameters(learning_rate=3e-2, huber_delta=0.05)
    program = program_for(**SHAPE, batch_size=16, select=select, core=core)
    state, curve = program.advance(program.init(0), arrays, rate, 60)
    values = curve.objective if select == "rmse" else curve.test_loss
    best = int(np.argmin(values))
    assert 0 < best < 59
    assert int(state.best_epoch) == best
    assert float(state.best_value) == values[best]
    folded = fold(program.best_model(state), scaling)
    pred = jax.vmap(folded)(jnp.asarray(rows[2], jnp.float32))
    np.testing.assert_allclose(band_rmse(pred, rows[3]), curve.rmse[best], atol=2e-5)


def test_epochs_that_are_not_validated_hold_nan_and_cannot_be_best():
    arrays, _ = scaled_arrays()
    every = program_for(**SHAPE, batch_size=32)
    third = program_for(**SHAPE, batch_size=32, validate_every=3)
    _, dense = every.advance(every.init(0), arrays, DEFAULT, 10)
    state, sparse = third.advance(third.init(0), arrays, DEFAULT, 10)
    assert sparse.validated.tolist() == [epoch % 3 == 0 for epoch in range(10)]
    assert np.isnan(sparse.rmse[~sparse.validated]).all()
    np.testing.assert_allclose(sparse.rmse[::3], dense.rmse[::3], rtol=1e-5)
    np.testing.assert_allclose(sparse.train_loss, dense.train_loss, rtol=1e-5)
    assert int(state.best_epoch) == 3 * int(np.argmin(dense.objective[::3]))


@pytest.mark.parametrize("core", ["auto", "xla"])
def test_a_training_that_diverges_stops_and_keeps_its_best(core):
    arrays, _ = scaled_arrays()
    program = program_for(**SHAPE, batch_size=32, loss="l2", core=core)
    state, curve = program.advance(program.init(0), arrays, DEFAULT, 4)
    best = float(state.best_value)
    state, curve = program.advance(state, arrays, Hyperparameters(1e30), 50)
    assert curve.failed
    assert len(curve.train_loss) < 50
    last = [curve.train_loss[-1], curve.test_loss[-1], curve.objective[-1]]
    assert not np.isfinite(last).all()
    assert float(state.best_value) <= best
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.best_parameters))
    again, nothing = program.advance(state, arrays, DEFAULT, 5)
    assert len(nothing.train_loss) == 0
    assert nothing.failed
    assert equal(again, state)


def test_no_epochs_are_no_change():
    arrays, _ = scaled_arrays()
    program = program_for(**SHAPE, batch_size=32)
    state = program.init(0)
    after, curve = program.advance(state, arrays, DEFAULT, 0)
    assert equal(after, state)
    assert curve.rmse.shape == (0, 4)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 8, "validate_every": 0}, "validate_every is 0"),
        ({"batch_size": 8, "select": "nmad"}, "select is 'nmad'"),
        ({"batch_size": 8, "loss": "mae"}, "Unknown loss"),
    ],
)
def test_settings_out_of_range_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        program_for(**SHAPE, **settings)


def test_models_and_seeds_that_do_not_fit_are_refused():
    program = program_for(**SHAPE, batch_size=32)
    with pytest.raises(InputError, match="not of the structure"):
        program.init(0, mlp(depth=2))
    with pytest.raises(InputError, match="seed is -1"):
        program.init(-1)


def test_rows_that_do_not_fit_are_refused():
    x, y, test_x, test_y = table()
    with pytest.raises(InputError, match="disagree"):
        training_arrays(x[:-1], y, test_x, test_y)
    with pytest.raises(InputError, match=r"validation inputs of shape \(0, 6\)"):
        training_arrays(x, y, test_x[:0], test_y[:0])
    x[4, 1] = np.inf
    with pytest.raises(InputError, match="training inputs: 1 of 75 rows are not finite"):
        training_arrays(x, y, test_x, test_y)


def test_states_that_do_not_fit_are_refused(tmp_path):
    program = program_for(**SHAPE, batch_size=32)
    other = program_for(**{**SHAPE, "width": 8}, batch_size=32)
    path = tmp_path / "a.state"
    with pytest.raises(MissingFileError, match="no such training state"):
        program.load_state(path)
    program.save_state(path, program.init(0))
    with pytest.raises(CheckpointError, match="another shape"):
        other.load_state(path)
    whole = path.read_bytes()
    for stop in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:stop])
        with pytest.raises(CheckpointError, match=r"a\.state"):
            program.load_state(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="further bytes"):
        program.load_state(path)
