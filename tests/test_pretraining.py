"""Transfer: what trainings begin with, and that everything else stays as it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from desisky_tune.data.columns import BANDS, FEATURES
from desisky_tune.errors import (
    DesiskyTuneError,
)
from desisky_tune.io import load_model, read_header
from desisky_tune.search.arrays import Fold, SearchArrays
from desisky_tune.search.backend import Assignment, Member, Progress
from desisky_tune.search.local import LocalBackend, checkpoint_path, member_path
from desisky_tune.search.pretraining import (
    PretrainedWeights,
    Pretraining,
)
from desisky_tune.search.slot_backend import SlotBackend
from desisky_tune.search.space import (
    PretrainSpec,
    TrainingSpec,
    default_configuration,
)
from desisky_tune.training.metrics import band_rmse
from desisky_tune.training.scaling import Scaling, fold

TRAINING = TrainingSpec(epochs=6)
#: So small that weights stay where they are: float32 cannot hold the change.
STANDSTILL = 1e-12
CONFIGURATION = {
    "width": 8,
    "depth": 2,
    "learning_rate": 1e-3,
    "huber_delta": 0.25,
    "batch_size": 16,
}


def rows(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes that are a smooth function of six features, on the features' usual scales."""
    draw = np.random.default_rng(seed)
    inputs = draw.normal(50, 20, (count, 6)).astype(np.float32)
    targets = 20 + 0.02 * inputs[:, :4] + draw.normal(0, 0.05, (count, 4))
    return inputs, targets.astype(np.float32)


@pytest.fixture(scope="module")
def arrays() -> SearchArrays:
    folds = (Fold(np.arange(40), np.arange(40, 60)), Fold(np.arange(25, 60), np.arange(25)))
    return SearchArrays(*rows(3), folds)


def a_pretraining(folder: Path, epochs: int = 5, rate: float = 1e-2) -> Pretraining:
    return Pretraining(
        folder=folder / "pretrained",
        features=FEATURES,
        settings=PretrainSpec(source="simulated", epochs=epochs, learning_rate=rate),
        loss="huber",
        note={"source": "simulated", "rows": 120},
        rows=SearchArrays(*rows(8, 120), (Fold(np.arange(100), np.arange(100, 120)),)),
    )


def trial(number: int = 3, **changes: Any) -> Assignment:
    return Assignment(number, {**CONFIGURATION, **changes}, seed=5)


def told(progress: Progress) -> Progress:
    """Leave out the time, which no two runs share."""
    return replace(progress, seconds=0.0)


def rmse_of(path: Path, arrays: SearchArrays, fold: int = 0) -> np.ndarray:
    """RMSE of a checkpoint on a fold's validation rows: raw features in, magnitudes out."""
    inputs, targets = arrays.validation_rows(fold)
    return band_rmse(np.asarray(jax.vmap(load_model("broadband", path=path)[0])(inputs)), targets)


# --- where a training begins --------------------------------------------------------------------


def test_before_any_epoch_a_training_predicts_what_its_weights_predict(
    arrays: SearchArrays, tmp_path: Path
) -> None:
    scaling = Scaling.fit(*arrays.training_rows())
    start = PretrainedWeights(a_pretraining(tmp_path)).initial_model(CONFIGURATION, 5, scaling)
    kept, meta = load_model("broadband", path=tmp_path / "pretrained" / "8x2-seed5.eqx")
    inputs, _ = arrays.validation_rows()
    np.testing.assert_allclose(
        jax.vmap(fold(start, scaling))(inputs), jax.vmap(kept)(inputs), atol=1e-4
    )
    assert meta["pretrain"] == {"source": "simulated", "rows": 120}


@pytest.mark.parametrize("kind", [LocalBackend, SlotBackend])
def test_a_training_that_stands_still_keeps_the_figures_of_its_weights(
    kind: Any, arrays: SearchArrays, tmp_path: Path
) -> None:
    more = {"slots": 2} if kind is SlotBackend else {}
    backend = kind(arrays, TRAINING, tmp_path, pretraining=a_pretraining(tmp_path), **more)
    members = (Member(0, 5), Member(1, 5))
    assignment = Assignment(4, {**CONFIGURATION, "learning_rate": STANDSTILL}, 5, members)
    backend.advance(assignment, 2)
    single = backend.advance(trial(learning_rate=STANDSTILL), 2)
    if kind is SlotBackend:
        backend.close()
    expected = rmse_of(tmp_path / "pretrained" / "8x2-seed5.eqx", arrays)
    for epoch in range(2):
        reached = [single.curve[band][epoch] for band in BANDS]
        np.testing.assert_allclose(reached, expected, atol=1e-4)
    # One pretraining serves all folds; both were needed at once.
    assert [path.name for path in (tmp_path / "pretrained").iterdir()] == ["8x2-seed5.eqx"]


def test_pretraining_learns_what_the_simulated_rows_say(
    arrays: SearchArrays, tmp_path: Path
) -> None:
    drawn = LocalBackend(arrays, TRAINING, tmp_path / "drawn").advance(trial(), 1)
    plan = a_pretraining(tmp_path, epochs=60)
    begun = LocalBackend(arrays, TRAINING, tmp_path, pretraining=plan).advance(trial(), 1)
    assert begun.objective < 0.5 * drawn.objective


def test_each_shape_and_seed_has_weights_of_its_own(arrays: SearchArrays, tmp_path: Path) -> None:
    weights = PretrainedWeights(a_pretraining(tmp_path))
    scaling = Scaling.fit(*arrays.training_rows())
    for width, depth, seed in ((8, 2, 0), (8, 2, 1), (8, 1, 0), (12, 2, 0)):
        model = weights.initial_model(
            {**CONFIGURATION, "width": width, "depth": depth}, seed, scaling
        )
        assert (model.width_size, model.depth) == (width, depth)
    assert sorted(path.name for path in (tmp_path / "pretrained").iterdir()) == [
        "12x2-seed0.eqx",
        "8x1-seed0.eqx",
        "8x2-seed0.eqx",
        "8x2-seed1.eqx",
    ]


def test_the_documented_default_is_never_pretrained(arrays: SearchArrays, tmp_path: Path) -> None:
    default = Assignment(0, default_configuration(), seed=5)
    drawn = LocalBackend(arrays, TRAINING, tmp_path / "drawn").advance(default, 2)
    backend = LocalBackend(
        arrays, TRAINING, tmp_path / "begun", pretraining=a_pretraining(tmp_path)
    )
    assert told(backend.advance(default, 2)) == told(drawn)
    backend.release(default)
    assert "pretrain" not in read_header(checkpoint_path(tmp_path / "begun", 0))
    assert not (tmp_path / "pretrained").exists()


# --- bit for bit --------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [False, True], ids=["weights kept", "weights lost"])
def test_an_interrupted_trial_ends_as_if_it_had_not_been(
    lost: bool, arrays: SearchArrays, tmp_path: Path
) -> None:
    def backend(name: str) -> LocalBackend:
        folder = tmp_path / name
        return LocalBackend(arrays, TRAINING, folder, pretraining=a_pretraining(folder))

    whole = backend("whole").advance(trial(), 6)
    backend("cut").advance(trial(), 2)
    if lost:
        (tmp_path / "cut" / "pretrained" / "8x2-seed5.eqx").unlink()
    resumed = backend("cut").advance(trial(), 6)
    assert told(resumed) == told(whole)


def test_weights_that_were_cut_off_are_trained_again(arrays: SearchArrays, tmp_path: Path) -> None:
    plan = a_pretraining(tmp_path)
    first = LocalBackend(arrays, TRAINING, tmp_path / "1", pretraining=plan).advance(trial(), 2)
    path = tmp_path / "pretrained" / "8x2-seed5.eqx"
    path.write_bytes(path.read_bytes()[:-100])
    again = LocalBackend(arrays, TRAINING, tmp_path / "2", pretraining=plan).advance(trial(), 2)
    assert told(again) == told(first)


def test_neighbours_change_nothing_and_share_one_pretraining(
    arrays: SearchArrays, tmp_path: Path
) -> None:
    plan = a_pretraining(tmp_path / "alone")
    alone = LocalBackend(arrays, TRAINING, tmp_path / "alone", pretraining=plan)
    expected = [told(alone.advance(trial(n, learning_rate=10.0**-n), 6)) for n in (1, 2, 3, 4)]

    crowd = a_pretraining(tmp_path / "crowd")
    backend = LocalBackend(arrays, TRAINING, tmp_path / "crowd", pretraining=crowd)
    with ThreadPoolExecutor(4) as threads:
        asked = [
            threads.submit(backend.advance, trial(n, learning_rate=10.0**-n), 6)
            for n in (1, 2, 3, 4)
        ]
        assert [told(each.result()) for each in asked] == expected
    kept = tmp_path / "alone" / "pretrained" / "8x2-seed5.eqx"
    body = kept.read_bytes().split(b"\n", 1)[1]
    assert (crowd.folder / kept.name).read_bytes().split(b"\n", 1)[1] == body


def test_members_are_kept_with_a_header_that_says_what_they_began_with(
    arrays: SearchArrays, tmp_path: Path
) -> None:
    members = (Member(0, 5), Member(1, 5))
    assignment = Assignment(7, CONFIGURATION, 5, members, keep_members=True)
    backend = LocalBackend(
        arrays, TRAINING, tmp_path, {"search": {}}, pretraining=a_pretraining(tmp_path)
    )
    progress = backend.advance(assignment, 6)
    squared, count = np.zeros(4), 0
    for member in members:
        path = member_path(tmp_path, 7, member)
        assert read_header(path)["pretrain"]["source"] == "simulated"
        size = len(arrays.validation_rows(member.fold)[0])
        squared += size * rmse_of(path, arrays, member.fold) ** 2
        count += size
    measured = [progress.rmse[band] for band in BANDS]
    np.testing.assert_allclose(measured, np.sqrt(squared / count), atol=1e-4)


def test_a_pretraining_that_diverges_says_so(arrays: SearchArrays, tmp_path: Path) -> None:
    plan = a_pretraining(tmp_path, rate=10.0, epochs=200)
    huge = SearchArrays(plan.rows.inputs, 1e30 * plan.rows.targets, plan.rows.folds)
    backend = LocalBackend(arrays, TRAINING, tmp_path, pretraining=replace(plan, rows=huge))
    with pytest.raises(DesiskyTuneError, match=r"pretraining of 8 x 2 diverged.*learning_rate"):
        backend.advance(trial(), 2)
    assert not list((tmp_path / "pretrained").glob("*.eqx"))
