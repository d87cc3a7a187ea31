"""A trial of several folds and seeds: pooled errors, rows kept apart, a resume by member."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.data.columns import BANDS, EXPOSURE_ID, FEATURES, NIGHT, TARGETS
from desisky_tune.data.features import FeatureTable
from desisky_tune.data.splits import make_split
from desisky_tune.errors import InputError
from desisky_tune.search.arrays import Fold, SearchArrays
from desisky_tune.search.backend import CURVE_SERIES, Assignment, Member
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.folds import members_of, run_folds, search_arrays
from desisky_tune.search.local import LocalBackend, state_path, sweep
from desisky_tune.search.origin import SearchRun
from desisky_tune.search.pooling import MemberCurve, pool
from desisky_tune.search.records import finish
from desisky_tune.search.sections import TrainingSpec
from desisky_tune.search.space import load_spec

TRAINING = TrainingSpec(epochs=8)
CONFIGURATION = {
    "width": 8,
    "depth": 1,
    "learning_rate": 1e-2,
    "huber_delta": 0.25,
    "batch_size": 16,
}
MEMBERS = members_of(folds=3, seeds=2, seed=5)


def residuals(draw: np.random.Generator, rows: int, epochs: int) -> np.ndarray:
    """Residuals (epoch, row, band) that shrink and grow again."""
    size = 0.3 + (np.arange(epochs) - draw.integers(0, epochs)) ** 2 / epochs**2
    return draw.normal(0, 1, (epochs, rows, len(BANDS))) * size[:, None, None]


def curve_of(member: Member, errors: np.ndarray) -> MemberCurve:
    """What a training would report of such residuals: RMSE by band, mean square as loss."""
    rmse = np.sqrt((errors**2).mean(axis=1))
    losses = (errors**2).mean(axis=(1, 2))
    series = {"train_loss": losses * 2, "test_loss": losses}
    series |= dict(zip(BANDS, rmse.T, strict=True))
    curve = {name: values.tolist() for name, values in series.items()}
    return MemberCurve(member, errors.shape[1], curve, rmse.mean(axis=1).tolist())


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seeds=st.integers(1, 3),
    epochs=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_pooled_figures_are_those_of_all_rows_together(
    seed: int, rows: list[int], seeds: int, epochs: int
) -> None:
    draw = np.random.default_rng(seed)
    errors = {
        Member(fold, which): residuals(draw, count, epochs)
        for which in range(seeds)
        for fold, count in enumerate(rows)
    }
    pooled = pool([curve_of(member, each) for member, each in errors.items()])
    lowest, at_best, best = [], [], []
    for which in range(seeds):
        together = np.concatenate(
            [each for member, each in errors.items() if member.seed == which], axis=1
        )
        by_band = np.sqrt(np.mean(together**2, axis=1))
        best.append(int(by_band.mean(axis=1).argmin()))
        at_best.append(by_band[best[-1]])
        lowest.append(by_band[best[-1]].mean())
    assert pooled.objective == pytest.approx(np.mean(lowest), rel=1e-12)
    assert list(pooled.best_epochs.values()) == best
    assert pooled.best_epoch in best
    np.testing.assert_allclose(
        [pooled.rmse[band] for band in BANDS], np.mean(at_best, axis=0), rtol=1e-12
    )
    assert min(pooled.objectives) == pytest.approx(pooled.objective, rel=1e-12)
    if seeds == 1:
        assert pooled.spread is None
    else:
        assert pooled.spread == pytest.approx(np.std(lowest, ddof=1), abs=1e-15)


def test_an_epoch_that_suits_each_fold_is_not_the_pools() -> None:
    # One fold is best at epoch 0, the other at epoch 2; together epoch 1 is best.
    curves = [
        curve_of(Member(0), np.array([0.1, 0.2, 0.9])[:, None, None] * np.ones((3, 5, 4))),
        curve_of(Member(1), np.array([0.9, 0.2, 0.1])[:, None, None] * np.ones((3, 5, 4))),
    ]
    pooled = pool(curves)
    assert pooled.best_epochs == {0: 1}
    assert pooled.objective == pytest.approx(0.2)
    assert pooled.objectives == pytest.approx([math.sqrt(0.41), 0.2, math.sqrt(0.41)])


def test_the_lowest_up_to_a_rung_is_the_objective_there() -> None:
    draw = np.random.default_rng(8)
    curves = [curve_of(Member(0, seed), residuals(draw, 6, 12)) for seed in range(3)]
    whole = pool(curves)
    for rung in (1, 5, 12):
        short = [
            MemberCurve(each.member, each.rows, each.curve, each.objectives[:rung])
            for each in curves
        ]
        assert min(whole.objectives[:rung]) == pytest.approx(pool(short).objective, rel=1e-12)


def table(nights: int = 12, rows: int = 60, seed: int = 3) -> FeatureTable:
    """Made-up exposures whose magnitudes are a smooth function of the features."""
    draw = np.random.default_rng(seed)
    features = draw.normal(50, 20, (rows, len(FEATURES)))
    targets = 20 + 0.02 * features[:, : len(TARGETS)] + draw.normal(0, 0.05, (rows, len(TARGETS)))
    frame = pd.DataFrame(
        {
            EXPOSURE_ID: np.arange(rows) + 100,
            NIGHT: 20210101 + np.sort(draw.integers(0, nights, rows)),
            **dict(zip(FEATURES, features.T, strict=True)),
            **dict(zip(TARGETS, targets.T, strict=True)),
        }
    )
    return FeatureTable(frame, {"v_derived": False, "fingerprint": "made up"})


def run_of(rows: FeatureTable, *overrides: str) -> SearchRun:
    spec = load_spec("quick", overrides)
    return SearchRun(RunFolder(Path("nowhere")), spec, rows, make_split(rows.frame, seed=1))


@pytest.fixture(scope="module")
def arrays() -> SearchArrays:
    return search_arrays(run_of(table(), "evaluation.folds=3"))


def trial(**changes: Any) -> Assignment:
    members = changes.pop("members", MEMBERS)
    return Assignment(3, {**CONFIGURATION, **changes}, seed=5, members=members)


@given(seed=st.integers(0, 2**31), nights=st.integers(8, 20), folds=st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_folds_share_no_night_and_hold_no_test_row(seed: int, nights: int, folds: int) -> None:
    run = run_of(table(nights, 80, seed % 1000), f"split.seed={seed % 1000}")
    night = run.table.frame[NIGHT].to_numpy()
    validated = []
    for train, validation in run_folds(run, folds):
        assert not set(night[train]) & set(night[validation])
        assert not set(night[run.split.test]) & set(night[np.union1d(train, validation)])
        validated.append(validation)
    together = np.sort(np.concatenate(validated))
    np.testing.assert_array_equal(together, np.union1d(run.split.train, run.split.validation))


@pytest.mark.parametrize("folds", [1, 3])
def test_test_rows_cannot_be_reached(folds: int, tmp_path: Path) -> None:
    """Test rows of NaN: the backend refuses a value that is not finite wherever it sees one."""
    poisoned = table()
    split = make_split(poisoned.frame, seed=1)
    columns = [poisoned.frame.columns.get_loc(name) for name in (*FEATURES, *TARGETS)]
    poisoned.frame.iloc[split.test, columns] = np.nan
    clean = search_arrays(run_of(table(), f"evaluation.folds={folds}"))
    searched = search_arrays(run_of(poisoned, f"evaluation.folds={folds}"))
    np.testing.assert_array_equal(searched.inputs, clean.inputs)
    assert np.isfinite(searched.targets).all()
    members = members_of(folds, 1, 5)
    progress = LocalBackend(searched, TRAINING, tmp_path).advance(trial(members=members), 8)
    assert not progress.failed


def test_a_row_in_both_parts_of_a_fold_is_refused() -> None:
    with pytest.raises(InputError, match="fold 0: 2 rows are to be trained and measured on, row 3"):
        SearchArrays.from_folds(table(), [(np.arange(5), np.arange(3, 8))])


def test_members_of_one_training_are_none() -> None:
    assert members_of(1, 1, 7) == ()
    assert members_of(2, 2, 7) == (Member(0, 7), Member(1, 7), Member(0, 8), Member(1, 8))


def test_members_are_the_trainings_alone(arrays: SearchArrays, tmp_path: Path) -> None:
    """Each fold is scaled by its own training rows, and trained as if there were no other."""
    progress = LocalBackend(arrays, TRAINING, tmp_path / "all").advance(trial(), 8)
    curves = []
    for member in MEMBERS:
        alone = SearchArrays(arrays.inputs, arrays.targets, (arrays.folds[member.fold],))
        single = Assignment(0, CONFIGURATION, member.seed)
        one = LocalBackend(alone, TRAINING, tmp_path / repr(member)).advance(single, 8)
        rows = len(arrays.folds[member.fold].validation)
        curves.append(MemberCurve(member, rows, one.curve, one.objectives))
    expected = pool(curves)
    assert progress.objective == expected.objective
    assert progress.objectives == expected.objectives
    assert progress.curve == expected.curve
    assert progress.best_epoch == expected.best_epoch
    assert progress.spread == expected.spread
    assert set(progress.curve) == set(CURVE_SERIES)


def test_a_trial_cut_off_between_its_members_goes_on_bit_for_bit(
    arrays: SearchArrays, tmp_path: Path
) -> None:
    whole = LocalBackend(arrays, TRAINING, tmp_path / "whole").advance(trial(), 8)
    LocalBackend(arrays, TRAINING, tmp_path / "cut").advance(trial(), 3)
    LocalBackend(arrays, TRAINING, tmp_path / "cut").advance(trial(members=MEMBERS[:2]), 8)
    between = LocalBackend(arrays, TRAINING, tmp_path / "cut").advance(trial(), 3)
    assert between.epochs == 3
    resumed = LocalBackend(arrays, TRAINING, tmp_path / "cut").advance(trial(), 8)
    assert resumed.curve == whole.curve
    assert resumed.objective == whole.objective


def test_one_diverging_member_fails_its_trial(arrays: SearchArrays, tmp_path: Path) -> None:
    backend = LocalBackend(arrays, TRAINING, tmp_path)
    progress = backend.advance(trial(learning_rate=1e30), 8)
    assert progress.failed
    assert "diverged" in str(progress.reason)
    assert "(fold 0, seed 5)" in str(progress.reason)


def test_the_states_of_a_finished_trials_members_are_removed(
    arrays: SearchArrays, tmp_path: Path
) -> None:
    backend = LocalBackend(arrays, TRAINING, tmp_path)
    progress = backend.advance(trial(), 8)
    backend.release(trial())
    assert state_path(tmp_path, 3, MEMBERS[-1]).exists()
    record = finish(
        number=3, configuration=CONFIGURATION, result=progress.as_result(), max_epochs=8
    )
    sweep(tmp_path, [record])
    assert list(tmp_path.iterdir()) == []


def test_a_single_split_is_one_fold() -> None:
    rows = table()
    split = make_split(rows.frame, seed=1)
    one = SearchArrays.from_table(rows, split.train, split.validation)
    inputs, targets = rows.arrays(split.train)
    np.testing.assert_array_equal(one.training_rows()[0], inputs)
    np.testing.assert_array_equal(one.training_rows()[1], targets)
    assert len(one.folds) == 1
    assert isinstance(one.folds[0], Fold)
