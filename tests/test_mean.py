"""The mean of several networks, as one network."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.inference.predictor import apply_model
from desisky_tune.models.broadband import make_broadbandMLP
from desisky_tune.models.mean import mean_model


def network(width: int, depth: int, seed: int, inputs: int = 6) -> Any:
    return make_broadbandMLP(
        in_size=inputs, out_size=4, width_size=width, depth=depth, key=jax.random.PRNGKey(seed)
    )


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=4, deadline=None)
def test_it_gives_the_mean_of_its_members(shapes: list[tuple[int, int]], seed: int) -> None:
    members = [network(*shape, seed + number) for number, shape in enumerate(shapes)]
    inputs = np.random.default_rng(seed).normal(size=(7, 6)).astype(np.float32)
    merged = mean_model(members)
    expected = np.mean([apply_model(member, inputs) for member in members], axis=0)
    np.testing.assert_allclose(apply_model(merged, inputs), expected, rtol=1e-5, atol=1e-5)
    assert merged.width_size == sum(width for width, _ in shapes)
    assert merged.depth == max(depth for _, depth in shapes)


@given(shares=st.lists(st.floats(0, 1), min_size=2, max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=4, deadline=None)
def test_members_may_count_differently(shares: list[float], seed: int) -> None:
    weights = (np.array(shares) + 1e-3) / (np.array(shares) + 1e-3).sum()
    members = [network(3 + at, 1 + at % 2, seed + at) for at in range(len(shares))]
    inputs = np.random.default_rng(seed).normal(size=(7, 6)).astype(np.float32)
    each = [apply_model(member, inputs) for member in members]
    merged = mean_model(members, list(weights))
    expected = np.average(each, axis=0, weights=weights)
    np.testing.assert_allclose(apply_model(merged, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.6], [0.5, 0.25, 0.25]])
def test_weights_that_make_no_mean_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="the mean of 2 models takes as many weights, of sum 1"):
        mean_model([network(4, 1, 0), network(4, 1, 1)], weights)


@pytest.mark.parametrize(
    "members", [[], [network(4, 0, 0), network(4, 1, 1)], [network(4, 1, 0), network(4, 1, 0, 5)]]
)
def test_what_has_no_mean_is_refused(members: list[Any]) -> None:
    with pytest.raises(ValueError, match="the mean of"):
        mean_model(members)
