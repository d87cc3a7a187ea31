"""The backend that trains many trials at once in the slots of one device.

`advance` is called by many threads, each for a trial of its own, and returns when that trial
stands at its rung; meanwhile one thread runs the slots of all of them
(`desisky_tune.search.slot_banks`). What is on disk is what `LocalBackend` leaves: states at the
rungs, checkpoints of best weights, at the true width.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS
from desisky_tune.search.arrays import SearchArrays
from desisky_tune.search.backend import CURVE_SERIES, Assignment, Member, Progress
from desisky_tune.search.local import member_header, write_checkpoint
from desisky_tune.search.pooling import MemberCurve, member_progress, pool, pooled_progress
from desisky_tune.search.pretraining import PretrainedWeights
from desisky_tune.search.slot_banks import Outcome, SlotBanks, Work
from desisky_tune.search.trial_files import TrialFiles

if TYPE_CHECKING:
    from desisky_tune.search.pretraining import Pretraining
    from desisky_tune.search.space import TrainingSpec
    from desisky_tune.search.storage import RunMirror
    from desisky_tune.training.slots import SlotShape


@dataclass(frozen=True)
class _Training:
    """One member under way: where it stands, and what it has measured."""

    state: Any
    epochs: int
    seconds: float
    curve: dict[str, list[float]]
    objectives: list[float]
    failed: bool = False


class _Trial:
    """The members of a trial; whoever changes them holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.trainings: dict[Member, _Training] = {}


class SlotBackend:
    """Trains the trials of many callers at once, on one device.

    Parameters
    ----------
    arrays
        The rows to train and to choose on.
    training
        What all trials share: epochs, loss.
    folder
        Where the states and the checkpoints of the trials are written.
    header
        Further keys for the header of each checkpoint: where it comes from.
    mirror
        Where a run on a URL has its files.
    slots
        Trainings side by side in a program; None for what a calibration finds (see
        `desisky_tune.search.slot_settings`), which is kept in `folder` for whoever goes on there.
    expected
        Trainings of one shape that may be under way at a time: bounds what a calibration finds.
    precision
        Of the matrix products on a GPU: "float32", "tf32x3" or "tf32".
    pretraining
        What trainings begin with; None where their weights are drawn.

    Attributes
    ----------
    lanes
        Places whose time counts: the device is one.
    meter
        How long was compiled, and how long the device trained.
    """

    lanes = 1

    def __init__(
        self,
        arrays: SearchArrays,
        training: TrainingSpec,
        folder: Path,
        header: Mapping[str, Any] | None = None,
        mirror: RunMirror | None = None,
        *,
        slots: int | None = None,
        expected: int | None = None,
        precision: str = "float32",
        pretraining: Pretraining | None = None,
    ) -> None:
        from desisky_tune.search.slot_settings import SlotPlan
        from desisky_tune.training.slot_rows import FoldRows, slot_rows

        self._training = training
        self._files = TrialFiles(folder, mirror)
        self._header = dict(header or {})
        self._features = arrays.features
        self._folds = [
            FoldRows.of(arrays.inputs, arrays.targets, fold.train, fold.validation)
            for fold in arrays.folds
        ]
        rows = slot_rows(arrays.inputs, arrays.targets, self._folds)
        self._plan = SlotPlan(rows, folder, training.loss, slots, expected, precision)
        self._banks = SlotBanks(rows)
        self.meter = self._banks.meter
        self._start = PretrainedWeights(pretraining, self.meter)
        self._trials: dict[int, _Trial] = {}
        self._lock = threading.Lock()

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        """Train on to `epochs` epochs in total; the states are on disk when this returns.

        Raises
        ------
        OutOfDeviceMemoryError
            When the trial does not fit the device's memory.
        """
        with self._lock:
            running = self._trials.setdefault(trial.number, _Trial())
        with running.lock:
            shape = self._plan.shape(trial.configuration)
            if not running.trainings:
                self._files.discard_weights(trial)
                for member in trial.trainings:
                    running.trainings[member] = self._open(trial, member, shape)
            self._train(trial, running.trainings, shape, epochs)
            progress = self._progress(trial, running.trainings)
            complete = progress.epochs >= self._training.epochs and not progress.failed
            if trial.keep_members and complete:
                self._keep_members(trial, running.trainings, shape)
            return progress

    def release(self, trial: Assignment) -> None:
        """Keep the best weights of a trial, and forget it here.

        Its states stay on disk, as `LocalBackend.release` says; a trial of several members has
        no weights of its own: none are kept.
        """
        with self._lock:
            running = self._trials.pop(trial.number, None)
        if running is None:
            return
        with running.lock:
            for member in running.trainings:
                self._banks.leave((trial.number, member))
            if len(running.trainings) != 1 or self._progress(trial, running.trainings).failed:
                return
            ((member, training),) = running.trainings.items()
            write = functools.partial(
                write_checkpoint,
                model=self._model(trial, training.state.best_parameters),
                progress=self._progress(trial, running.trainings),
                trial=trial,
                training=self._training,
                features=self._features,
                scaling=self._folds[member.fold].scaling,
                header={**self._header, **self._start.header(trial.configuration)},
            )
            self._files.write_weights(trial, write)

    def _keep_members(
        self, trial: Assignment, trainings: Mapping[Member, _Training], shape: SlotShape
    ) -> None:
        """Write the weights of every member at the best epoch of its seed's pooled curve."""
        best_epochs = pool(self._curves(trainings)).best_epochs
        header = {**self._header, **self._start.header(trial.configuration)}
        again = [
            member
            for member, training in trainings.items()
            if best_epochs[member.seed] != int(np.argmin(training.objectives))
        ]
        # What was not a member's own best is not kept while it trains: those train once more.
        works = [
            _work(
                trial,
                member,
                self._fresh(trial, member, shape),
                shape,
                best_epochs[member.seed] + 1,
                "again",
            )
            for member in again
        ]
        outcomes = self._banks.train(works) if works else {}
        for key in outcomes:
            self._banks.leave(key)
        for member, training in trainings.items():
            if member in again:
                words = outcomes[trial.number, member, "again"].words
                parameters = _state_of(trial, shape, words).parameters
            else:
                parameters = training.state.best_parameters
            epoch = best_epochs[member.seed]
            write = functools.partial(
                write_checkpoint,
                model=self._model(trial, parameters),
                progress=member_progress(
                    training.curve, training.objectives, training.seconds, epoch
                ),
                trial=trial,
                training=self._training,
                features=self._features,
                scaling=self._folds[member.fold].scaling,
                header=member_header(header, member),
            )
            self._files.write_member(trial, member, write)

    def figures(self) -> dict[str, int]:
        """Return what the device does: see `SlotBanks.figures`."""
        return self._banks.figures()

    def close(self) -> None:
        """End the thread that runs the slots."""
        self._banks.close()

    def _train(
        self,
        trial: Assignment,
        trainings: dict[Member, _Training],
        shape: SlotShape,
        epochs: int,
    ) -> None:
        works = [
            _work(trial, member, training.state, shape, epochs)
            for member, training in trainings.items()
            if training.epochs < epochs and not training.failed
        ]
        if not works:
            return
        outcomes = self._banks.train(works)
        for member in list(trainings):
            if (outcome := outcomes.get((trial.number, member))) is not None:
                trainings[member] = self._after(trial, trainings[member], outcome, shape)
                if not trainings[member].failed:
                    self._save(trial, member, trainings[member], shape)

    def _after(
        self, trial: Assignment, training: _Training, outcome: Outcome, shape: SlotShape
    ) -> _Training:
        """Add an outcome to what a member has measured."""
        curves = outcome.curves
        table = np.concatenate(
            [
                np.column_stack([curve.train_loss, curve.test_loss, curve.rmse, curve.objective])
                for curve in curves
            ]
        )
        *series, objectives = table.T
        return replace(
            training,
            state=_state_of(trial, shape, outcome.words),
            epochs=training.epochs + len(table),
            seconds=training.seconds + outcome.seconds,
            curve={
                name: [*training.curve.get(name, ()), *map(float, values)]
                for name, values in zip(CURVE_SERIES, series, strict=True)
            },
            objectives=[*training.objectives, *map(float, objectives)],
            failed=curves[-1].failed,
        )

    def _progress(self, trial: Assignment, trainings: Mapping[Member, _Training]) -> Progress:
        """Say where a trial stands: at the best epoch so far of its members together."""
        curves = self._curves(trainings)
        seconds = sum(training.seconds for training in trainings.values())
        for member, training in trainings.items():
            if training.failed or not training.epochs:
                where = f" (fold {member.fold}, seed {member.seed})" if trial.members else ""
                reason = (
                    "training diverged: a loss was not finite in epoch"
                    f" {training.epochs - 1}{where}"
                )
                return pooled_progress(curves, seconds, reason)
        return pooled_progress(curves, seconds)

    def _curves(self, trainings: Mapping[Member, _Training]) -> list[MemberCurve]:
        return [
            MemberCurve(
                member,
                len(self._folds[member.fold].validation),
                training.curve,
                training.objectives,
            )
            for member, training in trainings.items()
        ]

    def _fresh(self, trial: Assignment, member: Member, shape: SlotShape) -> Any:
        """Return the state in which a training begins."""
        from desisky_tune.training.slot_state import fresh_state

        width = int(trial.configuration["width"])
        scaling = self._folds[member.fold].scaling
        model = self._start.initial_model(trial.configuration, member.seed, scaling)
        return fresh_state(len(self._features), len(BANDS), width, shape.depth, member.seed, model)

    def _model(self, trial: Assignment, parameters: Any) -> Any:
        from desisky_tune.training.slot_state import model_of

        width = int(trial.configuration["width"])
        return model_of(parameters, len(self._features), len(BANDS), width)

    def _open(self, trial: Assignment, member: Member, shape: SlotShape) -> _Training:
        """Begin a member, or take it up from the state that it left.

        A state that cannot be read, or is another configuration's or shape's, is begun anew:
        what comes of a trial is the same either way.
        """
        from desisky_tune.training.state_file import read_state

        fresh = self._fresh(trial, member, shape)
        left = self._files.read_state(trial, member, lambda path: read_state(path, fresh))
        if left is not None and left[1].get("trial") == self._key(trial, member, shape):
            return _Training(left[0], **left[1]["progress"])
        return _Training(fresh, 0, 0.0, {}, [])

    def _save(
        self, trial: Assignment, member: Member, training: _Training, shape: SlotShape
    ) -> None:
        from desisky_tune.training.state_file import write_state

        progress = {
            "epochs": training.epochs,
            "seconds": training.seconds,
            "curve": training.curve,
            "objectives": training.objectives,
        }
        notes = {"trial": self._key(trial, member, shape), "progress": progress}
        self._files.write_state(
            trial, member, lambda path: write_state(path, training.state, notes)
        )

    def _key(self, trial: Assignment, member: Member, shape: SlotShape) -> dict[str, Any]:
        return {
            "number": trial.number,
            "configuration": dict(trial.configuration),
            "seed": member.seed,
            "scaling": self._folds[member.fold].scaling.as_dict(),
            "shape": asdict(shape),
        }


def _work(
    trial: Assignment, member: Member, state: Any, shape: SlotShape, epochs: int, *mark: str
) -> Work:
    """Return what is to be done to take a training to `epochs` epochs in all."""
    return Work(
        key=(trial.number, member, *mark),
        shape=shape,
        state=state,
        learning_rate=float(trial.configuration["learning_rate"]),
        huber_delta=float(trial.configuration["huber_delta"]),
        fold=member.fold,
        target=epochs,
    )


def _state_of(trial: Assignment, shape: SlotShape, words: Any) -> Any:
    from desisky_tune.training.slots import slot_program

    return slot_program(shape).state_of(words, int(trial.configuration["width"]))
