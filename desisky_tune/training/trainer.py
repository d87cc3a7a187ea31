"""`BroadbandTrainer`: a model, two loaders, and the best model back."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np
import optax

from desisky_tune.data.columns import BANDS
from desisky_tune.errors import DesiskyTuneError, InputError
from desisky_tune.training.batches import (
    Order,
    epoch_batches,
    feature_names,
    gather,
    loader_order,
    refuse_one_shot,
)
from desisky_tune.training.config import TrainingConfig, TrainingHistory
from desisky_tune.training.lean import LeanStepper
from desisky_tune.training.loop import BatchTraining, CompiledTraining, Training, rows_of
from desisky_tune.training.program import (
    Curve,
    Hyperparameters,
    Program,
    program_for,
    training_arrays,
)
from desisky_tune.training.scaling import Scaling, fold, is_raw_space, mark_raw_space, unfold

if TYPE_CHECKING:
    from desisky_tune.training.native.program import NativeProgram

#: A training is advanced in pieces of about this long, between which Ctrl-C is heard.
CHUNK_SECONDS = 0.5

EpochCallback = Callable[[Any, TrainingHistory, int], None]


class BroadbandTrainer:
    """Train a broadband model, keep the best, save it.

    Parameters
    ----------
    model
        An Equinox module that maps one row of inputs ``(f,)`` to magnitudes ``(4,)``.
    config
        See `TrainingConfig`.
    optimizer
        Any optax optimizer; Adam with ``config.learning_rate`` by default.
    on_epoch_end
        Called after each epoch with the model as it then is, the history, and the epoch.
    raw_space
        With ``standardize=True``: True when `model` takes raw features and gives magnitudes and
        so must be unfolded first, False when it is a fresh one. By default this is known: a
        model from a checkpoint, or from an earlier training, is unfolded.

    Attributes
    ----------
    model
        What was given; after `train`, the best model.
    config, optimizer, history
        Settings, the optax optimizer in use, and the losses of the last `train`.
    checkpoint_path
        Where the best model is saved.
    """

    def __init__(
        self,
        model: Any,
        config: TrainingConfig,
        optimizer: optax.GradientTransformation | None = None,
        on_epoch_end: EpochCallback | None = None,
        *,
        raw_space: bool | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.optimizer = optimizer or optax.adam(config.learning_rate)
        self.on_epoch_end = on_epoch_end
        self.history = TrainingHistory(config=config)
        self.raw_space = raw_space
        self._custom_optimizer = optimizer
        self._scaling: Scaling | None = None
        self._features: list[str] | None = None
        self._best_row: dict[str, Any] = {}
        self._saved_epoch = -1
        self._saved_at = 0.0

    @property
    def checkpoint_path(self) -> Path:
        """Where the best model is saved."""
        from desisky_tune.io import get_user_model_dir

        folder = self.config.save_dir
        base = get_user_model_dir("broadband") if folder is None else Path(folder).expanduser()
        return base / f"{self.config.run_name}.eqx"

    def train(self, train_loader: Any, test_loader: Any) -> tuple[Any, TrainingHistory]:
        """Train for ``config.epochs`` epochs.

        Loaders over a fixed table (`NumpyLoader`, or PyTorch's own, over a
        `SkyBrightnessDataset` or subsets of one) are gathered and trained on by one compiled
        program. Anything else is iterated batch by batch.

        Parameters
        ----------
        train_loader, test_loader
            Give batches (inputs, targets, ...) of ``(b, f)`` and ``(b, 4)``.

        Returns
        -------
        model, history
            The model of the epoch with the lowest test loss, which takes raw features and gives
            magnitudes, and the losses.

        Raises
        ------
        InputError
            When the loaders do not fit, hold values that are not finite, or `standardize` is
            asked for a model that is no MLP.
        DesiskyTuneError
            When the loss was not finite before any epoch was better than another.
        KeyboardInterrupt
            Passed on after the best model so far is saved.
        """
        self.history = TrainingHistory(config=self.config)
        self._best_row, self._saved_epoch = {}, -1
        self._saved_at = time.perf_counter()
        program, training = self._begin(train_loader, test_loader)
        try:
            self._run(program, training)
        except KeyboardInterrupt:
            self._finish(program, training)
            self._say(self._interrupted())
            raise
        self._finish(program, training)
        if self.history.best_epoch < 0:
            raise DesiskyTuneError(
                f"training diverged in epoch {len(self.history.train_losses) - 1}: the loss is"
                f" not finite; lower learning_rate (now {self.config.learning_rate:g})"
            )
        return self.model, self.history

    # ------------------------------------------------------------------ before

    def _begin(
        self, train_loader: Any, test_loader: Any
    ) -> tuple[Program | NativeProgram, Training]:
        self._features = feature_names(train_loader)
        self._check_features(feature_names(test_loader))
        config = self.config
        hyperparameters = Hyperparameters(config.learning_rate, config.huber_delta)
        train, test = gather(train_loader), gather(test_loader)
        if train is not None and test is not None:
            seen, measured = train.visited(), test.visited()
            self._check_sizes(seen.inputs.shape[1], seen.targets.shape[1])
            self._fit(seen.inputs, seen.targets)
            arrays = training_arrays(
                seen.inputs, seen.targets, measured.inputs, measured.targets, self._scaling
            )
            program = self._program(train.order)
            state = program.init(config.seed, self._initial_model())
            return program, CompiledTraining(program, state, arrays, hyperparameters)
        refuse_one_shot(train_loader, "training loader")
        refuse_one_shot(test_loader, "test loader")
        if config.standardize:
            self._fit(*rows_of(lambda: epoch_batches(train_loader, config.seed, 0)))
        program = self._general_program(loader_order(train_loader) or Order(32, False, False))
        state = program.init(config.seed, self._initial_model())
        return program, BatchTraining(
            program,
            state,
            (train_loader, test_loader),
            self._scaling,
            hyperparameters,
            config.validate_every,
        )

    def _check_features(self, test_features: list[str] | None) -> None:
        """Find out now, not after the training, that the checkpoint could not be written."""
        names = self._features
        if names is not None and test_features is not None and names != test_features:
            raise InputError(
                f"training and test rows have different inputs: {', '.join(names)} and"
                f" {', '.join(test_features)}"
            )
        if self.config.save_best:
            self._header(self.model)

    def _check_sizes(self, inputs: int, targets: int) -> None:
        model = self.model
        if isinstance(model, eqx.nn.MLP) and (model.in_size, model.out_size) != (inputs, targets):
            raise InputError(
                f"rows of {inputs} inputs and {targets} targets, and a model that maps"
                f" {model.in_size} to {model.out_size}"
            )

    def _fit(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        self._scaling = Scaling.fit(inputs, targets) if self.config.standardize else None

    def _initial_model(self) -> Any:
        if self._scaling is None:
            return self.model
        # Unfolding in any case finds out now whether the model can be folded at the end.
        unfolded = unfold(self.model, self._scaling)
        raw = is_raw_space(self.model) if self.raw_space is None else self.raw_space
        return unfolded if raw else self.model

    def _program(self, order: Order) -> Program | NativeProgram:
        """Return the fastest program for gathered rows."""
        model = self.model
        if self._custom_optimizer is None and LeanStepper.fits(model):
            return program_for(
                in_size=model.in_size,
                out_size=model.out_size,
                width=model.width_size,
                depth=model.depth,
                **self._settings(order),
            )
        return self._general_program(order)

    def _general_program(self, order: Order) -> Program:
        """Return a program that can also be taken batch by batch."""
        return Program(self.model, optimizer=self._custom_optimizer, **self._settings(order))

    def _settings(self, order: Order) -> dict[str, Any]:
        config = self.config
        return {
            "batch_size": order.batch_size,
            "loss": config.loss,
            "select": "loss",
            "validate_every": config.validate_every,
            "shuffle": order.shuffle,
            "drop_last": order.drop_last,
        }

    # ------------------------------------------------------------------ during

    def _run(self, program: Program | NativeProgram, training: Training) -> None:
        epochs = self.config.epochs
        chunk = 1
        while len(self.history.train_losses) < epochs:
            began = time.perf_counter()
            first = len(self.history.train_losses)
            curve = training.advance(min(chunk, epochs - first))
            self._record(curve, first)
            if curve.failed:
                warnings.warn(
                    f"training stopped after epoch {len(self.history.train_losses) - 1}: the loss"
                    " is not finite; the best model before it is kept",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return
            if self.on_epoch_end is not None:
                model = self._magnitude_model(program.last_model(training.state))
                self.on_epoch_end(model, self.history, first)
            else:
                pace = max(time.perf_counter() - began, 1e-6) / len(curve)
                chunk = max(1, min(8 * chunk, int(CHUNK_SECONDS / pace)))
            if time.perf_counter() - self._saved_at > CHUNK_SECONDS:
                self._save(program, training)

    def _record(self, curve: Curve, first: int) -> None:
        history, config = self.history, self.config
        for offset in range(len(curve)):
            epoch = first + offset
            train_loss = float(curve.train_loss[offset])
            history.train_losses.append(train_loss)
            if curve.validated[offset]:
                test_loss = float(curve.test_loss[offset])
                history.test_losses.append(test_loss)
                finite = not (curve.failed and offset == len(curve) - 1)
                if finite and test_loss < history.best_test_loss:
                    history.best_test_loss, history.best_epoch = test_loss, epoch
                    self._best_row = {
                        "epoch": epoch,
                        "test_loss": test_loss,
                        "train_loss": train_loss,
                        "per_band_rmse": _by_band(curve.rmse[offset]),
                    }
            if config.print_every and epoch % config.print_every == 0:
                test = history.test_losses[-1] if history.test_losses else float("nan")
                self._say(
                    f"epoch {epoch:4d}  train loss {train_loss:.6f}  test loss {test:.6f}"
                    f"  best {history.best_test_loss:.6f} (epoch {history.best_epoch})"
                )

    # ------------------------------------------------------------------ after

    def _finish(self, program: Program | NativeProgram, training: Training) -> None:
        if self.history.best_epoch >= 0:
            self._save(program, training)
            self.model = self._magnitude_model(program.best_model(training.state))

    def _magnitude_model(self, model: Any) -> Any:
        return mark_raw_space(model) if self._scaling is None else fold(model, self._scaling)

    def _header(self, model: Any) -> dict[str, Any]:
        from desisky_tune.io import checkpoint_meta

        training = {**self._best_row, "config": self.config.recorded()}
        return checkpoint_meta(
            model, features=self._features, scaling=self._scaling, training=training
        )

    def _save(self, program: Program | NativeProgram, training: Training) -> None:
        best = self.history.best_epoch
        if not self.config.save_best or best in (-1, self._saved_epoch):
            return
        from desisky_tune.io import save

        model = self._magnitude_model(program.best_model(training.state))
        save(self.checkpoint_path, model, self._header(model))
        self._saved_epoch = best
        self._saved_at = time.perf_counter()

    def _interrupted(self) -> str:
        history = self.history
        done = len(history.train_losses)
        if self._saved_epoch < 0:
            return f"interrupted after {done} epochs; no checkpoint was written"
        return (
            f"interrupted after {done} epochs; the best model so far (epoch"
            f" {history.best_epoch}, test loss {history.best_test_loss:.6f}) is in"
            f" {self.checkpoint_path}"
        )

    def _say(self, line: str) -> None:
        print(line, flush=True)


def _by_band(rmse: np.ndarray) -> dict[str, float]:
    names = BANDS if len(rmse) == len(BANDS) else [str(band) for band in range(len(rmse))]
    return {name: float(value) for name, value in zip(names, rmse, strict=True)}
