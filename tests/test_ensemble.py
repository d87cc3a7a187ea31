"""An ensemble's spread, calibrated; its folder, read back or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from desisky_tune.data.columns import BANDS, FEATURES
from desisky_tune.errors import CheckpointError, MissingFileError
from desisky_tune.inference import EnsemblePredictor, load_predictor
from desisky_tune.inference.ensemble import (
    HALF_WIDTHS,
    SIGMAS,
    Calibration,
    coverage_by_fold,
    mean_of,
    quantile_by_night,
    scatter_of,
)
from desisky_tune.io import checkpoint_meta, save
from desisky_tune.models import make_broadbandMLP


def drawn(rows: int, seed: int, shared: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Residuals and scatters of members that err alike by `shared` mag, and each by its own."""
    draw = np.random.default_rng(seed)
    scatter = draw.uniform(0.02, 0.3, (rows, 4))
    return draw.normal(0, np.sqrt(shared**2 + scatter**2)), scatter


def test_calibration_finds_the_error_that_all_members_share() -> None:
    residual, scatter = drawn(20_000, seed=1)
    calibration = Calibration.fit(residual, scatter, np.arange(20_000))
    np.testing.assert_allclose(calibration.floor, 0.2, rtol=0.03)
    np.testing.assert_array_equal(calibration.factor, 1.0)
    # Half a 90 % interval of a normal distribution is 1.6449 standard deviations.
    np.testing.assert_allclose(calibration.quantile_90, 1.6449, rtol=0.02)
    sigma = calibration.sigma(scatter)
    np.testing.assert_allclose((sigma**2).mean(axis=0), (residual**2).mean(axis=0), rtol=1e-12)


def test_members_that_scatter_more_than_they_err_are_scaled_down() -> None:
    residual, scatter = drawn(20_000, seed=2, shared=0.0)
    calibration = Calibration.fit(0.5 * residual, scatter, np.arange(20_000))
    np.testing.assert_array_equal(calibration.floor, 0.0)
    np.testing.assert_allclose(calibration.factor, 0.5, rtol=0.03)


def test_the_interval_covers_what_it_says_on_new_rows() -> None:
    calibration = Calibration.fit(*drawn(400, seed=3), np.arange(400))
    covered = calibration.covered_90(*drawn(20_000, seed=4)).mean(axis=0)
    # The share on 400 rows has a standard deviation of sqrt(0.9 x 0.1 / 400) = 0.015.
    np.testing.assert_allclose(covered, 0.9, atol=0.05)
    residual, scatter = drawn(2000, seed=5)
    by_fold = coverage_by_fold(residual, scatter, np.arange(2000) % 5, np.arange(2000))
    for band in BANDS:
        assert by_fold[band] == pytest.approx(0.9, abs=0.03)
    assert math.isnan(coverage_by_fold(residual, scatter, np.zeros(2000), np.arange(2000))["g"])


def test_with_a_night_a_row_the_quantile_is_that_of_split_conformal_prediction() -> None:
    values = np.random.default_rng(8).normal(size=(57, 3))
    # The ceil(0.9 (n + 1))-th smallest (Lei et al. 2018, section 2.2).
    expected = np.sort(values, axis=0)[math.ceil(0.9 * 58) - 1]
    np.testing.assert_array_equal(quantile_by_night(values, np.arange(57), 0.9), expected)


@given(nights=st.integers(1, 40), rows=st.integers(1, 9), more=st.integers(2, 5))
def test_more_exposures_of_the_same_nights_promise_no_more(
    nights: int, rows: int, more: int
) -> None:
    values = np.random.default_rng(nights).normal(size=(nights * rows, 2))
    night = np.repeat(np.arange(nights), rows)
    once = quantile_by_night(values, night, 0.9)
    often = quantile_by_night(np.repeat(values, more, axis=0), np.repeat(night, more), 0.9)
    np.testing.assert_array_equal(once, often)


def test_too_few_nights_promise_nothing_and_give_the_largest() -> None:
    values = np.random.default_rng(10).normal(size=(80, 2))
    largest = quantile_by_night(values, np.arange(80) % 8, 0.9)
    np.testing.assert_array_equal(largest, values.max(axis=0))


def test_another_night_is_covered_as_promised() -> None:
    """Exposures of a night err alike: 26 nights, the 27th held against them, many times over."""
    draw = np.random.default_rng(11)
    night = np.repeat(np.arange(27), 12)
    known = night < 26
    covered = []
    for _ in range(400):
        errors = np.abs(draw.normal(size=27)[night] + 0.5 * draw.normal(size=27 * 12))[:, None]
        limit = quantile_by_night(errors[known], night[known], 0.9)
        covered.append((errors[~known] <= limit).mean())
    # At least 90 %; at most two weights of a night more: that at infinity, and a step's. Within
    # five standard errors of the mean.
    error = np.std(covered) / math.sqrt(len(covered))
    assert 0.9 - 5 * error < np.mean(covered) < 0.9 + 2 / 27 + 5 * error


def test_scatter_is_none_where_one_member_has_all_the_weight() -> None:
    predictions = np.random.default_rng(0).normal(size=(3, 5, 4))
    np.testing.assert_array_equal(scatter_of(predictions, [0.0, 1.0, 0.0]), np.zeros((5, 4)))
    by_row = np.full((3, 5), 1 / 3)
    by_row[:, 2] = [1, 0, 0]
    scatter = scatter_of(predictions, by_row)
    np.testing.assert_array_equal(scatter[2], np.zeros(4))
    assert (scatter[[0, 1, 3, 4]] > 0).all()


def test_scatter_of_one_member_is_none() -> None:
    predictions = np.random.default_rng(6).normal(20, 1, (3, 5, 4))
    np.testing.assert_array_equal(scatter_of(predictions[:1]), np.zeros((5, 4)))
    expected = np.sqrt(((predictions - predictions.mean(axis=0)) ** 2).sum(axis=0) / 2)
    np.testing.assert_allclose(scatter_of(predictions), expected)


@given(seed=st.integers(0, 1000), members=st.integers(2, 6))
def test_equal_weights_are_none_and_a_repeated_member_counts_twice(seed: int, members: int) -> None:
    draw = np.random.default_rng(seed)
    predictions = draw.normal(20, 1, (members, 5, 4))
    alike = np.full(members, 1 / members)
    np.testing.assert_allclose(mean_of(predictions, alike), mean_of(predictions))
    np.testing.assert_allclose(scatter_of(predictions, alike), scatter_of(predictions))
    by_row = np.repeat(alike[:, None], 5, axis=1)
    np.testing.assert_allclose(scatter_of(predictions, by_row), scatter_of(predictions))
    twice = np.concatenate([predictions, predictions[:1]])
    double = np.array([2.0, *np.ones(members - 1)]) / (members + 1)
    np.testing.assert_allclose(mean_of(predictions, double), mean_of(twice))


def test_the_weighted_scatter_is_unbiased() -> None:
    """Members that scatter by 1 about what they should say: so does the weighted estimate."""
    predictions = np.random.default_rng(3).normal(20, 1, (5, 20_000, 4))
    scatter = scatter_of(predictions, [0.5, 0.2, 0.1, 0.1, 0.1])
    assert (scatter**2).mean() == pytest.approx(1, abs=0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two members and an index."""
    names = []
    for seed in range(2):
        model = make_broadbandMLP(
            in_size=6, out_size=4, width_size=8, depth=1, key=jax.random.PRNGKey(seed)
        )
        names.append(f"{seed}.eqx")
        save(tmp_path / names[-1], model, checkpoint_meta(model, features=FEATURES))
    calibration = {"floor": [0.1] * 4, "factor": [1.0] * 4, "quantile_90": [2.0] * 4}
    content = {"kind": "desisky_tune ensemble", "schema": 1, "members": names}
    index = {**content, "calibration": calibration, "meta": {"features": list(FEATURES)}}
    (tmp_path / "ensemble.json").write_text(json.dumps(index))
    return tmp_path


def test_a_folder_and_its_index_are_one_ensemble(folder: Path) -> None:
    frame = pd.DataFrame(np.random.default_rng(7).normal(1, 1, (5, 6)), columns=list(FEATURES))
    frame.loc[2, "MOONSEP"] = np.nan
    members = np.stack([load_predictor(folder / f"{n}.eqx").predict(frame) for n in range(2)])
    for path in (folder, folder / "ensemble.json"):
        predictor = load_predictor(path)
        assert isinstance(predictor, EnsemblePredictor)
        np.testing.assert_array_equal(predictor.predict(frame), members.mean(axis=0))
        columns = predictor.extra_columns(frame)
        sigma = np.sqrt(0.1**2 + members.std(axis=0, ddof=1) ** 2)
        np.testing.assert_allclose(np.stack([columns[name] for name in SIGMAS], 1), sigma)
        half = np.stack([columns[name] for name in HALF_WIDTHS], 1)
        np.testing.assert_allclose(half, 2 * sigma)
        assert np.isnan(half[2]).all()


def test_members_may_count_differently(folder: Path) -> None:
    frame = pd.DataFrame(np.random.default_rng(7).normal(1, 1, (5, 6)), columns=list(FEATURES))
    members = np.stack([load_predictor(folder / f"{n}.eqx").predict(frame) for n in range(2)])
    index = json.loads((folder / "ensemble.json").read_text())
    (folder / "ensemble.json").write_text(json.dumps({**index, "weights": [0.25, 0.75]}))
    predictor = load_predictor(folder)
    expected = np.average(members, axis=0, weights=[0.25, 0.75])
    np.testing.assert_allclose(predictor.predict(frame), expected)
    assert isinstance(predictor, EnsemblePredictor)
    # Of two members: 0.25 x 0.75 of their distance squared, over 1 - 0.25^2 - 0.75^2.
    variance = 0.1875 / 0.375 * (members[0] - members[1]) ** 2
    np.testing.assert_allclose(predictor.sigma(frame), np.sqrt(0.1**2 + variance))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "list", "is no index of an ensemble"),
        ("schema", 2, "schema 2; known: 1"),
        ("members", [], "at least one"),
        ("members", ["../elsewhere.eqx"], "names of files beside it"),
        ("weights", [0.5], "weights must be 2 positive numbers of sum 1"),
        ("weights", [0.5, 0.6], "weights must be 2 positive numbers of sum 1"),
        ("weights", [1.5, -0.5], "weights must be 2 positive numbers of sum 1"),
        ("weights", ["0.5", 0.5], "weights must be 2 positive numbers of sum 1"),
        ("calibration", {"floor": [0.1] * 4}, "calibration: 'factor'"),
        ("calibration", None, "calibration"),
    ],
)
def test_an_index_that_cannot_be_trusted_is_refused(
    folder: Path, key: str, value: object, message: str
) -> None:
    index = json.loads((folder / "ensemble.json").read_text())
    (folder / "ensemble.json").write_text(json.dumps({**index, key: value}))
    with pytest.raises(CheckpointError, match=message):
        load_predictor(folder)


def test_a_missing_index_or_member_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "1.eqx").unlink()
    with pytest.raises(MissingFileError, match=r"1\.eqx"):
        load_predictor(folder)
    (folder / "ensemble.json").unlink()
    with pytest.raises(MissingFileError, match=r"ensemble\.json"):
        load_predictor(folder)
