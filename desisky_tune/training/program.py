"""The compiled core: one program advances a training by any number of epochs.

A `Program` is compiled once per shape (model, batch size, rows). The number of epochs, the
learning rate, the Huber delta and the seed are traced values: a new one compiles nothing. Within
a call nothing goes to the host: the shuffle is drawn from (seed, epoch) on the device, the best
parameters and the curve stay there, and the curve comes back as one array at the end.

A training is a function of (model, seed, arrays, hyperparameters, shape) alone: advancing it 25
times by 20 epochs, or once by 500, or through a file in between, gives the same bits.

On a CPU `program_for` prefers the core in C (`desisky_tune.training.native`), which has the same
face and keeps the same promises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from desisky_tune.errors import InputError
from desisky_tune.models.broadband import mlp_of_layers, on_device
from desisky_tune.training.arrays import (
    Curve,
    TargetScale,
    TrainingArrays,
    TrainState,
    curve_of,
    training_arrays,
)
from desisky_tune.training.epochs import Epochs
from desisky_tune.training.hyperparameters import Hyperparameters, steps_per_epoch
from desisky_tune.training.initial import initial_layers
from desisky_tune.training.lean import LeanStepper
from desisky_tune.training.losses import named_loss
from desisky_tune.training.names import SELECTIONS
from desisky_tune.training.steps import ExtendedStepper, GenericStepper, Stepper, trainable

if TYPE_CHECKING:
    from desisky_tune.training.native.program import NativeProgram

__all__ = [
    "Curve",
    "Hyperparameters",
    "Program",
    "TargetScale",
    "TrainState",
    "TrainingArrays",
    "program_for",
    "training_arrays",
]

#: Epochs that one call on the device can record; a longer advance makes several calls.
DEFAULT_CAPACITY = 512


class Program:
    """A compiled training of one shape.

    Parameters
    ----------
    model
        An Equinox module of the structure to train; its weights are not used.
    batch_size
        Rows a step.
    loss
        "l2", "huber", or a callable ``(pred, targets) -> scalar``.
    select
        Keep the parameters of the epoch with the lowest "rmse" (the objective: mean over the
        outputs of the RMSE over the validation rows) or the lowest test "loss".
    optimizer
        Any optax optimizer; None is Adam, whose learning rate is then traced.
    validate_every
        Validate every so many epochs, from epoch 0 on.
    shuffle
        Draw a new order of the rows each epoch.
    drop_last
        Leave out the rows that do not fill a batch.
    capacity
        Epochs that one device call can record.
    lean
        False takes the general step where the lean one would fit (for comparison).
    extended
        Take what `Hyperparameters` may ask for beside a learning rate: schedule, weight decay,
        clipping. Not with an optimizer of your own.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int,
        loss: str | Callable[[Any, Any], Any] = "huber",
        select: str = "rmse",
        optimizer: optax.GradientTransformation | None = None,
        validate_every: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        capacity: int = DEFAULT_CAPACITY,
        lean: bool = True,
        extended: bool = False,
    ) -> None:
        check_settings(
            batch_size=batch_size, loss=loss, select=select, validate_every=validate_every
        )
        if extended and optimizer is not None:
            raise InputError("Program: extended is not for an optimizer of your own")
        if capacity < 1:
            raise InputError(f"Program: capacity is {capacity}; it must be at least 1")
        self._skeleton = eqx.filter(model, trainable, inverse=True)
        self._abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            eqx.filter(model, trainable),
        )
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._capacity = capacity
        self._stepper: Stepper
        self._extended = extended
        if extended:
            self._stepper = ExtendedStepper(self._skeleton)
        elif lean and optimizer is None and LeanStepper.fits(model):
            self._stepper = LeanStepper(self._skeleton, batch_size)
        else:
            self._stepper = GenericStepper(self._skeleton, optimizer)
        epochs = Epochs(
            self._stepper,
            named_loss(loss),
            batch_size=batch_size,
            select=select,
            validate_every=validate_every,
            shuffle=shuffle,
            drop_last=drop_last,
            capacity=capacity,
        )
        self._begin = jax.jit(self._begin_on_device)
        self._advance = jax.jit(epochs.advance)
        self._unpack = jax.jit(self._unpack_on_device)
        # The same epoch in pieces, for batches that cannot be gathered (`loop`).
        self.batch_step = jax.jit(epochs.batch_step)
        self.predict = jax.jit(epochs.predict)
        self.measure = jax.jit(epochs.measure)
        self.conclude = jax.jit(epochs.conclude)

    # ------------------------------------------------------------------ life of a training

    def init(self, seed: int = 0, model: Any = None) -> TrainState:
        """Begin a training.

        Parameters
        ----------
        seed
            Of the shuffles, and of the initial weights where no model is given; 0..2**32-1.
        model
            Initial weights, in the program's own (maybe scaled) space. None, for an MLP: those
            of ``equinox.nn.MLP(..., key=jax.random.PRNGKey(seed))``.
        """
        if not 0 <= seed < 2**32:
            raise InputError(f"Program: seed is {seed}; it must be in 0..2**32-1")
        if model is None:
            model = self._fresh(seed)
        arrays = eqx.filter(model, eqx.is_inexact_array)
        if _shapes(arrays) != _shapes(self._abstract):
            raise InputError("Program.init: the model is not of the structure of this program")
        return self._begin(arrays, jnp.uint32(seed))

    def advance(
        self,
        state: TrainState,
        arrays: TrainingArrays,
        hyperparameters: Hyperparameters,
        epochs: int,
    ) -> tuple[TrainState, Curve]:
        """Train for `epochs` more epochs, or until a value is not finite.

        Parameters
        ----------
        state
            From `init`, `advance` or `load_state`; it stays valid.
        arrays
            From `training_arrays`.
        hyperparameters
            May differ from call to call.
        epochs
            0 or more.

        Returns
        -------
        state, curve
            Where the training stands now, and the epochs just done.
        """
        rate = self._rate(hyperparameters, len(arrays.train_inputs))
        delta = jnp.float32(hyperparameters.huber_delta)
        rows: list[NDArray[np.float32]] = []
        while epochs > 0:
            count = min(epochs, self._capacity)
            state, done, buffer = self._advance(state, arrays, rate, delta, jnp.int32(count))
            rows.append(np.asarray(buffer)[: int(done)])
            epochs -= count
            if bool(state.failed):
                break
        columns = 4 + arrays.train_targets.shape[1]
        table = np.concatenate(rows) if rows else np.empty((0, columns), np.float32)
        return state, curve_of(table, bool(state.failed))

    def prepare(self, arrays: TrainingArrays) -> None:
        """Compile all that a training on such arrays needs, and train nothing.

        Without it the first training of a shape compiles as it goes.
        """
        state = self.init(0)
        rate = self._rate(Hyperparameters(1e-4), len(arrays.train_inputs))
        delta = jnp.float32(1.0)
        state, _, table = self._advance(state, arrays, rate, delta, jnp.int32(0))
        self._unpack(state.best_parameters)
        table.block_until_ready()

    def best_model(self, state: TrainState) -> Any:
        """Return the model of the best epoch (the initial one before any), in its own space."""
        return eqx.combine(self._unpack(state.best_parameters), self._skeleton)

    def last_model(self, state: TrainState) -> Any:
        """Return the model of the last epoch, in its own space."""
        return eqx.combine(self._unpack(state.parameters), self._skeleton)

    def save_state(
        self,
        path: str | os.PathLike[str],
        state: TrainState,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a state to a file, atomically; see `desisky_tune.training.state_file`.

        Parameters
        ----------
        path
            The file.
        state
            Of this program.
        notes
            What else is to come back with it; JSON can hold it.
        """
        from desisky_tune.training.state_file import write_state

        write_state(path, state, notes)

    def load_state(self, path: str | os.PathLike[str]) -> tuple[TrainState, dict[str, Any]]:
        """Read a state of this program and its notes back; the training goes on bit for bit.

        Raises
        ------
        MissingFileError, CheckpointError
            When there is no such file, or it is damaged or of another program.
        """
        from desisky_tune.training.state_file import read_state

        like = jax.eval_shape(
            self._begin_on_device, self._abstract, jax.ShapeDtypeStruct((), jnp.uint32)
        )
        return read_state(path, like)

    # ------------------------------------------------------------------ inside the compiled part

    def _rate(self, hyperparameters: Hyperparameters, rows: int) -> Any:
        """Return what the stepper takes for a learning rate."""
        if self._extended:
            return hyperparameters.steps(steps_per_epoch(rows, self._batch_size, self._drop_last))
        if hyperparameters.extended:
            raise InputError(
                "Program: a schedule, weight decay or clipping needs a program made with extended"
            )
        return jnp.float32(hyperparameters.learning_rate)

    def _fresh(self, seed: int) -> eqx.nn.MLP:
        skeleton = self._skeleton
        if type(skeleton) is not eqx.nn.MLP:
            raise InputError("Program.init: a model that is no equinox.nn.MLP must be given")
        in_float32 = all(each.dtype == np.float32 for each in jax.tree.leaves(self._abstract))
        if in_float32 and LeanStepper.fits(skeleton):
            ends = int(skeleton.in_size), int(skeleton.out_size)
            layers = initial_layers(seed, *ends, skeleton.width_size, skeleton.depth)
            return mlp_of_layers(on_device(layers))
        return eqx.nn.MLP(
            in_size=skeleton.in_size,
            out_size=skeleton.out_size,
            width_size=skeleton.width_size,
            depth=skeleton.depth,
            activation=skeleton.activation,
            final_activation=skeleton.final_activation,
            use_bias=skeleton.use_bias,
            use_final_bias=skeleton.use_final_bias,
            key=jax.random.PRNGKey(seed),
        )

    def _begin_on_device(self, arrays: Any, seed: jax.Array) -> TrainState:
        parameters = self._stepper.pack(eqx.combine(arrays, self._skeleton))
        return TrainState(
            parameters=parameters,
            optimiser=self._stepper.begin(parameters),
            best_parameters=parameters,
            best_value=jnp.float32(jnp.inf),
            best_epoch=jnp.int32(-1),
            epoch=jnp.int32(0),
            seed=seed,
            failed=jnp.bool_(False),
        )

    def _unpack_on_device(self, packed: Any) -> Any:
        return eqx.filter(self._stepper.unpack(packed), eqx.is_inexact_array)


def _shapes(tree: Any) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def native_core(
    loss: str | Callable[[Any, Any], Any], optimizer: optax.GradientTransformation | None
) -> Any:
    """Return the native core where it can train this and JAX has no accelerator, else None."""
    if os.environ.get("DESISKY_TUNE_CORE") == "xla":
        return None
    if not isinstance(loss, str) or optimizer is not None or jax.default_backend() != "cpu":
        return None
    from desisky_tune.training.native import library

    return library()


@lru_cache(maxsize=64)
def program_for(
    *,
    in_size: int,
    out_size: int,
    width: int,
    depth: int,
    batch_size: int,
    loss: str | Callable[[Any, Any], Any] = "huber",
    select: str = "rmse",
    epochs: int = DEFAULT_CAPACITY,
    optimizer: optax.GradientTransformation | None = None,
    validate_every: int = 1,
    shuffle: bool = True,
    drop_last: bool = False,
    core: str = "auto",
    extended: bool = False,
) -> Program | NativeProgram:
    """Return the program of an MLP's shape; asked for again, the same one, compiled already.

    Parameters
    ----------
    in_size, out_size, width, depth
        Of the MLP (ReLU, `depth` hidden layers of `width` units).
    epochs
        Capacity: what one device call can record. Any number of epochs can be trained.
    batch_size, loss, select, optimizer, validate_every, shuffle, drop_last
        As for `Program`.
    core
        "auto": the native core on a CPU where it can be had and knows the loss, else XLA.
        "xla": XLA. The environment's ``DESISKY_TUNE_CORE=xla`` makes "auto" mean that, too.
    extended
        As for `Program`; the native core always is.
    """
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "loss": loss,
        "select": select,
        "validate_every": validate_every,
        "shuffle": shuffle,
        "drop_last": drop_last,
    }
    check_settings(**settings)
    native = native_core(loss, optimizer) if core == "auto" else None
    if native is not None:
        from desisky_tune.training.native.program import NativeProgram

        return NativeProgram(
            native, in_size=in_size, out_size=out_size, width=width, depth=depth, **settings
        )
    skeleton = eqx.filter_eval_shape(
        eqx.nn.MLP, in_size, out_size, width, depth, key=jax.random.PRNGKey(0)
    )
    return Program(skeleton, optimizer=optimizer, capacity=epochs, extended=extended, **settings)


def check_settings(
    *, batch_size: int, loss: Any, select: str, validate_every: int, **rest: Any
) -> None:
    """Check what any program is made with.

    Raises
    ------
    InputError
        When a number is below 1, or a name is unknown.
    """
    for name, value in (("batch_size", batch_size), ("validate_every", validate_every)):
        if value < 1:
            raise InputError(f"Program: {name} is {value}; it must be at least 1")
    if select not in SELECTIONS:
        raise InputError(f"Program: select is {select!r}; it must be one of {SELECTIONS}")
    named_loss(loss)
