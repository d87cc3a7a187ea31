"""The backend that trains with one program per trial, in the process that calls it.

JAX is not imported when this module is: the driver of a search needs none of it.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from desisky_tune.data.columns import BANDS
from desisky_tune.search.arrays import Fold, SearchArrays
from desisky_tune.search.backend import Assignment, Member, Progress
from desisky_tune.search.figures import Meter
from desisky_tune.search.hyperparameters import of_training
from desisky_tune.search.pooling import member_progress, pool
from desisky_tune.search.pretraining import PretrainedWeights
from desisky_tune.search.trainings import (
    RunningTrial,
    Training,
    curves_of,
    next_goal,
    where_it_stands,
)
from desisky_tune.search.trial_files import (
    TrialFiles,
    checkpoint_path,
    final_path,
    member_path,
    state_path,
    sweep,
)

if TYPE_CHECKING:
    from desisky_tune.search.patience import StorageWatch
    from desisky_tune.search.pretraining import Pretraining
    from desisky_tune.search.sections import TrainingSpec
    from desisky_tune.search.storage import RunMirror
    from desisky_tune.training.hyperparameters import Hyperparameters
    from desisky_tune.training.program import TrainingArrays
    from desisky_tune.training.scaling import Scaling

__all__ = [
    "Fold",
    "LocalBackend",
    "SearchArrays",
    "checkpoint_path",
    "final_path",
    "member_path",
    "process_environment",
    "state_path",
    "sweep",
    "write_checkpoint",
]


#: Trials that an engine may be keeping or opening while others train in each of its lanes.
BESIDE = 2


@dataclass(frozen=True)
class _FoldRows:
    """A fold on the device, and the scaling that its training rows gave."""

    scaling: Scaling
    arrays: TrainingArrays
    validation: int


@dataclass(frozen=True)
class _Training(Training):
    """One member under way.

    `before` is the state (and its epochs) from which the last advance began: what is asked
    for of an earlier epoch is trained again from there.
    """

    program: Any = None
    before: tuple[int, Any] | None = None


class _Compiled:
    """Whether a program has been compiled for arrays of a shape; the lock is whose turn it is."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done = False


class LocalBackend:
    """Trains trials in this process, each in the thread that asks for it.

    Several threads may train a trial each; one trial's members follow one another. What two
    threads need is compiled once, while the other waits. States, weights and the first weights
    of a trial are made beside the trainings of others.

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
        Where a run on a URL has its files: each is put there, and fetched when it is wanted.
    lanes
        How many of the calling threads train at a time: the cores that they have. None for all.
    pretraining
        What trainings begin with; None where their weights are drawn.
    storage
        Told where the trials' files cannot be written, and when they can again.
    of_run
        Whether `folder` lies in a run's: see `desisky_tune.search.trial_files.TrialFiles`.

    Attributes
    ----------
    room
        Threads that may call at a time: some beside those that train.
    meter
        How long was compiled and trained, by all threads together.
    """

    def __init__(
        self,
        arrays: SearchArrays,
        training: TrainingSpec,
        folder: Path,
        header: Mapping[str, Any] | None = None,
        mirror: RunMirror | None = None,
        *,
        lanes: int | None = None,
        pretraining: Pretraining | None = None,
        storage: StorageWatch | None = None,
        of_run: bool = False,
    ) -> None:
        self._training = training
        self._files = TrialFiles(folder, mirror, storage, of_run=of_run)
        self._header = dict(header or {})
        self._features = arrays.features
        self._rows = arrays
        self._folds: dict[int, _FoldRows] = {}
        self._trials: dict[int, RunningTrial[_Training]] = {}
        self._compiled: WeakKeyDictionary[Any, dict[Any, _Compiled]] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._places = nullcontext() if lanes is None else threading.BoundedSemaphore(lanes)
        self.room = BESIDE + (lanes or 1)
        self.meter = Meter(lanes or 1)
        self._start = PretrainedWeights(pretraining, self.meter, storage)

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        """Train on to `epochs` epochs in total; the state is on disk when this returns."""
        with self._lock:
            running = self._trials.setdefault(trial.number, RunningTrial())
        with running.lock:
            trainings = running.trainings
            if not trainings:
                self._files.discard_weights(trial)
            progress: Progress | None = None
            while progress is None or not progress.ends_at(epochs):
                goal = next_goal(trial, trainings, self._validation, epochs)
                # On the way to where early stopping looks again, nothing need be on disk.
                self._train_all(trial, trainings, goal, keep=goal == epochs)
                progress = self._progress(trial, trainings)
                if progress.stopped and goal < epochs:
                    for member, training in trainings.items():
                        self._save(trial, member, training)
            complete = progress.ends_at(self._training.epochs) and not progress.failed
            if trial.keep_members and complete:
                self._keep_members(trial, trainings)
            return progress

    def release(self, trial: Assignment) -> None:
        """Keep the best weights of a trial, and forget it here.

        Its state stays on disk: who releases a trial may only be interrupted, and take it
        up again. `sweep` removes the states of the trials that are finished. A trial of
        several members has no weights of its own: none are kept.
        """
        with self._lock:
            running = self._trials.pop(trial.number, None)
        if running is None:
            return
        with running.lock:
            trainings = running.trainings
            if not trainings or len(trial.trainings) > 1 or self._progress(trial, trainings).failed:
                return
            ((member, training),) = trainings.items()
            write = functools.partial(
                write_checkpoint,
                model=training.program.best_model(training.state),
                progress=self._progress(trial, trainings),
                trial=trial,
                training=self._training,
                features=self._features,
                scaling=self._fold(member.fold).scaling,
                header={**self._header, **self._start.header(trial.configuration)},
            )
            self._files.write_weights(trial, write)

    def forget(self, trial: Assignment) -> None:
        """Let go of a trial that goes on elsewhere, from its state on disk; write nothing."""
        with self._lock:
            self._trials.pop(trial.number, None)

    def _keep_members(self, trial: Assignment, running: Mapping[Member, _Training]) -> None:
        """Write the weights of every member at the best epoch of its seed's pooled curve."""
        best_epochs = pool(curves_of(running, self._validation)).best_epochs
        header = {**self._header, **self._start.header(trial.configuration)}
        for member, training in running.items():
            epoch = best_epochs[member.seed]
            write = functools.partial(
                write_checkpoint,
                model=self._model_at(trial, member, training, epoch),
                progress=member_progress(
                    training.curve, training.objectives, training.seconds, epoch
                ),
                trial=trial,
                training=self._training,
                features=self._features,
                scaling=self._fold(member.fold).scaling,
                header=member_header(header, member),
            )
            self._files.write_member(trial, member, write)

    def _model_at(self, trial: Assignment, member: Member, training: _Training, epoch: int) -> Any:
        """Return a member's weights after `epoch`, trained again where they were not its best."""
        if epoch == int(np.argmin(training.objectives)):
            return training.program.best_model(training.state)
        done, state = training.before or (0, None)
        if state is None or done > epoch:
            done, state = 0, self._initial(trial, member, training.program)
        arrays = self._fold(member.fold).arrays
        with self._places, self.meter.spending("training"):
            state, _ = training.program.advance(
                state, arrays, self._hyperparameters(trial), epoch + 1 - done
            )
        return training.program.last_model(state)

    def _train_all(
        self, trial: Assignment, trainings: dict[Member, _Training], epochs: int, *, keep: bool
    ) -> None:
        """Take the members to `epochs`, one after the other, until one fails.

        With `keep`, each is on disk as soon as it is there.
        """
        for member in trial.trainings:
            training = trainings.get(member)
            if training is None:
                training = self._open(trial, member)
            if training.epochs < epochs:
                training = self._train(trial, member, training, epochs)
                if keep and not training.failed:
                    self._save(trial, member, training)
            trainings[member] = training
            if training.failed:
                break

    def _train(
        self, trial: Assignment, member: Member, training: _Training, epochs: int
    ) -> _Training:
        arrays = self._fold(member.fold).arrays
        with self._places, self.meter.spending("training"):
            began = time.perf_counter()
            state, curve = training.program.advance(
                training.state, arrays, self._hyperparameters(trial), epochs - training.epochs
            )
            seconds = time.perf_counter() - began
        return training.after(
            [curve],
            state,
            seconds,
            before=(training.epochs, training.state) if trial.keep_members else None,
        )

    def _progress(self, trial: Assignment, running: Mapping[Member, _Training]) -> Progress:
        return where_it_stands(trial, running, self._validation)

    def _open(self, trial: Assignment, member: Member) -> _Training:
        """Begin a member, or take it up from the state that it left.

        A state that cannot be read, or is another configuration's, is begun anew: what
        comes of a trial is the same either way.
        """
        program = self._program(trial)
        self._compile(program, self._fold(member.fold).arrays)
        left = self._files.read_state(trial, member, program.load_state)
        if left is not None and left[1].get("trial") == self._key(trial, member):
            return _Training(left[0], **left[1]["progress"], program=program)
        return _Training(self._initial(trial, member, program), program=program)

    def _initial(self, trial: Assignment, member: Member, program: Any) -> Any:
        """Return the state in which a training begins."""
        scaling = self._fold(member.fold).scaling
        model = self._start.initial_model(trial.configuration, member.seed, scaling)
        return program.init(member.seed, model)

    def _save(self, trial: Assignment, member: Member, training: _Training) -> None:
        notes = {"trial": self._key(trial, member), "progress": training.notes()}
        self._files.write_state(
            trial,
            member,
            lambda path: training.program.save_state(path, training.state, notes),
        )

    def _key(self, trial: Assignment, member: Member) -> dict[str, Any]:
        return {
            "number": trial.number,
            "configuration": dict(trial.configuration),
            "seed": member.seed,
            "scaling": self._fold(member.fold).scaling.as_dict(),
        }

    def _fold(self, number: int) -> _FoldRows:
        """Scale a fold by its own training rows and put it on the device, once."""
        with self._lock:
            if number not in self._folds:
                from desisky_tune.training.program import training_arrays
                from desisky_tune.training.scaling import Scaling

                train = self._rows.training_rows(number)
                validation = self._rows.validation_rows(number)
                scaling = Scaling.fit(*train)
                arrays = training_arrays(*train, *validation, scaling)
                self._folds[number] = _FoldRows(scaling, arrays, len(validation[0]))
            return self._folds[number]

    def _validation(self, fold: int) -> int:
        return self._fold(fold).validation

    def _hyperparameters(self, trial: Assignment) -> Hyperparameters:
        return of_training(trial.configuration, self._training.epochs)

    def _program(self, trial: Assignment) -> Any:
        from desisky_tune.training.program import program_for

        # Two threads that asked at once would get two programs. The first one ever may compile
        # the native core.
        with self.meter.spending("compiling"), self._lock:
            return program_for(
                in_size=len(self._features),
                out_size=len(BANDS),
                width=int(trial.configuration["width"]),
                depth=int(trial.configuration["depth"]),
                batch_size=int(trial.configuration["batch_size"]),
                loss=self._training.loss,
                select="rmse",
                epochs=self._training.epochs,
                extended=self._hyperparameters(trial).extended,
            )

    def _compile(self, program: Any, arrays: TrainingArrays) -> None:
        """Compile a program, where it has to be: once, by the first thread that needs it."""
        prepare = getattr(program, "prepare", None)
        if prepare is None:
            return  # native code
        shapes = tuple(part.shape for part in arrays)
        with self._lock:
            compiled = self._compiled.setdefault(program, {}).setdefault(shapes, _Compiled())
        with compiled.lock:
            if not compiled.done:
                with self.meter.spending("compiling"):
                    prepare(arrays)
                compiled.done = True


def write_checkpoint(
    path: Path,
    model: Any,
    progress: Progress,
    trial: Assignment,
    training: TrainingSpec,
    features: Sequence[str],
    scaling: Scaling,
    header: Mapping[str, Any],
) -> None:
    """Write a trial's best weights, scaling folded in, with the documented header."""
    from desisky_tune.io import checkpoint_meta, save
    from desisky_tune.training.scaling import fold

    folded = fold(model, scaling)
    meta = checkpoint_meta(
        folded,
        features=features,
        scaling=scaling,
        training={
            "epoch": progress.best_epoch,
            "test_loss": progress.test_loss,
            "train_loss": progress.train_loss,
            "per_band_rmse": dict(progress.rmse),
            "config": {
                "epochs": training.epochs,
                "loss": training.loss,
                **{
                    name: value
                    for name, value in trial.configuration.items()
                    if name not in ("width", "depth")
                },
            },
        },
        **{**header, "search": {**header.get("search", {}), "trial": trial.number}},
    )
    save(path, folded, meta)


def member_header(header: Mapping[str, Any], member: Member) -> dict[str, Any]:
    """Return what the checkpoint of one training of a trial says of its origin."""
    origin = {**header.get("search", {}), "fold": member.fold}
    return {**header, "search": origin, "seed": member.seed}


def process_environment(*, gpu: bool) -> dict[str, str]:
    """What must stand in the environment of a process that trains before JAX is imported there.

    Compiled programs are kept in the user's cache folder: a shape that any earlier trial
    or search has used costs a tenth of its compile. Who trains on the CPU must not take a
    GPU: Ray leaves all of them visible to it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "desisky_tune" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if not gpu:
        defaults["JAX_PLATFORMS"] = "cpu"
    return {name: os.environ.get(name, value) for name, value in defaults.items()}
