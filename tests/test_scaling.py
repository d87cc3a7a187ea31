"""Folding and unfolding of scalings: algebra, constants, and what is refused."""

from __future__ import annotations

import gc
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.errors import InputError
from desisky_tune.models.raw_space import is_raw_space, mark_raw_space
from desisky_tune.training.scaling import Scaling, fold, unfold


def rows(seed: int = 0, count: int = 50, constant: bool = False) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(count, 6)) * [30, 10, 20, 0.3, 0.1, 0.2] + [
        60,
        50,
        20,
        0.6,
        1,
        0.3,
    ]
    if constant:
        inputs[:, 5] = 0.3
    return inputs, random.normal(20, [1, 0.5, 2, 0.1], (count, 4))


def mlp(depth: int = 2, seed: int = 0) -> eqx.nn.MLP:
    return eqx.nn.MLP(6, 4, 8, depth, key=jax.random.PRNGKey(seed))


def apply(model: eqx.nn.MLP, inputs: np.ndarray) -> np.ndarray:
    return np.asarray(jax.vmap(model)(jnp.asarray(inputs, jnp.float32)), np.float64)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 3), st.integers(0, 2**31), st.booleans())
def test_a_folded_model_on_raw_rows_is_the_model_on_scaled_rows(depth, seed, constant):
    inputs, targets = rows(seed, constant=constant)
    scaling = Scaling.fit(inputs, targets)
    model = mlp(depth, seed)
    inside = apply(model, scaling.scale_inputs(inputs))
    expected = inside * targets.std(axis=0) + targets.mean(axis=0)
    np.testing.assert_allclose(apply(fold(model, scaling), inputs), expected, atol=3e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 3), st.integers(0, 2**31))
def test_unfolding_undoes_folding(depth, seed):
    scaling = Scaling.fit(*rows(seed))
    model = mlp(depth, seed)
    back = unfold(fold(model, scaling), scaling)
    for ours, given_ in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        if eqx.is_array(ours):
            np.testing.assert_allclose(ours, given_, rtol=1e-4, atol=2e-5)


def test_moments_are_those_of_the_training_rows():
    inputs, targets = rows()
    scaling = Scaling.fit(inputs, targets)
    scaled = scaling.scale_inputs(inputs)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(scaling.scale_targets(targets).std(axis=0), 1, atol=1e-6)
    assert not scaling.constant.any()


def test_a_constant_feature_is_not_looked_at():
    inputs, targets = rows(constant=True)
    scaling = Scaling.fit(inputs, targets)
    assert scaling.constant.tolist() == [False] * 5 + [True]
    assert scaling.input_sd[5] == 1
    folded = fold(mlp(), scaling)
    assert not np.asarray(folded.layers[0].weight)[:, 5].any()
    elsewhere = inputs.copy()
    elsewhere[:, 5] = 0.9
    np.testing.assert_array_equal(apply(folded, inputs), apply(folded, elsewhere))


def test_a_feature_constant_but_for_float32_rounding_is_constant():
    inputs, targets = rows()
    inputs[:, 2] = np.float32(0.1) + np.where(np.arange(len(inputs)) % 2, 7e-9, 0)
    assert Scaling.fit(inputs, targets).constant.tolist() == [False, False, True] + [False] * 3


def test_unfolding_holds_a_constant_feature_at_its_training_value():
    inputs, targets = rows(constant=True)
    scaling = Scaling.fit(inputs, targets)
    raw = mlp(seed=3)  # takes raw features, and does look at the last one
    back = fold(unfold(raw, scaling), scaling)
    np.testing.assert_allclose(apply(back, inputs), apply(raw, inputs), rtol=1e-4, atol=1e-4)


def test_folding_keeps_float32_and_the_hidden_layers():
    model = mlp(3)
    folded = fold(model, Scaling.fit(*rows()))
    assert all(
        leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(eqx.filter(folded, eqx.is_array))
    )
    assert folded.layers[1].weight is model.layers[1].weight


def test_a_scaling_survives_json():
    scaling = Scaling.fit(*rows(constant=True))
    back = Scaling.from_dict(json.loads(json.dumps(scaling.as_dict())))
    for name in ("input_mean", "input_sd", "target_mean", "target_sd", "constant"):
        np.testing.assert_array_equal(getattr(back, name), getattr(scaling, name))


def test_a_broken_record_of_a_scaling_is_refused():
    record = Scaling.fit(*rows()).as_dict()
    with pytest.raises(InputError, match="without 'input_sd'"):
        Scaling.from_dict({key: value for key, value in record.items() if key != "input_sd"})
    with pytest.raises(InputError, match="different lengths"):
        Scaling.from_dict({**record, "input_sd": [1.0]})


def test_rows_that_cannot_be_scaled_are_refused():
    inputs, targets = rows()
    with pytest.raises(InputError, match="no rows"):
        Scaling.fit(inputs[:0], targets[:0])
    inputs[3, 2] = np.nan
    with pytest.raises(InputError, match="training inputs: 1 of 50 rows are not finite"):
        Scaling.fit(inputs, targets)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (eqx.nn.Linear(6, 4, key=jax.random.PRNGKey(0)), "needs an equinox.nn.MLP, not Linear"),
        (eqx.nn.MLP(6, 4, 8, 1, use_bias=False, key=jax.random.PRNGKey(0)), "with biases"),
        (
            eqx.nn.MLP(6, 4, 8, 1, final_activation=jax.nn.tanh, key=jax.random.PRNGKey(0)),
            "without a final activation",
        ),
        (eqx.nn.MLP(5, 4, 8, 1, key=jax.random.PRNGKey(0)), "5 inputs and 4 outputs"),
    ],
)
def test_what_cannot_be_folded_is_refused(model, reason):
    with pytest.raises(InputError, match=reason):
        fold(model, Scaling.fit(*rows()))


def test_a_folded_model_is_known_to_be_of_raw_space_as_long_as_it_lives():
    model = mlp()
    assert not is_raw_space(model)
    folded = fold(model, Scaling.fit(*rows()))
    assert is_raw_space(folded)
    assert not is_raw_space(model)
    from desisky_tune.models import raw_space

    gc.collect()  # what other tests left goes first
    known = len(raw_space._MARKED)
    del folded
    gc.collect()
    assert len(raw_space._MARKED) == known - 1


def test_a_mark_follows_the_first_array():
    model = mark_raw_space(mlp())
    assert is_raw_space(eqx.tree_at(lambda m: m.layers[-1].bias, model, jnp.zeros(4)))
    assert not is_raw_space(eqx.tree_at(lambda m: m.layers[0].weight, model, jnp.zeros((8, 6))))
