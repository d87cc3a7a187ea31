"""The classical model's voice in a committee: its weight, and the network that speaks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.data.columns import BANDS, FEATURES
from desisky_tune.data.features import FeatureTable, load_features
from desisky_tune.data.splits import make_split
from desisky_tune.inference import Predictor
from desisky_tune.models.classical import ClassicalModel
from desisky_tune.search.classical_voice import (
    DRAWS,
    LIMITS,
    LOWEST,
    MARGIN,
    Voice,
    classical_out_of_fold,
    hear_classical,
    imitate,
    make_conditions,
    share_of,
)
from desisky_tune.search.finalists import OutOfFold
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.origin import SearchRun, write_run
from desisky_tune.search.space import load_spec
from desisky_tune.search.standing import rank

TRUTH = ClassicalModel(
    colour=(0.1, 0.0, 0.2, 0.4),
    dark=(21.4, 21.9, 21.2, 19.5),
    cloud=(-1.7, -1.1, -2.2, -3.0),
)


def unseen(residual: np.ndarray, fold: np.ndarray | None = None) -> OutOfFold:
    """Predictions that miss by `residual` (n, 4)."""
    observed = np.full(residual.shape, 20.0)
    rows = np.arange(len(residual))
    folds = np.zeros(len(rows), dtype=int) if fold is None else fold
    return OutOfFold(rows, folds, observed[None] + residual, observed)


def a_run(tmp_path: Path, *overrides: str, physics: bool = False) -> SearchRun:
    """A run on the shipped exposures; with `physics` the magnitudes are the formula's."""
    spec = load_spec("quick", ("evaluation.finalist_folds=3", *overrides))
    table = load_features(subset=spec.data.subset)
    if physics:
        frame = table.frame.copy()
        names = [f"SKY_MAG_{band.upper()}_SPEC" for band in BANDS]
        frame[names] = TRUTH.predict(frame)
        table = FeatureTable(frame, table.provenance)
    folder = RunFolder.create(tmp_path, "run", exact=True)
    run = SearchRun(folder, spec, table, make_split(table.frame))
    write_run(run)
    return run


# --- the share -----------------------------------------------------------------------------------


@given(
    first=st.floats(0.1, 1), second=st.floats(0.1, 1), common=st.floats(0, 0.5), seed=st.integers(0)
)
@settings(max_examples=20, deadline=None)
def test_of_many_nights_the_share_is_that_of_the_least_variance(
    first: float, second: float, common: float, seed: int
) -> None:
    """Of errors that have a part in common the rest alone decides: s1^2 / (s1^2 + s2^2)."""
    draw = np.random.default_rng(seed)
    shared, one, other = (draw.standard_normal((8000, 4)) for _ in range(3))
    networks = unseen(common * shared + first * one)
    classical = unseen(common * shared + second * other)
    expected = first**2 / (first**2 + second**2)
    share = share_of(networks, classical, np.arange(8000) // 20)
    # Within one standard error, which is small here, and towards a half.
    assert share == pytest.approx(expected, abs=0.1)
    assert abs(share - 0.5) <= abs(expected - 0.5) + 0.03


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 4), count=st.integers(2, 30))
@settings(max_examples=30, deadline=None)
def test_it_is_the_nearest_to_a_half_within_one_standard_error(
    seed: int, scale: float, count: int
) -> None:
    """By the ranking of the finalists, which has the standard error of a difference too."""
    draw = np.random.default_rng(seed)
    nights = draw.integers(0, count, 60)
    networks = unseen(draw.standard_normal((60, 4)))
    classical = unseen(scale * draw.standard_normal((60, 4)) + 0.3 * draw.standard_normal(4))
    share = share_of(networks, classical, nights)

    def squared(percent: int) -> np.ndarray:
        weight = percent / 100
        mean = (1 - weight) * networks.predictions + weight * classical.predictions
        return np.asarray((mean - networks.observed) ** 2)

    alike = dict.fromkeys(range(101), 1)
    standings = rank({at: squared(at) for at in range(101)}, nights, alike, draws=DRAWS)
    tied = [each.number for each in standings if each.tied]
    assert round(100 * share) == min(tied, key=lambda at: (abs(at - 50), at))


def test_what_says_the_same_counts_alike() -> None:
    same = unseen(np.random.default_rng(0).standard_normal((30, 4)))
    assert share_of(same, same, np.arange(30)) == 0.5


def test_one_night_settles_nothing() -> None:
    draw = np.random.default_rng(1)
    networks, classical = (unseen(draw.standard_normal((30, 4))) for _ in range(2))
    assert share_of(networks, classical, np.zeros(30)) == 0.5
    two = share_of(networks, unseen(9 * np.ones((30, 4))), np.arange(30) % 2)
    assert two < 0.2


def test_each_row_is_predicted_with_a_share_that_its_fold_did_not_find() -> None:
    fold = np.array([0, 1, 0, 1])
    networks, classical = unseen(np.zeros((4, 4)), fold), unseen(np.ones((4, 4)), fold)
    together = Voice(0.5, (0.25, 0.75), classical).among(networks)
    np.testing.assert_allclose(together.predictions[0, :, 0] - 20.0, [0.25, 0.75, 0.25, 0.75])
    np.testing.assert_array_equal(together.fold, fold)


def test_it_is_silent_where_networks_know_all(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    classical = classical_out_of_fold(run)
    perfect = OutOfFold(
        classical.rows, classical.fold, classical.observed[None], classical.observed
    )
    assert hear_classical(run, perfect) is None


def test_it_alone_is_heard_where_it_knows_all(tmp_path: Path) -> None:
    run = a_run(tmp_path, physics=True)
    classical = classical_out_of_fold(run)
    np.testing.assert_allclose(classical.predictions[0], classical.observed, atol=0.02)
    ignorant = OutOfFold(
        classical.rows,
        classical.fold,
        np.full_like(classical.predictions, 20.0),
        classical.observed,
    )
    voice = hear_classical(run, ignorant)
    assert voice is not None
    assert voice.share > 0.97
    assert min(voice.by_fold) > 0.97


def test_it_has_no_voice_that_no_network_can_give_it(tmp_path: Path) -> None:
    """With and without a Moon the formula is a step at the horizon, which a network smooths."""
    run = a_run(tmp_path, "data.subset=all", physics=True)
    classical = classical_out_of_fold(run)
    ignorant = np.full_like(classical.predictions, 20.0)
    networks = OutOfFold(classical.rows, classical.fold, ignorant, classical.observed)
    nights = run.table.frame["NIGHT"].to_numpy()[classical.rows]
    assert share_of(networks, classical, nights) > 0.9
    assert hear_classical(run, networks) is None


def test_its_predictions_are_of_fits_to_the_other_folds(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    found = classical_out_of_fold(run)
    targets = [f"SKY_MAG_{band.upper()}_SPEC" for band in BANDS]
    assert sorted(found.rows) == sorted([*run.split.train, *run.split.validation])
    for fold in range(3):
        own = found.rows[found.fold == fold]
        others = run.table.frame.iloc[found.rows[found.fold != fold]]
        fit = ClassicalModel.fit(others, others[targets].to_numpy(dtype=float))
        expected = fit.predict(run.table.frame.iloc[own])
        np.testing.assert_allclose(found.predictions[0][found.fold == fold], expected, atol=1e-6)


@pytest.mark.parametrize(
    "override",
    ["evaluation.classical=false", "data.features=[MOONSEP, OBSALT, MOONALT, TRANSPARENCY_GFA]"],
)
def test_it_is_not_asked_where_it_cannot_or_shall_not_speak(override: str, tmp_path: Path) -> None:
    run = a_run(tmp_path, override)
    assert hear_classical(run, unseen(np.ones((6, 4)))) is None


# --- the network ---------------------------------------------------------------------------------


def conditions(rows: int, seed: int, eclipses: bool = True) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "MOONFRAC": draw.uniform(0.5, 1.0, rows),
            "MOONSEP": draw.uniform(31, 90, rows),
            "MOONALT": draw.uniform(5, 80, rows),
            "OBSALT": draw.uniform(31, 90, rows),
            "TRANSPARENCY_GFA": draw.uniform(0.3, 1.05, rows),
            "ECLIPSE_FRAC": draw.uniform(0, 0.5, rows) * eclipses,
        }
    )


@pytest.mark.parametrize("features", [FEATURES, FEATURES[::-1]], ids=["as ever", "reversed"])
def test_the_network_says_what_the_formula_says(features: tuple[str, ...]) -> None:
    made = imitate(TRUTH, conditions(300, 0), features, seed=1)
    others = conditions(1000, 7)
    difference = Predictor(made.network, features).predict(others) - TRUTH.predict(others)
    rmse = np.sqrt(np.mean(difference**2, axis=0))
    assert rmse.max() < 0.03
    own = Predictor(made.network, features).predict(conditions(300, 0))
    distance = np.sqrt(np.mean((own - TRUTH.predict(conditions(300, 0))) ** 2, axis=0))
    np.testing.assert_allclose([made.rmse[band] for band in BANDS], distance, rtol=1e-4)


def test_the_network_does_not_look_at_what_never_changed() -> None:
    made = imitate(TRUTH, conditions(300, 0, eclipses=False), FEATURES, seed=1)
    others = conditions(50, 3, eclipses=False)
    predict = Predictor(made.network).predict
    np.testing.assert_allclose(predict(others.assign(ECLIPSE_FRAC=0.7)), predict(others), atol=1e-4)


@given(seed=st.integers(0, 1000), lowest=st.floats(0.01, 30), spread=st.floats(0.5, 60))
@settings(max_examples=20, deadline=None)
def test_conditions_stay_near_what_was_seen(seed: int, lowest: float, spread: float) -> None:
    draw = np.random.default_rng(seed)
    frame: Any = pd.DataFrame(
        {
            "MOONSEP": lowest + spread * draw.uniform(size=40),
            "MOONFRAC": draw.uniform(0.9, 1.0, 40),
            "ECLIPSE_FRAC": np.zeros(40),
        }
    )
    made = make_conditions(frame, tuple(frame.columns), 2000, draw)
    assert made.shape == (2000, 3)
    for column, (name, values) in zip(made.T, frame.items(), strict=True):
        width = np.ptp(values)
        low = max(values.min() - MARGIN * width, LOWEST * values.min(), LIMITS[name][0])
        assert column.min() >= low - 1e-12
        assert column.max() <= min(values.max() + MARGIN * width, LIMITS[name][1]) + 1e-12
    assert np.ptp(made[:, 2]) == 0
    # All of the range is filled, its margin too.
    assert made[:, 0].max() > frame["MOONSEP"].max()
