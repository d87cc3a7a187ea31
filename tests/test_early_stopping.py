"""Early stopping: the pooled curve alone says where a trial ends, whatever pieces it comes in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pytest
from virtual_clock import FakeBackend, VirtualSearch

from desisky_tune.io import load_model
from desisky_tune.search.arrays import Fold, SearchArrays
from desisky_tune.search.backend import Assignment, Backend, Member, Progress
from desisky_tune.search.final_fit import FinalFit, train_through
from desisky_tune.search.hyperparameters import OPTIONAL
from desisky_tune.search.leaderboard import leaderboard, to_rows
from desisky_tune.search.local import LocalBackend, checkpoint_path, member_path
from desisky_tune.search.pooling import MemberCurve, pool, pooled_progress
from desisky_tune.search.records import finish
from desisky_tune.search.schedulers import RungScheduler
from desisky_tune.search.sections import TrainingSpec
from desisky_tune.search.slot_backend import SlotBackend
from desisky_tune.search.space import resolved_dict, spec_from_dict
from desisky_tune.search.study_storage import close_storage, open_storage
from desisky_tune.search.tables import trials_table
from desisky_tune.search.trial import SearchTrial, TrialPlan
from desisky_tune.training.scaling import Scaling
from desisky_tune.visualization.search import plot_parallel_coordinates, plot_slice

TRAINING = TrainingSpec(epochs=40)
PATIENCE = 4
CONFIGURATION = {
    "width": 8,
    "depth": 1,
    "learning_rate": 3e-2,
    "huber_delta": 0.25,
    "batch_size": 16,
}
MEMBERS = tuple(Member(fold, seed) for seed in (5, 6) for fold in (0, 1))


@pytest.fixture(scope="module")
def arrays() -> SearchArrays:
    """Rows whose magnitudes are a smooth function of six features, in two folds."""
    draw = np.random.default_rng(3)
    inputs = draw.normal(50, 20, (60, 6)).astype(np.float32)
    targets = (20 + 0.02 * inputs[:, :4] + draw.normal(0, 0.3, (60, 4))).astype(np.float32)
    folds = (Fold(np.arange(40), np.arange(40, 60)), Fold(np.arange(25, 60), np.arange(25)))
    return SearchArrays(inputs, targets, folds)


Open = Callable[[Path], Backend]


@pytest.fixture(params=["local", "slots"])
def opened(request: Any, arrays: SearchArrays) -> Iterator[Open]:
    """A backend of each kind, opened in a folder as often as wanted."""
    slots = []

    def open_one(folder: Path) -> Backend:
        if request.param == "local":
            return LocalBackend(arrays, TRAINING, folder)
        slots.append(SlotBackend(arrays, TRAINING, folder, slots=4))
        return slots[-1]

    yield open_one
    for each in slots:
        each.close()


def trial(number: int = 3, **changes: Any) -> Assignment:
    members = changes.pop("members", ())
    keep = bool(members)
    return Assignment(number, {**CONFIGURATION, **changes}, 5, members, keep_members=keep)


def first_stop(objectives: Sequence[Sequence[float]], patience: int) -> int | None:
    """The definition: the first epoch after which all curves' lowest are `patience` epochs old."""
    for epochs in range(1, len(objectives[0]) + 1):
        lowest = [int(np.argmin(curve[:epochs])) for curve in objectives]
        if all(epochs - 1 - best >= patience for best in lowest):
            return epochs
    return None


def figures(progress: Progress) -> Progress:
    return replace(progress, seconds=0.0)


def test_a_trial_ends_where_its_best_value_is_old_enough(opened: Open, tmp_path: Path) -> None:
    whole = opened(tmp_path / "whole").advance(trial(), 40)
    expected = first_stop([whole.objectives], PATIENCE)
    assert expected is not None
    assert PATIENCE + 1 < expected < 40
    backend = opened(tmp_path)
    progress = backend.advance(trial(early_stopping=PATIENCE), 40)
    assert progress.stopped
    assert not whole.stopped
    assert progress.epochs == expected
    assert list(progress.objectives) == list(whole.objectives[:expected])
    assert progress.objective == min(whole.objectives[:expected])
    for asked in (backend, opened(tmp_path)):
        again = asked.advance(trial(early_stopping=PATIENCE), 40)
        assert again == progress, "it is on disk, and nothing is trained again"
    backend.release(trial(early_stopping=PATIENCE))
    _, meta = load_model("broadband", path=checkpoint_path(tmp_path, 3))
    assert meta["training"]["epoch"] == progress.best_epoch == expected - 1 - PATIENCE
    assert meta["training"]["config"]["early_stopping"] == PATIENCE


@pytest.mark.parametrize("members", [(), MEMBERS], ids=["alone", "members"])
def test_rungs_and_interruptions_change_no_bit(
    opened: Open, tmp_path: Path, members: tuple[Member, ...]
) -> None:
    patient = trial(early_stopping=PATIENCE, schedule="cosine", members=members)
    whole = opened(tmp_path / "whole").advance(patient, 40)
    assert whole.stopped
    backend = opened(tmp_path / "cut")
    for rung in (1, 6, whole.epochs - 1):
        progress = backend.advance(patient, rung)
        assert progress.epochs == rung
        assert not progress.stopped
        backend = opened(tmp_path / "cut")
    assert figures(backend.advance(patient, 40)) == figures(whole)
    for member in members:
        paths = [member_path(tmp_path / folder, 3, member) for folder in ("whole", "cut")]
        models = [load_model("broadband", path=path)[0] for path in paths]
        for one, other in zip(*(model.layers for model in models), strict=True):
            assert np.array_equal(one.weight, other.weight)


def test_with_folds_and_seeds_all_pooled_curves_have_to_agree(opened: Open, tmp_path: Path) -> None:
    whole = opened(tmp_path / "whole")
    by_seed = []
    for seed in (5, 6):
        members = tuple(member for member in MEMBERS if member.seed == seed)
        by_seed.append(whole.advance(trial(seed, members=members), 40).objectives)
    expected = first_stop(by_seed, PATIENCE)
    alone = [first_stop([curve], PATIENCE) for curve in by_seed]
    assert expected is not None
    assert expected < 40
    assert alone[0] != alone[1]
    progress = opened(tmp_path).advance(trial(early_stopping=PATIENCE, members=MEMBERS), 40)
    assert progress.stopped
    assert progress.epochs == expected
    for member in MEMBERS:
        assert member_path(tmp_path, 3, member).exists()


def test_neutral_values_train_the_same_bits(opened: Open, tmp_path: Path) -> None:
    plain = opened(tmp_path / "plain").advance(trial(), 10)
    neutral = trial(
        schedule="constant",
        warmup=0.0,
        final_rate=0.5,
        weight_decay=0.0,
        gradient_clip=0.0,
        early_stopping=0,
    )
    assert figures(opened(tmp_path / "neutral").advance(neutral, 10)) == figures(plain)


@pytest.mark.parametrize("changes", [
    {"schedule": "cosine", "warmup": 0.1}, {"weight_decay": 1.0}, {"gradient_clip": 0.01}
])  # fmt: skip
def test_each_option_reaches_the_training(
    opened: Open, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain = opened(tmp_path / "plain").advance(trial(), 3)
    other = opened(tmp_path / "other").advance(trial(**changes), 3)
    assert not other.failed
    assert other.objective != plain.objective


# ---------------------------------------------------------------- what the search makes of it


def soon_flat(configuration: Mapping[str, Any], epoch: int) -> float:
    return 0.2 + 0.8 * math.exp(-epoch / 5) + 0.01 * math.sin(7.3 * epoch)


class Patient(FakeBackend):
    """Ends a trial as `early_stopping` says."""

    def __init__(self) -> None:
        super().__init__(curve_of=soon_flat)

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        progress = super().advance(trial, epochs)
        patience = trial.configuration["early_stopping"]
        end = first_stop([progress.objectives], patience) if patience else None
        if end is None:
            return progress
        return replace(super().advance(trial, end), stopped=True)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc"])
def test_a_search_of_optional_hyperparameters(sampler: str, tmp_path: Path) -> None:
    spec = spec_from_dict(
        {
            "space": {
                "width": {"low": 16, "high": 256, "log": True},
                "schedule": {"choices": ["constant", "cosine"]},
                "warmup": {"low": 0, "high": 0.2, "when": "schedule == 'cosine'"},
                "weight_decay": {"low": 1e-5, "high": 1e-1, "log": True},
                "gradient_clip": {"choices": [0, 0.1]},
                "early_stopping": {"choices": [0, 5]},
            },
            "training": {"epochs": 60},
            "search": {
                "trials": 9, "sampler": sampler, "startup_trials": 4, "grace": 10,
            },
        }
    )  # fmt: skip
    first = VirtualSearch(spec, tmp_path, workers=2, backend=Patient())
    first.run(until=first.clock + 4)
    search = VirtualSearch(spec, tmp_path, workers=2, backend=Patient())
    records = search.run()
    assert [record.number for record in records] == list(range(9))
    early = [r for r in records if r.state == "COMPLETE" and r.epochs < 60]
    assert early
    for record in records:
        patience = record.configuration["early_stopping"]
        stopped = patience and record.epochs - 1 - (record.best_epoch or 0) >= patience
        assert (record.state == "COMPLETE") == bool(stopped or record.epochs == 60)
    storage = open_storage(tmp_path / "study.db")
    trials = optuna.load_study(study_name=spec.name, storage=storage).trials
    close_storage(storage)
    assert [trial.state.name for trial in trials] == [record.state for record in records]
    assert {each.params["schedule"] for each in trials[1:]} == {"constant", "cosine"}
    assert "weight_decay" not in trials[0].params
    assert records[0].configuration["weight_decay"] == 0

    board = leaderboard(records)
    header, rows = to_rows(board)
    shown = ["schedule", "warmup", "decay", "clip", "patience"]
    assert [title for title in header if title in (*shown, "final")] == shown
    assert all(len(row) == len(header) for row in rows)
    table = trials_table(records)
    assert table["schedule"].to_pylist() == [r.configuration["schedule"] for r in records]
    assert table["final_rate"].to_pylist() == [0.0] * 9
    space = resolved_dict(spec)["space"]
    for name in ("schedule", "weight_decay", "early_stopping"):
        plt.close(plot_slice(records, name, space))
    plt.close(plot_parallel_coordinates(records, space))


def test_runs_without_optional_hyperparameters_show_none() -> None:
    result = {"epochs": 9, "objective": 0.3, "best_epoch": 3, "rmse": {}, "seconds": 1.0}
    record = finish(number=0, configuration=CONFIGURATION, result=result, max_epochs=9)
    header, _ = to_rows(leaderboard([record]))
    assert "schedule" not in header
    row = trials_table([record]).to_pylist()[0]
    assert [row[name] for name in OPTIONAL] == ["constant", 0.0, 0.0, 0.0, 0.0, 0]


def test_the_rule_on_every_short_curve_is_the_definition() -> None:
    for values in itertools.product((1.0, 2.0, 3.0), repeat=5):
        bands = dict.fromkeys(("train_loss", "test_loss", "V", "g", "r", "z"), values)
        for patience in (1, 2, 3):
            stopped = [
                pooled_progress(
                    [
                        MemberCurve(
                            Member(), 7, {n: v[:epochs] for n, v in bands.items()}, values[:epochs]
                        )
                    ],
                    0.0,
                    patience=patience,
                ).stopped
                for epochs in range(1, 6)
            ]
            expected = first_stop([values], patience)
            assert (stopped.index(True) + 1 if any(stopped) else None) == expected


def test_it_is_recorded_as_complete() -> None:
    result = {
        "epochs": 17,
        "objective": 0.3,
        "best_epoch": 12,
        "rmse": {"V": 0.3},
        "seconds": 1.0,
        "rungs": {10: 0.31},
        "stopped": True,
    }
    record = finish(number=4, configuration={}, result=result, max_epochs=40)
    assert record.state == "COMPLETE"
    assert record.rungs == {10: 0.31, 17: 0.3}
    pruned = finish(number=4, configuration={}, result={**result, "stopped": False}, max_epochs=40)
    assert pruned.state == "PRUNED"
    failed = finish(number=4, configuration={}, result=result, max_epochs=40, reason="no")
    assert failed.state == "FAIL"


def test_a_trial_of_the_search_is_done_then() -> None:
    class Stopping:
        def advance(self, trial: Assignment, epochs: int) -> Progress:
            return Progress(5, 0.3, 0, {}, 0.0, 0.0, 0.0, objectives=[0.3] * 5, stopped=True)

        def release(self, trial: Assignment) -> None: ...

    process = SearchTrial.__new__(SearchTrial)
    plan = TrialPlan(rungs=(2, 6, 18), seed=7, backend=Stopping, environment={})
    process.setup({"trial": 0, "width": 8}, plan=plan)
    result = process.step()
    assert result["done"]
    assert result["stopped"]
    assert result["rungs"] == {2: 0.3}


def test_asha_counts_it_at_the_rungs_that_it_did_not_need() -> None:
    """0.2 after 10 epochs stays 0.2: a trial that comes to 0.3 at a later rung is behind it."""
    ended = SimpleNamespace(config={"trial": 1})
    told = RungScheduler([5, 15, 40], 3, spared=())
    told.on_trial_complete(
        None, ended, {"epochs": 10, "objective": 0.2, "stopped": True, "rungs": {5: 0.4}}
    )
    assert told.decide(2, 5, 0.5) == "STOP"
    assert told.decide(3, 15, 0.3) == "STOP"
    assert told.decide(4, 15, 0.1) == "CONTINUE"
    primed = RungScheduler([5, 15, 40], 3, spared=())
    result = {"epochs": 10, "objective": 0.2, "best_epoch": 3, "rungs": {5: 0.4}, "stopped": True}
    primed.prime([finish(number=1, configuration={}, result=result, max_epochs=40)])
    assert primed.decide(3, 15, 0.3) == "STOP"
    assert primed.decide(4, 15, 0.1) == "CONTINUE"


def test_the_final_fit_goes_along_the_schedule_of_the_folds(arrays: SearchArrays) -> None:
    """Fewer epochs are the first ones of more: the rates do not depend on where it stops."""
    inputs, targets = arrays.training_rows(0)
    scaling = Scaling.fit(inputs, targets)
    asked = {"schedule": "cosine", "warmup": 0.1, "weight_decay": 0.1, "gradient_clip": 0.05}
    configuration = {**CONFIGURATION, **asked, "early_stopping": 1}
    curves = [
        train_through(
            inputs, targets, scaling, FinalFit(configuration, epochs, 0, {}, 0.0, {}), TRAINING
        )[1].train_loss
        for epochs in (9, 20)
    ]
    assert [len(curve) for curve in curves] == [9, 20]
    assert np.array_equal(curves[0], curves[1][:9])


def test_pool_still_takes_the_shortest() -> None:
    """Members that an interruption left at different epochs count as far as all have come."""
    bands = {name: [3.0, 2.0, 1.0] for name in ("train_loss", "test_loss", "V", "g", "r", "z")}
    short = {name: values[:2] for name, values in bands.items()}
    curves = [
        MemberCurve(Member(0, 1), 5, bands, [3.0, 2.0, 1.0]),
        MemberCurve(Member(1, 1), 5, short, [3.0, 2.0]),
    ]
    assert pool(curves).best_epochs == {1: 1}
