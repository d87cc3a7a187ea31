"""Metrics against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from desisky_tune.training.metrics import (
    NMAD_SCALE,
    OUTLIER_MAG,
    band_metrics,
    band_rmse,
    objective,
)


def test_rmse_of_a_three_four_five_triangle():
    target = np.zeros((2, 4))
    pred = np.array([[3, 0, 1, -1], [4, 0, 1, 1]], float)
    np.testing.assert_allclose(band_rmse(pred, target), [np.sqrt(12.5), 0, 1, 1])
    assert objective(pred, target) == pytest.approx((np.sqrt(12.5) + 2) / 4)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.floats(-2, 2), st.integers(0, 2**32 - 1))
def test_rmse_squared_is_variance_plus_bias_squared(rows, shift, seed):
    random = np.random.default_rng(seed)
    pred, target = random.normal(20 + shift, 1, (rows, 4)), random.normal(20, 1, (rows, 4))
    for band, figures in zip("Vgrz", band_metrics(pred, target).values(), strict=True):
        column = "Vgrz".index(band)
        spread = np.var(pred[:, column] - target[:, column])
        assert figures["rmse"] ** 2 == pytest.approx(spread + figures["bias"] ** 2)


def test_bias_is_prediction_minus_observation():
    figures = band_metrics(np.full((5, 4), 20.1), np.full((5, 4), 20.0))
    assert list(figures) == ["V", "g", "r", "z"]
    assert figures["g"]["bias"] == pytest.approx(0.1)
    assert figures["g"]["nmad"] == pytest.approx(0.0)
    assert figures["g"]["n"] == 5


def test_nmad_of_normal_residuals_is_their_standard_deviation():
    quantiles = norm.ppf((np.arange(100_001) + 0.5) / 100_001)
    residual = np.repeat(0.3 * quantiles[:, None], 4, axis=1)
    figures = band_metrics(residual + 5, np.full_like(residual, 5.0))
    assert figures["z"]["nmad"] == pytest.approx(0.3, rel=1e-4)
    assert pytest.approx(1 / norm.ppf(0.75)) == NMAD_SCALE


def test_outliers_are_beyond_0_4_mag_on_either_side():
    assert OUTLIER_MAG == 0.4
    residual = np.array([0.41, -0.41, 0.39, -0.39, 0.0])
    figures = band_metrics(np.repeat(residual[:, None], 4, axis=1), np.zeros((5, 4)))
    assert figures["V"]["outlier_fraction"] == pytest.approx(0.4)


def test_no_rows_give_nan_and_no_warning():
    figures = band_metrics(np.empty((0, 4)), np.empty((0, 4)))
    assert figures["r"]["n"] == 0
    assert all(np.isnan(figures["r"][name]) for name in ("rmse", "bias", "nmad"))


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\) and targets of shape \(2, 4\)"):
        band_rmse(np.zeros((3, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="3 bands"):
        band_metrics(np.zeros((2, 3)), np.zeros((2, 3)))
