"""The backend inside a trial's process: states, checkpoints, and what a kill leaves."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from desisky_tune.data.columns import BANDS
from desisky_tune.io import load_model
from desisky_tune.search.backend import Assignment, Progress
from desisky_tune.search.local import (
    Fold,
    LocalBackend,
    SearchArrays,
    checkpoint_path,
    process_environment,
    state_path,
    sweep,
)
from desisky_tune.search.records import finish
from desisky_tune.search.sections import TrainingSpec
from desisky_tune.search.trial_files import TrialFiles
from desisky_tune.training.metrics import band_rmse
from desisky_tune.training.native import missing_because
from desisky_tune.training.native.program import NativeProgram

TRAINING = TrainingSpec(epochs=12)
CONFIGURATION = {
    "width": 8,
    "depth": 1,
    "learning_rate": 1e-2,
    "huber_delta": 0.25,
    "batch_size": 16,
}


@pytest.fixture(scope="module")
def arrays() -> SearchArrays:
    """Rows whose magnitudes are a smooth function of six features."""
    draw = np.random.default_rng(3)
    inputs = draw.normal(50, 20, (60, 6)).astype(np.float32)
    targets = 20 + 0.02 * inputs[:, :4] + draw.normal(0, 0.05, (60, 4))
    targets = targets.astype(np.float32)
    return SearchArrays(inputs, targets, (Fold(np.arange(40), np.arange(40, 60)),))


def trial(number: int = 3, **changes: Any) -> Assignment:
    return Assignment(number, {**CONFIGURATION, **changes}, seed=5)


def test_what_is_kept_is_what_was_measured(arrays: SearchArrays, tmp_path: Path) -> None:
    backend = LocalBackend(arrays, TRAINING, tmp_path, {"data": {"source": "made up"}})
    progress = backend.advance(trial(), 12)
    backend.release(trial())
    model, meta = load_model("broadband", path=checkpoint_path(tmp_path, 3))
    inputs, targets = arrays.validation_rows()
    measured = band_rmse(np.array([model(row) for row in inputs]), targets)
    np.testing.assert_allclose([progress.rmse[band] for band in BANDS], measured, atol=1e-4)
    assert progress.objective == pytest.approx(measured.mean(), abs=1e-4)
    assert meta["training"]["epoch"] == progress.best_epoch
    assert meta["data"] == {"source": "made up"}


def test_what_is_kept_of_one_trial_keeps_no_other_from_training(
    arrays: SearchArrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, may_end = threading.Event(), threading.Event()
    write = TrialFiles.write_state

    def slowly(files: TrialFiles, trial: Assignment, *rest: Any) -> None:
        if trial.number == 0:
            writing.set()
            assert may_end.wait(60)
        write(files, trial, *rest)

    monkeypatch.setattr(TrialFiles, "write_state", slowly)
    backend = LocalBackend(arrays, TRAINING, tmp_path, lanes=1)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(backend.advance, trial(0), 4)
        assert writing.wait(60)
        second = backend.advance(trial(1), 4)
        assert not first.done()
        may_end.set()
        assert first.result(60).objective == second.objective


@pytest.mark.skipif(missing_because() is not None, reason="no C compiler")
def test_no_more_train_at_a_time_than_there_are_lanes(
    arrays: SearchArrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, together = [0], [0], threading.Barrier(2)
    advance = NativeProgram.advance

    def counted(*arguments: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        together.wait(60)  # with two lanes, two come here each time
        inside[0] -= 1
        return advance(*arguments)

    monkeypatch.setattr(NativeProgram, "advance", counted)
    backend = LocalBackend(arrays, TRAINING, tmp_path, lanes=2)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: backend.advance(trial(number), 4), range(8)))
    assert most[0] == 2


def test_the_objective_is_that_of_the_best_epoch_so_far(
    arrays: SearchArrays, tmp_path: Path
) -> None:
    progress = LocalBackend(arrays, TRAINING, tmp_path).advance(trial(learning_rate=0.3), 12)
    assert progress.objective == min(progress.objectives)
    assert progress.best_epoch == progress.objectives.index(min(progress.objectives))
    assert progress.objectives_at([4, 12, 50]) == {
        4: min(progress.objectives[:4]),
        12: progress.objective,
    }


def test_a_new_process_goes_on_bit_for_bit(arrays: SearchArrays, tmp_path: Path) -> None:
    whole = LocalBackend(arrays, TRAINING, tmp_path / "whole").advance(trial(), 12)
    LocalBackend(arrays, TRAINING, tmp_path / "cut").advance(trial(), 5)
    resumed = LocalBackend(arrays, TRAINING, tmp_path / "cut").advance(trial(), 12)
    assert resumed.curve == whole.curve
    assert resumed.objective == whole.objective


def test_a_trial_that_goes_on_elsewhere_leaves_its_state_and_no_weights(
    arrays: SearchArrays, tmp_path: Path
) -> None:
    here, there = (LocalBackend(arrays, TRAINING, tmp_path) for _ in range(2))
    here.advance(trial(), 3)
    here.forget(trial())
    assert [path.suffix for path in tmp_path.iterdir()] == [".state"]
    assert (
        there.advance(trial(), 12).curve
        == LocalBackend(arrays, TRAINING, tmp_path / "alone").advance(trial(), 12).curve
    )


def test_asking_for_less_answers_where_it_stands(arrays: SearchArrays, tmp_path: Path) -> None:
    LocalBackend(arrays, TRAINING, tmp_path).advance(trial(), 9)
    again = LocalBackend(arrays, TRAINING, tmp_path).advance(trial(), 3)
    assert again.epochs == 9
    assert sorted(again.objectives_at([3, 9])) == [3, 9]


def test_a_state_of_another_configuration_is_begun_anew(
    arrays: SearchArrays, tmp_path: Path
) -> None:
    LocalBackend(arrays, TRAINING, tmp_path).advance(trial(learning_rate=0.1), 6)
    fresh = LocalBackend(arrays, TRAINING, tmp_path / "fresh").advance(trial(), 3)
    other = LocalBackend(arrays, TRAINING, tmp_path).advance(trial(), 3)
    assert other.epochs == 3
    assert other.curve == fresh.curve


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\x80\x04 a pickle", b'{"kind": 1}\nrest'])
def test_a_state_that_cannot_be_read_is_begun_anew(
    content: bytes, arrays: SearchArrays, tmp_path: Path
) -> None:
    tmp_path.mkdir(exist_ok=True)
    state_path(tmp_path, 3).write_bytes(content)
    assert LocalBackend(arrays, TRAINING, tmp_path).advance(trial(), 3).epochs == 3


def test_weights_of_an_interrupt_do_not_outlive_the_trial(
    arrays: SearchArrays, tmp_path: Path
) -> None:
    interrupted = LocalBackend(arrays, TRAINING, tmp_path)
    interrupted.advance(trial(), 2)
    interrupted.release(trial())
    resumed = LocalBackend(arrays, TRAINING, tmp_path)
    progress = resumed.advance(trial(), 12)
    # The ledger has the trial, its process is killed before it could keep the weights.
    sweep(tmp_path, [record_of(progress)])
    assert not checkpoint_path(tmp_path, 3).exists()
    assert state_path(tmp_path, 3).exists()
    resumed.release(trial())
    sweep(tmp_path, [record_of(progress)])
    assert load_epoch(tmp_path) == progress.best_epoch
    assert not state_path(tmp_path, 3).exists()


def record_of(progress: Progress) -> Any:
    return finish(number=3, configuration=CONFIGURATION, result=progress.as_result(), max_epochs=12)


def load_epoch(folder: Path) -> int:
    return int(load_model("broadband", path=checkpoint_path(folder, 3))[1]["training"]["epoch"])


def test_divergence_is_said_and_leaves_no_weights(arrays: SearchArrays, tmp_path: Path) -> None:
    wild = trial(learning_rate=1e30)
    backend = LocalBackend(arrays, TRAINING, tmp_path)
    progress = backend.advance(wild, 12)
    assert progress.failed
    assert math.isnan(progress.objective)
    assert "diverged" in str(progress.reason)
    backend.release(wild)
    assert list(tmp_path.iterdir()) == []


def test_a_trial_without_a_gpu_does_not_look_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert process_environment(gpu=False)["JAX_PLATFORMS"] == "cpu"
    assert "JAX_PLATFORMS" not in process_environment(gpu=True)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert process_environment(gpu=True)["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
