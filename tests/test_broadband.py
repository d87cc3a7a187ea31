"""The MLP and the order of its inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.data.columns import FEATURES
from desisky_tune.errors import CheckpointError
from desisky_tune.models import make_broadbandMLP, permute_inputs
from desisky_tune.models.broadband import mlp_of_layers, on_device

INPUTS = np.linspace(-1.0, 1.0, 6, dtype=np.float32)


@pytest.fixture(scope="module")
def model() -> eqx.nn.MLP:
    return make_broadbandMLP(in_size=6, out_size=4, width_size=16, depth=2)


def test_is_the_plain_equinox_mlp_with_the_same_key() -> None:
    key = jax.random.PRNGKey(7)
    ours = make_broadbandMLP(in_size=6, out_size=4, width_size=16, depth=2, key=key)
    plain = eqx.nn.MLP(6, 4, 16, 2, key=key)
    assert eqx.tree_equal(ours, plain)


def test_is_relu_between_affine_layers_and_nothing_after_the_last(model: eqx.nn.MLP) -> None:
    hidden = INPUTS.astype(np.float64)
    for layer in model.layers[:-1]:
        hidden = np.maximum(np.asarray(layer.weight, float) @ hidden + np.asarray(layer.bias), 0)
    last = model.layers[-1]
    expected = np.asarray(last.weight, float) @ hidden + np.asarray(last.bias)
    np.testing.assert_allclose(model(INPUTS), expected, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(FEATURES))
def test_permuted_model_gives_the_same_for_permuted_inputs(order: list[str]) -> None:
    model = make_broadbandMLP(in_size=6, out_size=4, width_size=8, depth=1)
    by_name = dict(zip(FEATURES, INPUTS, strict=True))
    permuted = permute_inputs(model, FEATURES, order)
    inputs = np.array([by_name[name] for name in order])
    np.testing.assert_allclose(permuted(inputs), model(INPUTS), atol=1e-6)
    back = permute_inputs(permuted, order, FEATURES)
    assert eqx.tree_equal(back, model)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((*FEATURES[:5], "SUNALT"), "unknown SUNALT"),
        (FEATURES[:5], "missing ECLIPSE_FRAC"),
        ((*FEATURES, FEATURES[0]), "inputs once each"),
    ],
)
def test_refuses_names_that_are_not_the_same(
    model: eqx.nn.MLP, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        permute_inputs(model, names, FEATURES)


def test_to_write_given_weights_takes_no_device(tmp_path: Path) -> None:
    """The driver of a search with GPUs must leave their memory to the engines."""
    script = """
import sys
import numpy as np
from desisky_tune.io import checkpoint_meta, save
from desisky_tune.models.broadband import mlp_of_layers
from jax._src import xla_bridge

layers = [(np.ones((8, 6), np.float32), np.ones(8, np.float32)),
          (np.ones((4, 8), np.float32), np.ones(4, np.float32))]
model = mlp_of_layers(layers)
save(sys.argv[1], model, checkpoint_meta(model, features=None))
assert not xla_bridge.backends_are_initialized()
"""
    path = tmp_path / "given.eqx"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert path.exists()


@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 5),
    width=st.integers(1, 40),
    depth=st.integers(0, 4),
)
@settings(max_examples=30, deadline=None)
def test_an_mlp_of_given_layers_is_the_one_that_equinox_makes(
    inputs: int, outputs: int, width: int, depth: int
) -> None:
    """Leaf for leaf and field for field: nothing that looks at a model can tell them apart."""
    width = width if depth else outputs
    model = make_broadbandMLP(in_size=inputs, out_size=outputs, width_size=width, depth=depth)
    given = [(each.weight, each.bias) for each in model.layers]
    read = on_device([(np.asarray(weight), np.asarray(bias)) for weight, bias in given])
    for layers in (given, read):
        made = mlp_of_layers(layers)
        assert jax.tree.structure(made) == jax.tree.structure(model)
        assert eqx.tree_equal(made, model, typematch=True)
        row = jnp.linspace(-1, 1, inputs)
        np.testing.assert_array_equal(made(row), model(row))
        np.testing.assert_array_equal(eqx.filter_jit(made)(row), eqx.filter_jit(model)(row))
