"""The backend that trains inside the trial's own process.

JAX is imported when the first trial begins, not when this module is: the driver of a
search needs none of it.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, FEATURES
from desisky_tune.errors import CheckpointError, MissingFileError
from desisky_tune.search.backend import CURVE_SERIES, Assignment, Progress
from desisky_tune.search.patience import TRIAL_PATIENCE_SECONDS, patiently

if TYPE_CHECKING:
    from desisky_tune.data.features import FeatureTable
    from desisky_tune.search.records import TrialRecord
    from desisky_tune.search.space import TrainingSpec
    from desisky_tune.training.scaling import Scaling


@dataclass(frozen=True)
class SearchArrays:
    """The rows that a search may see: training and validation, never the test rows.

    Attributes
    ----------
    train_inputs, validation_inputs
        Raw features, float32, (n, f).
    train_targets, validation_targets
        Magnitudes in V, g, r, z, float32, (n, 4).
    features
        Names of the columns of the inputs.
    """

    train_inputs: np.ndarray
    train_targets: np.ndarray
    validation_inputs: np.ndarray
    validation_targets: np.ndarray
    features: tuple[str, ...] = FEATURES

    @classmethod
    def from_table(
        cls,
        table: FeatureTable,
        train: np.ndarray,
        validation: np.ndarray,
        features: Sequence[str] = FEATURES,
    ) -> SearchArrays:
        """Take the rows of a table; `train` and `validation` are positions in it."""
        train_inputs, train_targets = table.arrays(train, features)
        validation_inputs, validation_targets = table.arrays(validation, features)
        return cls(
            train_inputs, train_targets, validation_inputs, validation_targets, tuple(features)
        )


@dataclass(frozen=True)
class _Running:
    """A trial under way: the state of its program, and what it has measured."""

    program: Any
    state: Any
    epochs: int
    seconds: float
    curve: dict[str, list[float]]
    objectives: list[float]


class LocalBackend:
    """Trains one trial at a time, in this process.

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
        from desisky_tune.training.program import training_arrays
        from desisky_tune.training.scaling import Scaling

        self._training = training
        self._folder = folder
        self._header = dict(header or {})
        self._features = arrays.features
        self._scaling = Scaling.fit(arrays.train_inputs, arrays.train_targets)
        self._arrays = training_arrays(
            arrays.train_inputs,
            arrays.train_targets,
            arrays.validation_inputs,
            arrays.validation_targets,
            self._scaling,
        )
        self._running: dict[int, _Running] = {}

    def advance(self, trial: Assignment, epochs: int) -> Progress:
        """Train on to `epochs` epochs in total; the state is on disk when this returns."""
        running = self._running.get(trial.number)
        if running is None:
            running = patiently(lambda: self._open(trial), limit=TRIAL_PATIENCE_SECONDS)
        if running.epochs < epochs:
            running = self._train(trial, running, epochs)
        self._running[trial.number] = running
        return self._progress(running)

    def release(self, trial: Assignment) -> None:
        """Keep the best weights of a trial, and forget it here.

        Its state stays on disk: who releases a trial may only be interrupted, and take it
        up again. `sweep` removes the states of the trials that are finished.
        """
        running = self._running.pop(trial.number, None)
        if running is None or self._progress(running).failed:
            return
        write = functools.partial(
            write_checkpoint,
            checkpoint_path(self._folder, trial.number),
            running.program.best_model(running.state),
            self._progress(running),
            trial,
            self._training,
            self._features,
            self._scaling,
            self._header,
        )
        patiently(write, limit=TRIAL_PATIENCE_SECONDS)

    def _train(self, trial: Assignment, running: _Running, epochs: int) -> _Running:
        from desisky_tune.training.program import Hyperparameters

        began = time.perf_counter()
        hyperparameters = Hyperparameters(
            learning_rate=float(trial.configuration["learning_rate"]),
            huber_delta=float(trial.configuration["huber_delta"]),
        )
        state, curve = running.program.advance(
            running.state, self._arrays, hyperparameters, epochs - running.epochs
        )
        series = dict(
            zip(
                CURVE_SERIES,
                [curve.train_loss, curve.test_loss, *np.asarray(curve.rmse).T],
                strict=True,
            )
        )
        running = replace(
            running,
            state=state,
            epochs=running.epochs + len(curve.train_loss),
            seconds=running.seconds + time.perf_counter() - began,
            curve={
                name: [*running.curve.get(name, ()), *map(float, values)]
                for name, values in series.items()
            },
            objectives=[*running.objectives, *map(float, curve.objective)],
        )
        if not self._progress(running).failed:
            patiently(lambda: self._save(trial, running), limit=TRIAL_PATIENCE_SECONDS)
        return running

    def _progress(self, running: _Running) -> Progress:
        """Say where a trial stands: at the best epoch so far, as its program chose it."""
        best = int(running.state.best_epoch)
        failed = bool(running.state.failed)
        nan = math.nan
        if failed or best < 0:
            return Progress(
                epochs=running.epochs,
                objective=nan,
                best_epoch=-1,
                rmse={},
                train_loss=nan,
                test_loss=nan,
                seconds=running.seconds,
                curve=running.curve,
                objectives=running.objectives,
                reason=f"training diverged: a loss was not finite in epoch {running.epochs - 1}",
            )
        return Progress(
            epochs=running.epochs,
            objective=float(running.state.best_value),
            best_epoch=best,
            rmse={band: running.curve[band][best] for band in BANDS},
            train_loss=running.curve["train_loss"][best],
            test_loss=running.curve["test_loss"][best],
            seconds=running.seconds,
            curve=running.curve,
            objectives=running.objectives,
        )

    def _open(self, trial: Assignment) -> _Running:
        """Begin a trial, or take it up from the state that it left.

        A state that cannot be read, or is another configuration's, is begun anew: what
        comes of a trial is the same either way.
        """
        # Weights of an unfinished trial, which an interrupt left, are not its last.
        checkpoint_path(self._folder, trial.number).unlink(missing_ok=True)
        program = self._program(trial)
        path = state_path(self._folder, trial.number)
        try:
            state, notes = program.load_state(path)
            if notes["trial"] == self._key(trial):
                return _Running(program, state, **notes["progress"])
        except (MissingFileError, CheckpointError, KeyError, TypeError):
            pass
        return _Running(program, program.init(trial.seed), 0, 0.0, {}, [])

    def _save(self, trial: Assignment, running: _Running) -> None:
        progress = {
            "epochs": running.epochs,
            "seconds": running.seconds,
            "curve": running.curve,
            "objectives": running.objectives,
        }
        notes = {"trial": self._key(trial), "progress": progress}
        running.program.save_state(state_path(self._folder, trial.number), running.state, notes)

    def _key(self, trial: Assignment) -> dict[str, Any]:
        return {
            "number": trial.number,
            "configuration": dict(trial.configuration),
            "seed": trial.seed,
            "scaling": self._scaling.as_dict(),
        }

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


def state_path(folder: Path, number: int) -> Path:
    """Where the state of an unfinished trial lies."""
    return folder / f"{number:05d}.state"


def checkpoint_path(folder: Path, number: int) -> Path:
    """Where the best weights of a trial lie."""
    return folder / f"{number:05d}.eqx"


def sweep(folder: Path, records: Iterable[TrialRecord]) -> None:
    """Remove the states of finished trials: their weights have been kept, or are of no use."""
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
