"""The backend that trains inside the trial's own process.

JAX is imported when the first trial begins, not when this module is: the driver of a
search needs none of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS
from desisky_tune.errors import CheckpointError, MissingFileError
from desisky_tune.search.arrays import Fold, SearchArrays
from desisky_tune.search.backend import CURVE_SERIES, Assignment, Member, Progress
from desisky_tune.search.pooling import MemberCurve, pool, pooled_progress

if TYPE_CHECKING:
    from desisky_tune.search.records import TrialRecord
    from desisky_tune.search.space import TrainingSpec
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


@dataclass(frozen=True)
class _FoldRows:
    """A fold on the device, and the scaling that its training rows gave."""

    scaling: Scaling
    arrays: TrainingArrays
    validation: int


@dataclass(frozen=True)
class _Training:
    """One member under way: the state of its program, and what it has measured.

    `before` is the state (and its epochs) from which the last advance began: what is asked
    for of an earlier epoch is trained again from there.
    """

    program: Any
    state: Any
    epochs: int
    seconds: float
    curve: dict[str, list[float]]
    objectives: list[float]
    failed: bool = False
    before: tuple[int, Any] | None = None


class LocalBackend:
    """Trains one trial at a time, in this process; its members one after another.

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
    """

    def __init__(
        self,
        arrays: SearchArrays,
        training: TrainingSpec,
        folder: Path,
        header: Mapping[str, Any] | None = None,
    ) -> None:
        self._training = training
        self._folder = folder
        self._header = dict(header or {})
        self._features = arrays.features
        self._rows = arrays
        self._folds: dict[int, _FoldRows] = {}
        self._running: dict[int, dict[Member, _Training]] = {}

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        """Train on to `epochs` epochs in total; the state is on disk when this returns."""
        running = self._running.setdefault(trial.number, {})
        if not running:
            # Weights of an unfinished trial, which an interrupt left, are not its last.
            checkpoint_path(self._folder, trial.number).unlink(missing_ok=True)
        for member in trial.trainings:
            training = running.get(member) or self._open(trial, member)
            if training.epochs < epochs:
                training = self._train(trial, member, training, epochs)
            running[member] = training
            if training.failed:
                break
        progress = self._progress(trial, running)
        if trial.keep_members and progress.epochs >= self._training.epochs and not progress.failed:
            self._keep_members(trial, running)
        return progress

    def release(self, trial: Assignment) -> None:
        """Keep the best weights of a trial, and forget it here.

        Its state stays on disk: who releases a trial may only be interrupted, and take it
        up again. `sweep` removes the states of the trials that are finished. A trial of
        several members has no weights of its own: none are kept.
        """
        running = self._running.pop(trial.number, None)
        if not running or len(trial.trainings) > 1 or self._progress(trial, running).failed:
            return
        ((member, training),) = running.items()
        write_checkpoint(
            checkpoint_path(self._folder, trial.number),
            training.program.best_model(training.state),
            self._progress(trial, running),
            trial,
            self._training,
            self._features,
            self._fold(member.fold).scaling,
            self._header,
        )

    def _keep_members(self, trial: Assignment, running: Mapping[Member, _Training]) -> None:
        """Write the weights of every member at the best epoch of its seed's pooled curve."""
        best_epochs = pool(self._curves(running)).best_epochs
        for member, training in running.items():
            epoch = best_epochs[member.seed]
            series = {name: values[epoch] for name, values in training.curve.items()}
            progress = Progress(
                epochs=training.epochs,
                objective=training.objectives[epoch],
                best_epoch=epoch,
                rmse={band: series[band] for band in BANDS},
                train_loss=series["train_loss"],
                test_loss=series["test_loss"],
                seconds=training.seconds,
            )
            origin = dict(self._header.get("search", {}), fold=member.fold)
            write_checkpoint(
                member_path(self._folder, trial.number, member),
                self._model_at(trial, member, training, epoch),
                progress,
                trial,
                self._training,
                self._features,
                self._fold(member.fold).scaling,
                {**self._header, "search": origin, "seed": member.seed},
            )

    def _model_at(self, trial: Assignment, member: Member, training: _Training, epoch: int) -> Any:
        """Return a member's weights after `epoch`, trained again where they were not its best."""
        if epoch == int(np.argmin(training.objectives)):
            return training.program.best_model(training.state)
        done, state = training.before or (0, None)
        if state is None or done > epoch:
            done, state = 0, training.program.init(member.seed)
        arrays = self._fold(member.fold).arrays
        state, _ = training.program.advance(
            state, arrays, _hyperparameters(trial), epoch + 1 - done
        )
        return training.program.last_model(state)

    def _train(
        self, trial: Assignment, member: Member, training: _Training, epochs: int
    ) -> _Training:
        began = time.perf_counter()
        arrays = self._fold(member.fold).arrays
        state, curve = training.program.advance(
            training.state, arrays, _hyperparameters(trial), epochs - training.epochs
        )
        series = dict(
            zip(
                CURVE_SERIES,
                [curve.train_loss, curve.test_loss, *np.asarray(curve.rmse).T],
                strict=True,
            )
        )
        training = replace(
            training,
            before=(training.epochs, training.state) if trial.keep_members else None,
            state=state,
            epochs=training.epochs + len(curve.train_loss),
            seconds=training.seconds + time.perf_counter() - began,
            curve={
                name: [*training.curve.get(name, ()), *map(float, values)]
                for name, values in series.items()
            },
            objectives=[*training.objectives, *map(float, curve.objective)],
            failed=bool(curve.failed),
        )
        if not training.failed:
            self._save(trial, member, training)
        return training

    def _progress(self, trial: Assignment, running: Mapping[Member, _Training]) -> Progress:
        """Say where a trial stands: at the best epoch so far of its members together."""
        curves = self._curves(running)
        seconds = sum(training.seconds for training in running.values())
        for member, training in running.items():
            if training.failed or not training.epochs:
                where = f" (fold {member.fold}, seed {member.seed})" if trial.members else ""
                reason = (
                    "training diverged: a loss was not finite in epoch"
                    f" {training.epochs - 1}{where}"
                )
                return pooled_progress(curves, seconds, reason)
        return pooled_progress(curves, seconds)

    def _curves(self, running: Mapping[Member, _Training]) -> list[MemberCurve]:
        return [
            MemberCurve(
                member, self._fold(member.fold).validation, training.curve, training.objectives
            )
            for member, training in running.items()
        ]

    def _open(self, trial: Assignment, member: Member) -> _Training:
        """Begin a member, or take it up from the state that it left.

        A state that cannot be read, or is another configuration's, is begun anew: what
        comes of a trial is the same either way.
        """
        program = self._program(trial)
        try:
            state, notes = program.load_state(self._state_path(trial, member))
            if notes["trial"] == self._key(trial, member):
                return _Training(program, state, **notes["progress"])
        except (MissingFileError, CheckpointError, KeyError, TypeError):
            pass
        return _Training(program, program.init(member.seed), 0, 0.0, {}, [])

    def _save(self, trial: Assignment, member: Member, training: _Training) -> None:
        progress = {
            "epochs": training.epochs,
            "seconds": training.seconds,
            "curve": training.curve,
            "objectives": training.objectives,
        }
        notes = {"trial": self._key(trial, member), "progress": progress}
        training.program.save_state(self._state_path(trial, member), training.state, notes)

    def _state_path(self, trial: Assignment, member: Member) -> Path:
        return state_path(self._folder, trial.number, member if trial.members else None)

    def _key(self, trial: Assignment, member: Member) -> dict[str, Any]:
        return {
            "number": trial.number,
            "configuration": dict(trial.configuration),
            "seed": member.seed,
            "scaling": self._fold(member.fold).scaling.as_dict(),
        }

    def _fold(self, number: int) -> _FoldRows:
        """Scale a fold by its own training rows and put it on the device, once."""
        if number not in self._folds:
            from desisky_tune.training.program import training_arrays
            from desisky_tune.training.scaling import Scaling

            train, validation = self._rows.training_rows(number), self._rows.validation_rows(number)
            scaling = Scaling.fit(*train)
            arrays = training_arrays(*train, *validation, scaling)
            self._folds[number] = _FoldRows(scaling, arrays, len(validation[0]))
        return self._folds[number]

    def _program(self, trial: Assignment) -> Any:
        from desisky_tune.training.program import program_for

        return program_for(
            in_size=len(self._features),
            out_size=len(BANDS),
            width=int(trial.configuration["width"]),
            depth=int(trial.configuration["depth"]),
            batch_size=int(trial.configuration["batch_size"]),
            loss=self._training.loss,
            select="rmse",
            epochs=self._training.epochs,
        )


def state_path(folder: Path, number: int, member: Member | None = None) -> Path:
    """Where the state of an unfinished trial lies; of one of its members, where it has some."""
    which = "" if member is None else f"-fold{member.fold}-seed{member.seed}"
    return folder / f"{number:05d}{which}.state"


def checkpoint_path(folder: Path, number: int) -> Path:
    """Where the best weights of a trial lie."""
    return folder / f"{number:05d}.eqx"


def member_path(folder: Path, number: int, member: Member) -> Path:
    """Where the weights of one member of a trial lie, where they are kept."""
    return folder / f"{number:05d}-fold{member.fold}-seed{member.seed}.eqx"


def final_path(folder: Path, number: int) -> Path:
    """Where the weights of a trial's configuration lie that were fitted to all its folds' rows."""
    return folder / f"{number:05d}-final.eqx"


def _hyperparameters(trial: Assignment) -> Any:
    from desisky_tune.training.program import Hyperparameters

    return Hyperparameters(
        learning_rate=float(trial.configuration["learning_rate"]),
        huber_delta=float(trial.configuration["huber_delta"]),
    )


def sweep(folder: Path, records: Collection[TrialRecord]) -> None:
    """Remove the states of finished trials: their weights have been kept, or are of no use."""
    finished = {f"{record.number:05d}" for record in records}
    for path in folder.glob("*-fold*.state"):
        if path.name.split("-")[0] in finished:
            path.unlink(missing_ok=True)
    for record in records:
        if record.state == "FAIL" or checkpoint_path(folder, record.number).exists():
            state_path(folder, record.number).unlink(missing_ok=True)


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


def process_environment(*, gpu: bool) -> dict[str, str]:
    """What must stand in the environment of a trial's process before JAX is imported there.

    Compiled programs are kept in the user's cache folder: a shape that any earlier trial
    or search has used costs a tenth of its compile. A trial that asked for no GPU must
    not take one: Ray leaves all of them visible to it.
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
