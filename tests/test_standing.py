"""Figures over nights, and which finalist is taken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from desisky_tune.errors import InputError
from desisky_tune.inference.bootstrap import interval, night_weights, resampled_rmse
from desisky_tune.search.accuracy import difference, figures_of, intervals_of
from desisky_tune.search.standing import objective_of, rank


def test_nights_are_drawn_whole() -> None:
    nights = np.array([5, 5, 7, 7, 7, 9])
    weights = night_weights(nights, draws=50).by_row
    for night in np.unique(nights):
        assert (np.ptp(weights[:, nights == night], axis=1) == 0).all()
    of_each = np.stack([weights[:, np.argmax(nights == night)] for night in np.unique(nights)])
    assert (of_each.sum(axis=0) == 3).all()


def test_the_error_of_a_mean_square_is_the_textbook_one() -> None:
    """With as many rows in each night the mean square is a plain mean over nights.

    The bootstrap variance of a mean of N values is exactly their population variance over
    N (Efron & Tibshirani 1993, eq. 6.7).
    """
    draw = np.random.default_rng(2)
    by_night = draw.gamma(2.0, 0.02, 40)
    nights = np.repeat(np.arange(40), 3)
    squared = by_night[nights][:, None]
    resampled = resampled_rmse(squared, night_weights(nights, draws=20_000))[:, 0] ** 2
    assert resampled.mean() == pytest.approx(by_night.mean(), rel=3e-3)
    assert resampled.std() == pytest.approx(by_night.std() / np.sqrt(40), rel=0.03)


@given(rows=st.integers(1, 30), nights=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_sums_by_night_are_weighted_rows(rows: int, nights: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    night, squared = draw.integers(0, nights, rows), draw.gamma(2.0, 0.1, (2, rows, 4))
    weights = night_weights(night, draws=30)
    by_row = weights.by_row[:, None, :, None]
    expected = np.sqrt((by_row * squared).sum(axis=2) / by_row.sum(axis=2))
    np.testing.assert_allclose(resampled_rmse(squared, weights), expected, rtol=1e-12)


def test_the_interval_is_scipys_where_every_night_is_one_row() -> None:
    squared = np.random.default_rng(4).gamma(2.0, 0.02, 60)
    mine = interval(resampled_rmse(squared[:, None], night_weights(np.arange(60), 20_000))[:, 0])
    theirs = stats.bootstrap(
        (squared,),
        lambda values, axis: np.sqrt(values.mean(axis=axis)),
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert mine[0] == pytest.approx(theirs.low, abs=0.05 * width)
    assert mine[1] == pytest.approx(theirs.high, abs=0.05 * width)


def test_rows_that_share_a_night_tell_less_than_rows_of_their_own() -> None:
    draw = np.random.default_rng(6)
    squared = np.repeat(draw.gamma(2.0, 0.02, 12), 10)[:, None]
    together = resampled_rmse(squared, night_weights(np.repeat(np.arange(12), 10)))
    apart = resampled_rmse(squared, night_weights(np.arange(120)))
    assert together.std() == pytest.approx(apart.std() * np.sqrt(10), rel=0.1)


def test_no_row_has_no_nights() -> None:
    with pytest.raises(InputError, match="no row"):
        night_weights(np.array([], dtype=int))


@given(seed=st.integers(0, 2**31), seeds=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_figures_are_the_mean_over_seeds_of_the_bands_rmse(seed: int, seeds: int) -> None:
    draw = np.random.default_rng(seed)
    residual = draw.normal(0, 0.3, (seeds, 9, 4))
    rmse = np.array([[np.sqrt(np.mean(r[:, b] ** 2)) for b in range(4)] for r in residual])
    figures = figures_of(residual**2)
    assert figures["V"] == pytest.approx(rmse[:, 0].mean())
    assert figures["mean"] == pytest.approx(rmse.mean()) == objective_of(residual**2)
    assert figures["mean_grz"] == pytest.approx(rmse[:, 1:].mean())
    if seeds == 1:
        assert figures_of(residual[0] ** 2) == pytest.approx(figures)


def test_intervals_hold_their_figures_and_differences_are_paired() -> None:
    draw = np.random.default_rng(7)
    nights = np.repeat(np.arange(15), 4)
    squared = draw.normal(0, 0.3, (60, 4)) ** 2
    figures = figures_of(squared)
    for name, (low, high) in intervals_of(squared, nights).items():
        assert low < figures[name] < high
    # Errors that are larger by one factor in every row: RMSE, and each resample's, scale.
    for name, paired in difference(1.21 * squared, squared, nights).items():
        assert paired["difference"] == pytest.approx(0.1 * figures[name])
        low, high = intervals_of(squared, nights)[name]
        assert paired["interval"] == pytest.approx([0.1 * low, 0.1 * high])


NIGHTS = np.repeat(np.arange(20), 5)


def errors(level: float, wobble: float = 0.0, seed: int = 0) -> np.ndarray:
    """Squared residuals (1 seed, 100 rows, 4 bands) of RMSE about `level`, by night."""
    by_night = 1 + wobble * np.random.default_rng(seed).standard_normal(20)
    return np.broadcast_to((level * by_night[NIGHTS])[None, :, None] ** 2, (1, 100, 4))


def test_the_simpler_of_two_that_tie_is_taken() -> None:
    squared = {10: errors(0.2, 0.3, seed=1), 11: errors(0.201, 0.3, seed=2), 12: errors(0.4)}
    standings = rank(squared, NIGHTS, {10: 5000, 11: 80, 12: 10})
    lowest = min(squared, key=lambda number: objective_of(squared[number]))
    by_number = {each.number: each for each in standings}
    assert by_number[10].tied
    assert by_number[11].tied
    assert not by_number[12].tied
    assert standings[0].number == 11
    assert by_number[lowest].difference == 0
    assert [each.number for each in standings][-1] == 12


def test_a_difference_that_every_night_shows_is_no_tie() -> None:
    """Both are uncertain by 0.02 mag, and yet one is better by 5 % in every single night."""
    squared = {10: errors(0.2, 0.5), 11: errors(0.21, 0.5)}
    standings = rank(squared, NIGHTS, {10: 5000, 11: 80})
    assert [each.number for each in standings] == [10, 11]
    assert standings[1].error > standings[1].difference
    assert not standings[1].tied


def test_equal_finalists_go_by_parameters_then_number() -> None:
    squared = {3: errors(0.2), 4: errors(0.2), 5: errors(0.2)}
    standings = rank(squared, NIGHTS, {3: 90, 4: 80, 5: 80})
    assert [each.number for each in standings] == [4, 5, 3]
    assert rank({}, NIGHTS, {}) == []
