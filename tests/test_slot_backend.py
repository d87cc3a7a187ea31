"""Many callers, one device: each gets its own trial's numbers, whatever the others do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from desisky_tune.data.columns import BANDS
from desisky_tune.errors import DesiskyTuneError, InputError, StorageError
from desisky_tune.io import load_model
from desisky_tune.search.arrays import Fold, SearchArrays
from desisky_tune.search.backend import Assignment, Member, Progress
from desisky_tune.search.engine import Work, make_backend
from desisky_tune.search.local import LocalBackend, checkpoint_path, state_path
from desisky_tune.search.sections import TrainingSpec
from desisky_tune.search.slot_backend import SlotBackend
from desisky_tune.search.slot_banks import OutOfDeviceMemoryError, SlotBanks
from desisky_tune.search.slot_settings import FILE, SlotPlan, expected_trainings
from desisky_tune.search.space import spec_from_dict
from desisky_tune.training import slot_count
from desisky_tune.training.metrics import band_rmse
from desisky_tune.training.slot_rows import FoldRows, SlotRows, slot_rows
from desisky_tune.training.slots import SlotProgram, SlotShape
from desisky_tune.training.widths import padded_width

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
    """Rows whose magnitudes are a smooth function of six features, in two folds."""
    draw = np.random.default_rng(3)
    inputs = draw.normal(50, 20, (60, 6)).astype(np.float32)
    targets = (20 + 0.02 * inputs[:, :4] + draw.normal(0, 0.05, (60, 4))).astype(np.float32)
    folds = (Fold(np.arange(40), np.arange(40, 60)), Fold(np.arange(25, 60), np.arange(25)))
    return SearchArrays(inputs, targets, folds)


@pytest.fixture
def backend(arrays: SearchArrays, tmp_path: Path) -> Iterator[SlotBackend]:
    opened = SlotBackend(arrays, TRAINING, tmp_path, {"data": {"source": "made up"}}, slots=3)
    yield opened
    opened.close()


def trial(number: int = 3, **changes: Any) -> Assignment:
    return Assignment(number, {**CONFIGURATION, **changes}, seed=5)


def figures(progress: Progress) -> Progress:
    """Leave out the time, which no two runs share."""
    return replace(progress, seconds=0.0)


def test_what_is_kept_is_what_was_measured(backend, arrays, tmp_path):
    progress = backend.advance(trial(), 12)
    backend.release(trial())
    model, meta = load_model("broadband", path=checkpoint_path(tmp_path, 3))
    inputs, targets = arrays.validation_rows()
    measured = band_rmse(np.array([model(row) for row in inputs]), targets)
    np.testing.assert_allclose([progress.rmse[band] for band in BANDS], measured, atol=1e-4)
    assert progress.objective == pytest.approx(measured.mean(), abs=1e-4)
    assert meta["training"]["epoch"] == progress.best_epoch
    assert model.width_size == 8


def test_a_trial_is_what_the_local_backend_makes_of_it(backend, arrays, tmp_path):
    ours = backend.advance(trial(), 6)
    theirs = LocalBackend(arrays, TRAINING, tmp_path / "local").advance(trial(), 6)
    assert ours.epochs == theirs.epochs
    assert ours.best_epoch == theirs.best_epoch
    for name, series in theirs.curve.items():
        np.testing.assert_allclose(ours.curve[name], series, rtol=1e-4, err_msg=name)


def test_many_callers_each_get_their_own_numbers(backend, arrays, tmp_path):
    """More trials than slots, of two depths, with rungs, one of them NaN: as each by itself."""
    trials = [
        trial(number, depth=1 + number % 2, learning_rate=1e30 if number == 4 else 1e-3 * number)
        for number in range(1, 8)
    ]

    def to_the_end(assignment: Assignment) -> list[Progress]:
        reached = [backend.advance(assignment, rung) for rung in (2, 5, 12)]
        backend.release(assignment)
        return reached

    with ThreadPoolExecutor(len(trials)) as callers:
        together = list(callers.map(to_the_end, trials))
    alone = SlotBackend(arrays, TRAINING, tmp_path / "alone", slots=3)
    for assignment, reached in zip(trials, together, strict=True):
        last = alone.advance(assignment, 12)
        alone.release(assignment)
        if assignment.number == 4:
            assert "not finite in epoch" in (last.reason or "")
            assert reached[-1].reason == last.reason
        else:
            assert figures(reached[-1]) == figures(last)
            one, other = (
                checkpoint_path(at, assignment.number) for at in (tmp_path, tmp_path / "alone")
            )
            assert leaves(one) == leaves(other)
    alone.close()
    assert backend.figures()["slots_busy"] == 0


def leaves(path: Path) -> list[bytes]:
    model, _ = load_model("broadband", path=path)
    return [
        np.asarray(part).tobytes() for layer in model.layers for part in (layer.weight, layer.bias)
    ]


def test_a_trial_of_several_members_pools_them(backend, arrays, tmp_path):
    members = tuple(Member(fold, seed) for fold in (0, 1) for seed in (1, 2))
    several = replace(trial(), members=members)
    pooled = backend.advance(several, 4)
    expected = LocalBackend(arrays, TRAINING, tmp_path / "local").advance(several, 4)
    assert pooled.objective == pytest.approx(expected.objective, rel=1e-4)
    assert pooled.spread == pytest.approx(expected.spread, rel=1e-2)
    for member in members:
        assert state_path(tmp_path, 3, member).exists()
    backend.release(several)
    assert not checkpoint_path(tmp_path, 3).exists()


def test_a_trial_goes_on_from_its_rung_in_another_process(backend, arrays, tmp_path):
    members = (Member(0, 1), Member(1, 1))
    several = replace(trial(), members=members)
    backend.advance(several, 5)
    later = SlotBackend(arrays, TRAINING, tmp_path, slots=3)
    resumed = later.advance(several, 12)
    later.close()
    assert figures(resumed) == figures(backend.advance(several, 12))


def test_a_member_that_could_not_be_opened_is_trained_when_it_is_asked_for_again(
    backend, monkeypatch
):
    several = replace(trial(), members=(Member(0, 5), Member(1, 5)))
    expected = figures(backend.advance(several, 4))
    backend.release(several)
    again = replace(several, number=4)
    opening = backend._open

    def fail_once(assignment: Assignment, member: Member, shape: SlotShape) -> Any:
        if member == again.members[1]:
            monkeypatch.undo()
            raise StorageError("cannot read")
        return opening(assignment, member, shape)

    monkeypatch.setattr(backend, "_open", fail_once)
    with pytest.raises(StorageError):
        backend.advance(again, 4)
    assert figures(backend.advance(again, 4)) == expected


def test_a_trial_that_goes_on_elsewhere_leaves_its_state_and_no_weights(backend, arrays, tmp_path):
    backend.advance(trial(), 5)
    backend.forget(trial())
    assert not checkpoint_path(tmp_path, 3).exists()
    there = SlotBackend(arrays, TRAINING, tmp_path, slots=3)
    resumed = there.advance(trial(), 12)
    there.close()
    assert figures(resumed) == figures(backend.advance(trial(number=4), 12))


def test_a_state_of_another_shape_is_not_taken_up(backend, arrays, tmp_path):
    backend.advance(trial(), 5)
    wider = SlotBackend(arrays, TRAINING, tmp_path, slots=2)
    assert wider.advance(trial(), 2).epochs == 2
    wider.close()


def test_epochs_that_are_done_train_nothing(backend):
    done = backend.advance(trial(), 5)
    assert backend.advance(trial(), 3) == done


def test_a_trial_too_large_for_the_device_fails_alone(backend, monkeypatch):
    """The wide trial's program finds no memory; the one beside it trains to its end."""
    compiled = SlotProgram.compile

    def compile_or_not(self: SlotProgram, rows: SlotRows) -> None:
        if self.shape.width > 32:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        compiled(self, rows)

    monkeypatch.setattr(SlotProgram, "compile", compile_or_not)
    with ThreadPoolExecutor(2) as callers:
        wide = callers.submit(backend.advance, trial(1, width=400), 12)
        narrow = callers.submit(backend.advance, trial(2), 12)
        with pytest.raises(OutOfDeviceMemoryError, match=r"depth 1 and width 512 .* Out of memory"):
            wide.result()
        assert narrow.result().epochs == 12


def test_states_lost_to_a_full_device_come_back(backend, arrays, monkeypatch):
    """An advance that runs out of memory takes its states with it: they are put back."""
    before = backend.advance(trial(), 2)
    advanced, calls = SlotProgram.advance, []

    def advance_or_not(self: SlotProgram, states: Any, *rest: Any) -> Any:
        calls.append(states)
        if len(calls) == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return advanced(self, states, *rest)

    monkeypatch.setattr(SlotProgram, "advance", advance_or_not)
    after = backend.advance(trial(), 5)
    assert after.objectives[:2] == before.objectives
    assert after.epochs == 5


def test_any_other_error_reaches_the_caller_and_ends_nothing(backend, monkeypatch):
    advanced, calls = SlotProgram.advance, []

    def advance_or_not(self: SlotProgram, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first is the compile's own
            raise ValueError("a fault of ours")
        return advanced(self, *rest)

    monkeypatch.setattr(SlotProgram, "advance", advance_or_not)
    with pytest.raises(ValueError, match="a fault of ours"):
        backend.advance(trial(), 2)
    assert backend.advance(trial(4), 2).epochs == 2


def test_closing_frees_who_waits(backend):
    failed: list[Exception] = []

    def wait() -> None:
        try:
            backend.advance(trial(), 10**6)
        except DesiskyTuneError as error:
            failed.append(error)

    caller = threading.Thread(target=wait)
    caller.start()
    backend.close()
    caller.join(60)
    assert "closed" in str(failed[0])


# ---------------------------------------------------------------------- number of slots


def small_rows(arrays: SearchArrays) -> SlotRows:
    folds = [FoldRows.of(arrays.inputs, arrays.targets, *fold) for fold in arrays.folds]
    return slot_rows(arrays.inputs, arrays.targets, folds)


@pytest.mark.parametrize(
    ("width", "padded"), [(1, 32), (32, 32), (33, 64), (148, 256), (512, 512), (513, 1024)]
)
def test_widths_are_padded_to_a_ladder(width, padded):
    assert padded_width(width) == padded


def test_a_calibration_stops_where_more_slots_train_no_faster(arrays):
    """A device that does up to eight slots in the time of one, and no more than that at once."""
    shape = SlotShape(5, 128, 32, 1)
    found = slot_count.calibrate(
        shape, small_rows(arrays), 64, time_epoch=lambda shape, _: max(1.0, shape.slots / 8)
    )
    assert found.slots == 8
    assert sorted(found.seconds) == [1, 2, 4, 8, 16]


def test_memory_bounds_the_slots(arrays):
    shape, rows = SlotShape(5, 128, 32, 1), small_rows(arrays)
    one = slot_count.footprint(shape, rows)
    assert slot_count.most_slots(shape, rows, int(10.5 * one / slot_count.MEMORY_SHARE)) == 10
    # Weights, two moments and the best weights of the default architecture, float32.
    weights = 6 * 128 + 128 + 4 * (128 * 128 + 128) + 128 * 4 + 4
    assert SlotProgram(shape).bytes_per_slot() == 4 * 4 * weights
    assert one > 4 * 4 * weights


def test_programs_of_other_widths_move_as_many_bytes():
    reference = SlotShape(5, 128, 32, 64)
    of = {
        width: slot_count.scaled_slots(replace(reference, width=width), reference)
        for width in (32, 128, 512)
    }
    assert of[128] == 64
    # Four times the width, sixteen times the bytes of the square matrices, and a little less.
    assert of[512] == 4
    assert 16 / 1.3 < of[32] / 64 < 16


@pytest.mark.parametrize(("slots", "rounded"), [(0, 1), (1, 1), (3, 2), (64, 64), (127, 64)])
def test_slots_are_rounded_to_powers_of_two(slots, rounded):
    assert slot_count.power_of_two(slots) == rounded


def test_the_number_of_slots_is_settled_once_for_a_run(arrays, tmp_path, monkeypatch):
    timed: list[int] = []

    def time_epoch(shape: SlotShape, rows: SlotRows) -> float:
        timed.append(shape.slots)
        return max(1.0, shape.slots / 2)

    monkeypatch.setattr(slot_count, "epoch_seconds", time_epoch)
    rows = small_rows(arrays)
    plan = SlotPlan(rows, tmp_path, "huber", expected=16)
    # Two slots of the default architecture move more bytes than 16 of this one can be filled.
    assert plan.shape(CONFIGURATION).slots == 16
    assert plan.shape({**CONFIGURATION, "width": 512, "depth": 5}).slots == 1
    assert timed == [1, 2, 4]
    again = SlotPlan(rows, tmp_path, "huber", expected=400)
    assert again.shape(CONFIGURATION).slots == 16
    assert timed == [1, 2, 4]
    assert (tmp_path / FILE).exists()


def test_slots_that_nobody_could_fill_are_not_tried(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(slot_count, "epoch_seconds", lambda *_: pytest.fail("was timed"))
    plan = SlotPlan(small_rows(arrays), tmp_path, "huber", expected=1)
    assert plan.shape(CONFIGURATION).slots == 1


def test_trainings_of_one_shape_follow_from_the_settings():
    """Two depths, three padded widths, one batch size: six shapes."""
    space = {"depth": {"choices": [2, 3]}, "width": {"low": 16, "high": 100}, "batch_size": 32}
    spec = spec_from_dict({"space": space})
    assert expected_trainings(spec, 60, 6) == 60 * 6 // 6
    assert expected_trainings(spec, 1, 6) == 6
    assert expected_trainings(spec, 60, 1) == 10


def test_a_gpus_engine_trains_in_slots(arrays, tmp_path):
    (tmp_path / "search.json").touch()
    work = Work("run", TRAINING, tmp_path / "trials", {}, trainings=1)
    backend = make_backend("gpu", 1, work, arrays)
    assert backend.advance(trial(), 2).epochs == 2
    assert backend.lanes == 1
    spent = backend.meter.seconds()
    assert spent["compiling"] > 0
    assert spent["training"] > 0
    backend.close()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_an_engine_writes_in_its_runs_folder_alone(arrays, tmp_path, monkeypatch, device):
    monkeypatch.setattr("desisky_tune.search.trial_files.TRIAL_PATIENCE", 0.0)
    work = Work("run", TRAINING, tmp_path / "run" / "trials", {}, trainings=1)
    backend = make_backend(device, 1, work, arrays)
    with pytest.raises(StorageError, match=r"run/search\.json is not there"):
        backend.advance(trial(), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_slots_must_be_one(arrays, tmp_path):
    with pytest.raises(InputError, match=r"resources\.slots is 0"):
        SlotBackend(arrays, TRAINING, tmp_path, slots=0)


def test_banks_take_no_more_memory_than_they_may(arrays, tmp_path):
    """With room for one bank, trials wait for its slots; without any, they fail."""
    backend = SlotBackend(arrays, TRAINING, tmp_path, slots=2)
    rows = backend._banks._rows
    shape = backend._plan.shape(CONFIGURATION)
    one = slot_count.footprint(shape, rows)
    backend._banks = SlotBanks(rows, memory=one)
    with ThreadPoolExecutor(5) as callers:
        progress = list(callers.map(lambda n: backend.advance(trial(n), 3), range(5)))
    assert [each.epochs for each in progress] == [3] * 5
    assert backend.figures()["slots"] == 2
    backend.close()
    backend._banks = SlotBanks(rows, memory=one - 1)
    with pytest.raises(OutOfDeviceMemoryError, match="they need about"):
        backend.advance(trial(9), 3)
    backend.close()
