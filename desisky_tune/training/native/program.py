"""`NativeProgram`: what `desisky_tune.training.program.Program` does, by the native core.

Same states, curves and promises; for an MLP with ReLU under AdamW, with the L2 or Huber loss, on a
CPU. Nothing is compiled per shape, and the interpreter's lock is not held while it trains, so that
one process trains as many at a time as there are cores.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import numpy as np
from numpy.typing import NDArray

from desisky_tune.errors import InputError
from desisky_tune.models.broadband import mlp_of_layers, on_device
from desisky_tune.training.arrays import Curve, TrainingArrays, TrainState, curve_of
from desisky_tune.training.hyperparameters import Hyperparameters, steps_per_epoch
from desisky_tune.training.initial import Layers, initial_layers
from desisky_tune.training.names import LOSSES, SELECTIONS
from desisky_tune.training.native.weights import pack, unpack
from desisky_tune.training.steps import AdamState

_COUNTS = (
    "inputs", "outputs", "width", "depth", "batch", "rows", "validation_rows", "loss", "select",
    "validate_every", "shuffle", "drop_last", "epoch", "epochs", "seed",
    "warmup_steps", "decay_steps",
)  # fmt: skip
_NUMBERS = ("rate", "delta", "final_rate", "weight_decay", "gradient_clip")
_ARRAYS = (
    "x", "y", "validation_x", "validation_y", "target_mean", "target_sd",
    "weights", "first", "second", "best", "table",
)  # fmt: skip


class Training(ctypes.Structure):
    """One call of the core; as ``Training`` in ``training.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        ("steps", ctypes.c_int64),
        ("best_value", ctypes.c_double),
        ("best_epoch", ctypes.c_int64),
        ("failed", ctypes.c_int64),
    )


class NativeProgram:
    """A training of one shape by the native core.

    Parameters
    ----------
    core
        From `desisky_tune.training.native.library`.
    in_size, out_size, width, depth
        Of the MLP.
    batch_size, loss, select, validate_every, shuffle, drop_last
        As for `desisky_tune.training.program.Program`; `loss` is a name.
    """

    def __init__(
        self,
        core: ctypes.CDLL,
        *,
        in_size: int,
        out_size: int,
        width: int,
        depth: int,
        batch_size: int,
        loss: str,
        select: str,
        validate_every: int,
        shuffle: bool,
        drop_last: bool,
    ) -> None:
        self._core = core
        self._shape = (in_size, out_size, width, depth)
        self._sizes = [(in_size, width), *[(width, width)] * (depth - 1), (width, out_size)]
        self._settings: dict[str, int] = {
            "inputs": in_size,
            "outputs": out_size,
            "width": width,
            "depth": depth,
            "batch": batch_size,
            "loss": LOSSES.index(loss),
            "select": SELECTIONS.index(select),
            "validate_every": validate_every,
            "shuffle": shuffle,
            "drop_last": drop_last,
        }

    def init(self, seed: int = 0, model: Any = None) -> TrainState:
        """Begin a training; as `Program.init`."""
        if not 0 <= seed < 2**32:
            raise InputError(f"Program: seed is {seed}; it must be in 0..2**32-1")
        layers = initial_layers(seed, *self._shape) if model is None else self._layers(model)
        return self._beginning(pack(layers), seed)

    @staticmethod
    def _beginning(weights: NDArray[np.float32], seed: int) -> TrainState:
        zeros = np.zeros_like(weights)
        return TrainState(
            parameters=weights,
            optimiser=AdamState(zeros, zeros, np.array(0, np.int32)),
            best_parameters=weights,
            best_value=np.array(np.inf, np.float32),
            best_epoch=np.array(-1, np.int32),
            epoch=np.array(0, np.int32),
            seed=np.array(seed, np.uint32),
            failed=np.array(False),
        )

    def advance(
        self,
        state: TrainState,
        arrays: TrainingArrays,
        hyperparameters: Hyperparameters,
        epochs: int,
    ) -> tuple[TrainState, Curve]:
        """Train for `epochs` more epochs, or until a value is not finite; as `Program.advance`."""
        outputs = self._shape[1]
        rows = len(arrays.train_inputs)
        batch = self._settings["batch"]
        if self._settings["drop_last"] and rows < batch:
            raise InputError(f"drop_last leaves no batch of {batch} out of {rows} rows")
        fixed = [np.ascontiguousarray(part, np.float32) for part in arrays]
        weights, first, second, best = (
            np.array(part, np.float32)
            for part in (
                state.parameters,
                state.optimiser.first,
                state.optimiser.second,
                state.best_parameters,
            )
        )
        settings = hyperparameters.steps(
            steps_per_epoch(rows, batch, bool(self._settings["drop_last"]))
        )
        table = np.empty((max(epochs, 0), 4 + outputs), np.float32)
        # The fields of `TrainingArrays` stand in the order of the structure.
        held = [*fixed, weights, first, second, best, table]
        call = Training(
            **self._settings,
            rows=rows,
            validation_rows=len(arrays.validation_inputs),
            epoch=int(state.epoch),
            epochs=len(table),
            seed=int(state.seed),
            delta=np.float32(hyperparameters.huber_delta),
            rate=settings.learning_rate,
            warmup_steps=int(settings.warmup_steps),
            decay_steps=int(settings.decay_steps),
            final_rate=settings.final_rate,
            weight_decay=settings.weight_decay,
            gradient_clip=settings.gradient_clip,
            **{name: part.ctypes.data for name, part in zip(_ARRAYS, held, strict=True)},
            steps=int(state.optimiser.steps),
            best_value=float(state.best_value),
            best_epoch=int(state.best_epoch),
            failed=bool(state.failed),
        )
        done = self._core.train(ctypes.byref(call))
        if done < 0:
            raise MemoryError(f"no memory to train an MLP of {self._shape[2]} x {self._shape[3]}")
        failed = bool(call.failed)
        after = TrainState(
            parameters=weights,
            optimiser=AdamState(first, second, np.array(call.steps, np.int32)),
            best_parameters=best,
            best_value=np.array(call.best_value, np.float32),
            best_epoch=np.array(call.best_epoch, np.int32),
            epoch=np.array(call.epoch, np.int32),
            seed=state.seed,
            failed=np.array(failed),
        )
        return after, curve_of(table[:done], failed)

    def best_model(self, state: TrainState) -> Any:
        """Return the model of the best epoch (the initial one before any), in its own space."""
        return self._model(state.best_parameters)

    def last_model(self, state: TrainState) -> Any:
        """Return the model of the last epoch, in its own space."""
        return self._model(state.parameters)

    def save_state(
        self,
        path: str | os.PathLike[str],
        state: TrainState,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a state to a file, atomically; as `Program.save_state`."""
        from desisky_tune.training.state_file import write_state

        write_state(path, state, notes)

    def load_state(self, path: str | os.PathLike[str]) -> tuple[TrainState, dict[str, Any]]:
        """Read a state of this program and its notes back; as `Program.load_state`."""
        from desisky_tune.training.state_file import read_state

        return read_state(path, self._like())

    def _like(self) -> TrainState:
        weights: NDArray[np.float32] = np.zeros(
            self._core.parameter_count(*self._shape), np.float32
        )
        return self._beginning(weights, 0)

    def _layers(self, model: Any) -> Layers:
        misfit = InputError("Program.init: the model is not of the structure of this program")
        if not isinstance(model, eqx.nn.MLP):
            raise misfit
        layers = [(np.asarray(layer.weight), np.asarray(layer.bias)) for layer in model.layers]
        sizes = [weight.shape[::-1] for weight, _ in layers]
        if sizes != self._sizes or any(w.dtype != np.float32 for layer in layers for w in layer):
            raise misfit
        return layers

    def _model(self, packed: Any) -> eqx.nn.MLP:
        return mlp_of_layers(on_device(unpack(packed, self._sizes)))
