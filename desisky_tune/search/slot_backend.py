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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS
from desisky_tune.search.arrays import SearchArrays
from desisky_tune.search.backend import Assignment, Member, Progress
from desisky_tune.search.hyperparameters import of_training
from desisky_tune.search.local import member_header, write_checkpoint
from desisky_tune.search.pooling import member_progress, pool
from desisky_tune.search.pretraining import PretrainedWeights
from desisky_tune.search.slot_banks import Outcome, SlotBanks, Work
from desisky_tune.search.trainings import (
    RunningTrial,
    Training,
    curves_of,
    next_goal,
    where_it_stands,
)
from desisky_tune.search.trial_files import TrialFiles

if TYPE_CHECKING:
    from desisky_tune.search.patience import StorageWatch
    from desisky_tune.search.pretraining import Pretraining
    from desisky_tune.search.sections import TrainingSpec
    from desisky_tune.search.storage import RunMirror
    from desisky_tune.training.slots import SlotShape


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
    storage
        Told where the trials' files cannot be written, and when they can again.
    of_run
        Whether `folder` lies in a run's: see `desisky_tune.search.trial_files.TrialFiles`.

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
        storage: StorageWatch | None = None,
        of_run: bool = False,
    ) -> None:
        from desisky_tune.search.slot_settings import SlotPlan
        from desisky_tune.training.slot_rows import FoldRows, slot_rows

        self._training = training
        self._files = TrialFiles(folder, mirror, storage, of_run=of_run)
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
        self._start = PretrainedWeights(pretraining, self.meter, storage)
        self._trials: dict[int, RunningTrial[Training]] = {}
        self._lock = threading.Lock()

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        """Train on to `epochs` epochs in total; the states are on disk when this returns.

        Raises
        ------
        OutOfDeviceMemoryError
            When the trial does not fit the device's memory.
        """
        with self._lock:
            running = self._trials.setdefault(trial.number, RunningTrial())
        with running.lock:
            begins = not running.trainings
            if begins:
                # First: a calibration is written to the folder as well.
                self._files.discard_weights(trial)
            shape = self._plan.shape(trial.configuration)
            if begins:
                # All or none: where one cannot be read, a later call begins with all of them.
                opened = {member: self._open(trial, member, shape) for member in trial.trainings}
                running.trainings.update(opened)
            progress: Progress | None = None
            while progress is None or not progress.ends_at(epochs):
                goal = next_goal(trial, running.trainings, self._validation, epochs)
                # On the way to where early stopping looks again, nothing need be on disk.
                self._train(trial, running.trainings, shape, goal, keep=goal == epochs)
                progress = self._progress(trial, running.trainings)
                if progress.stopped and goal < epochs:
                    for member, training in running.trainings.items():
                        self._save(trial, member, training, shape)
            complete = progress.ends_at(self._training.epochs) and not progress.failed
            if trial.keep_members and complete:
                self._keep_members(trial, running.trainings, shape)
            return progress

    def forget(self, trial: Assignment) -> None:
        """Let go of a trial that goes on elsewhere, from its state on disk; write nothing."""
        self._pop(trial)

    def _pop(self, trial: Assignment) -> RunningTrial[Training] | None:
        """Take a trial from the slots, once nobody is at work on it."""
        with self._lock:
            running = self._trials.pop(trial.number, None)
        if running is not None:
            with running.lock:
                for member in running.trainings:
                    self._banks.leave((trial.number, member))
        return running

    def release(self, trial: Assignment) -> None:
        """Keep the best weights of a trial, and forget it here.

        Its states stay on disk, as `LocalBackend.release` says; a trial of several members has
        no weights of its own: none are kept.
        """
        running = self._pop(trial)
        if running is None:
            return
        with running.lock:
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
        self, trial: Assignment, trainings: Mapping[Member, Training], shape: SlotShape
    ) -> None:
        """Write the weights of every member at the best epoch of its seed's pooled curve."""
        best_epochs = pool(curves_of(trainings, self._validation)).best_epochs
        header = {**self._header, **self._start.header(trial.configuration)}
        again = [
            member
            for member, training in trainings.items()
            if best_epochs[member.seed] != int(np.argmin(training.objectives))
        ]
        # What was not a member's own best is not kept while it trains: those train once more.
        works = [
            self._work(
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
        trainings: dict[Member, Training],
        shape: SlotShape,
        epochs: int,
        *,
        keep: bool,
    ) -> None:
        works = [
            self._work(trial, member, training.state, shape, epochs)
            for member, training in trainings.items()
            if training.epochs < epochs and not training.failed
        ]
        if not works:
            return
        outcomes = self._banks.train(works)
        for member in list(trainings):
            if (outcome := outcomes.get((trial.number, member))) is not None:
                trainings[member] = self._after(trial, trainings[member], outcome, shape)
                if keep and not trainings[member].failed:
                    self._save(trial, member, trainings[member], shape)

    def _after(
        self, trial: Assignment, training: Training, outcome: Outcome, shape: SlotShape
    ) -> Training:
        """Add an outcome to what a member has measured."""
        state = _state_of(trial, shape, outcome.words)
        return training.after(outcome.curves, state, outcome.seconds)

    def _progress(self, trial: Assignment, trainings: Mapping[Member, Training]) -> Progress:
        return where_it_stands(trial, trainings, self._validation)

    def _validation(self, fold: int) -> int:
        return len(self._folds[fold].validation)

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

    def _open(self, trial: Assignment, member: Member, shape: SlotShape) -> Training:
        """Begin a member, or take it up from the state that it left.

        A state that cannot be read, or is another configuration's or shape's, is begun anew:
        what comes of a trial is the same either way.
        """
        from desisky_tune.training.state_file import read_state

        fresh = self._fresh(trial, member, shape)
        left = self._files.read_state(trial, member, lambda path: read_state(path, fresh))
        if left is not None and left[1].get("trial") == self._key(trial, member, shape):
            return Training(left[0], **left[1]["progress"])
        return Training(fresh)

    def _save(
        self, trial: Assignment, member: Member, training: Training, shape: SlotShape
    ) -> None:
        from desisky_tune.training.state_file import write_state

        notes = {"trial": self._key(trial, member, shape), "progress": training.notes()}
        self._files.write_state(
            trial, member, lambda path: write_state(path, training.state, notes)
        )

    def _work(
        self,
        trial: Assignment,
        member: Member,
        state: Any,
        shape: SlotShape,
        epochs: int,
        *mark: str,
    ) -> Work:
        """Return what is to be done to take a training to `epochs` epochs in all."""
        from desisky_tune.training.hyperparameters import steps_per_epoch

        hyperparameters = of_training(trial.configuration, self._training.epochs)
        rows = len(self._folds[member.fold].train)
        return Work(
            key=(trial.number, member, *mark),
            shape=shape,
            state=state,
            step=hyperparameters.steps(steps_per_epoch(rows, shape.batch_size)),
            huber_delta=hyperparameters.huber_delta,
            fold=member.fold,
            target=epochs,
        )

    def _key(self, trial: Assignment, member: Member, shape: SlotShape) -> dict[str, Any]:
        return {
            "number": trial.number,
            "configuration": dict(trial.configuration),
            "seed": member.seed,
            "scaling": self._folds[member.fold].scaling.as_dict(),
            "shape": asdict(shape),
        }


def _state_of(trial: Assignment, shape: SlotShape, words: Any) -> Any:
    from desisky_tune.training.slots import slot_program

    return slot_program(shape).state_of(words, int(trial.configuration["width"]))
