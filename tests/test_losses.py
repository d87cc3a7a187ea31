"""Losses against SciPy and optax."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import huber

from desisky_tune.errors import InputError
from desisky_tune.training import loss_func, loss_huber, loss_l2

RANDOM = np.random.default_rng(4)
PRED = RANDOM.normal(20, 1, (13, 4)).astype(np.float32)
TARGETS = RANDOM.normal(20, 1, (13, 4)).astype(np.float32)


def test_l2_is_the_mean_squared_residual():
    expected = np.mean((PRED.astype(float) - TARGETS) ** 2)
    assert float(loss_l2(PRED, TARGETS)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("delta", [0.01, 0.25, 1.0, 5.0])
def test_huber_is_scipys_on_both_sides_of_delta(delta):
    expected = np.mean(huber(delta, PRED.astype(float) - TARGETS))
    assert float(loss_huber(PRED, TARGETS, delta)) == pytest.approx(expected, rel=1e-5)


def test_huber_has_the_gradient_of_optax():
    ours = jax.grad(lambda pred: loss_huber(pred, TARGETS, 0.25))(PRED)
    theirs = jax.grad(lambda pred: optax.huber_loss(pred, TARGETS, delta=0.25).mean())(PRED)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)


def test_huber_of_delta_one_is_the_default():
    assert float(loss_huber(PRED, TARGETS)) == float(loss_huber(PRED, TARGETS, 1.0))


def test_a_perfect_prediction_costs_nothing():
    assert float(loss_l2(TARGETS, TARGETS)) == 0.0
    assert float(loss_huber(TARGETS, TARGETS, 0.1)) == 0.0


def test_loss_func_runs_the_model_on_every_row():
    model = eqx.nn.MLP(6, 4, 8, 2, key=jax.random.PRNGKey(0))
    inputs = RANDOM.normal(size=(13, 6)).astype(np.float32)
    rows = jnp.stack([model(jnp.asarray(row)) for row in inputs])
    for name, expected in (
        ("l2", loss_l2(rows, TARGETS)),
        ("huber", loss_huber(rows, TARGETS, 0.3)),
    ):
        value = loss_func(model, inputs, TARGETS, loss_name=name, huber_delta=0.3)
        assert float(value) == pytest.approx(float(expected), rel=1e-6)


def test_loss_func_takes_a_callable():
    model = eqx.nn.MLP(6, 4, 8, 1, key=jax.random.PRNGKey(0))
    inputs = RANDOM.normal(size=(13, 6)).astype(np.float32)

    def worst(pred, targets):
        return jnp.max(jnp.abs(pred - targets))

    expected = np.abs(np.asarray(jax.vmap(model)(inputs)) - TARGETS).max()
    assert float(loss_func(model, inputs, TARGETS, worst)) == pytest.approx(expected)


def test_an_unknown_loss_is_named():
    model = eqx.nn.MLP(6, 4, 8, 1, key=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"^Unknown loss: 'mae'") as caught:
        loss_func(model, np.zeros((2, 6)), np.zeros((2, 4)), loss_name="mae")
    assert isinstance(caught.value, InputError)
