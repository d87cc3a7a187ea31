"""Many trainings in one program: each as if it were alone, and as `Program` has it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import desisky_tune.training.slots as slots_module
from desisky_tune.errors import InputError
from desisky_tune.training.program import Hyperparameters, program_for, training_arrays
from desisky_tune.training.scaling import Scaling
from desisky_tune.training.shuffle import epoch_order, padded_epoch_order
from desisky_tune.training.slot_rows import FoldRows, SlotRows, slot_rows
from desisky_tune.training.slot_state import at_width, fresh_state, model_of
from desisky_tune.training.slots import SlotProgram, SlotSettings, SlotShape, slot_program
from desisky_tune.training.state_file import write_state

PADDED, BATCH, SLOTS = 16, 8, 3
WIDTHS = (1, 5, 12, 16)
EPOCHS = 5

#: Each example runs a compiled program: few of them find what there is to find.
few = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


class Training(NamedTuple):
    """What fills a slot."""

    width: int = 12
    seed: int = 3
    fold: int = 0
    learning_rate: float = 3e-3
    huber_delta: float = 0.25


trainings = st.builds(
    Training,
    width=st.sampled_from(WIDTHS),
    seed=st.integers(0, 2**32 - 1),
    fold=st.integers(0, 1),
    # 1e30 makes a slot NaN within an epoch.
    learning_rate=st.sampled_from([1e-4, 3e-3, 1e-1, 1e30]),
    huber_delta=st.sampled_from([0.05, 0.25, 1.0]),
)


@cache
def table() -> tuple[np.ndarray, np.ndarray, tuple[FoldRows, ...]]:
    """Return inputs, magnitudes, and two folds with different numbers of rows.

    The last batch of either fold is short, and the second has fewer steps than the first.
    """
    draw = np.random.default_rng(1)
    inputs = draw.normal(size=(70, 6)) * [30, 10, 20, 0.3, 0.1, 0.2] + [200, 5, 0, 1, 0, 1]
    targets = 20 + np.tanh(inputs[:, :4] / 20) + draw.normal(0, 0.1, (70, 4))
    order = draw.permutation(70)
    parts = ((order[:43], order[43:60]), (order[5:34], order[40:]))
    inputs, targets = inputs.astype(np.float32), targets.astype(np.float32)
    return inputs, targets, tuple(FoldRows.of(inputs, targets, *part) for part in parts)


@cache
def rows() -> SlotRows:
    inputs, targets, folds = table()
    return slot_rows(inputs, targets, folds)


def program(depth: int, **changes: Any) -> SlotProgram:
    return slot_program(SlotShape(depth, PADDED, BATCH, changes.pop("slots", SLOTS), **changes))


def run(
    depth: int,
    filled: dict[int, Training],
    chunks: Sequence[int] = (EPOCHS,),
    target: int = EPOCHS,
) -> tuple[Any, list[Any]]:
    """Fill the slots and advance them chunk by chunk; return the states and the curves."""
    slots = program(depth)
    states, wanted = slots.empty(), SlotSettings.empty(SLOTS)
    for slot, training in filled.items():
        fresh = fresh_state(6, 4, training.width, depth, training.seed)
        states = slots.put(states, slot, slots.words(fresh))
        fill(wanted, slot, training, target)
    curves = []
    for chunk in chunks:
        states, curve = slots.advance(states, rows(), wanted, chunk)
        curves.append(curve)
    return states, curves


def fill(wanted: SlotSettings, slot: int, training: Training, target: int) -> None:
    wanted.learning_rate[slot] = training.learning_rate
    wanted.huber_delta[slot] = training.huber_delta
    wanted.fold[slot], wanted.target[slot] = training.fold, target


def taken(depth: int, states: Any, slot: int, width: int = PADDED) -> Any:
    return program(depth).state_of(program(depth).take(states, slot), width)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def by_itself(depth: int, training: Training, epochs: int = EPOCHS) -> tuple[Any, Any]:
    """Return the state and the curve of a training alone in the first slot, in one piece."""
    states, (curve,) = run(depth, {0: training}, target=epochs)
    return taken(depth, states, 0), curve.of(0)


# ---------------------------------------------------------------------- invariant 4


@few
@given(
    depth=st.sampled_from([1, 3]),
    training=trainings,
    neighbours=st.lists(trainings, min_size=SLOTS - 1, max_size=SLOTS - 1),
    slot=st.integers(0, SLOTS - 1),
    chunks=st.lists(st.integers(1, 3), min_size=EPOCHS, max_size=EPOCHS),
)
def test_slot_neighbours_and_chunks_change_no_bit(depth, training, neighbours, slot, chunks):
    filled = dict(zip((s for s in range(SLOTS) if s != slot), neighbours, strict=True))
    states, curves = run(depth, {**filled, slot: training}, chunks)
    alone, whole = by_itself(depth, training)
    assert bits(taken(depth, states, slot)) == bits(alone)
    pieces = [curve.of(slot) for curve in curves]
    for series in ("train_loss", "test_loss", "objective", "rmse"):
        joined = np.concatenate([getattr(piece, series) for piece in pieces])
        assert joined.tobytes() == getattr(whole, series).tobytes()
    assert curves[-1].of(slot).failed == whole.failed


@few
@given(
    training=trainings,
    neighbour=trainings,
    first=st.integers(0, SLOTS - 1),
    second=st.integers(0, SLOTS - 1),
    pause=st.integers(0, EPOCHS),
)
def test_a_training_goes_on_from_a_file_in_any_slot(
    tmp_path_factory, training, neighbour, first, second, pause
):
    depth, width = 3, training.width
    states, _ = run(depth, {first: training}, target=pause)
    path = tmp_path_factory.mktemp("slot") / "a.state"
    write_state(path, taken(depth, states, first, width))
    like = program_for(
        in_size=6, out_size=4, width=width, depth=depth, batch_size=BATCH, core="xla"
    )
    state, _ = like.load_state(path)
    # The slots of a program that has already served others, and failed in one of them.
    slots = program(depth)
    others = {s: neighbour._replace(learning_rate=1e30) for s in range(SLOTS)}
    states, _ = run(depth, others)
    states = slots.put(states, second, slots.words(state))
    wanted = SlotSettings.empty(SLOTS)
    fill(wanted, second, training, EPOCHS)
    states, _ = slots.advance(states, rows(), wanted, EPOCHS)
    # What a failed training left in the padding is not kept.
    whole = at_width(by_itself(depth, training)[0], 6, 4, width)
    assert bits(taken(depth, states, second, width)) == bits(whole)


@few
@given(depth=st.sampled_from([1, 3]), training=trainings)
def test_padded_units_stay_exactly_zero(depth, training):
    steady = training._replace(learning_rate=3e-3)
    state, _ = by_itself(depth, steady)
    restored = at_width(at_width(state, 6, 4, steady.width), 6, 4, PADDED)
    assert not bool(state.failed)
    assert bits(restored) == bits(state)


@few
@given(target=st.integers(0, EPOCHS), beyond=st.integers(0, 3), training=trainings)
def test_a_slot_stands_still_once_it_has_reached_its_epoch(target, beyond, training):
    states, curves = run(1, {1: training, 2: Training()}, (target + beyond, 2), target)
    assert bits(taken(1, states, 1)) == bits(by_itself(1, training, target)[0])
    assert sum(len(curve.of(1)) for curve in curves) == int(taken(1, states, 1).epoch)


def test_a_new_training_compiles_nothing():
    slots = program(1)
    fresh = fresh_state(6, 4, 5, 1, 3)
    run(1, {0: Training()})
    taken(1, run(1, {0: Training()})[0], 0)
    compiled = []
    with monitored(lambda event, *_, **__: compiled.append(event)):
        states = slots.put(slots.empty(), 1, slots.words(fresh))
        wanted = SlotSettings.empty(SLOTS)
        fill(wanted, 1, Training(fold=1, learning_rate=0.1), 2)
        states, _ = slots.advance(states, rows(), wanted, 1)
        states = slots.put(states, 2, slots.take(states, 1))
        slots.advance(states, rows(), wanted, 3)
    assert not [event for event in compiled if "backend_compile" in event]


@contextmanager
def monitored(listener: Callable[..., None]) -> Iterator[None]:
    """Hear what JAX says of its compiles."""
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


# ---------------------------------------------------------------------- against Program


def alone(depth: int, training: Training, epochs: int, loss: str = "huber") -> tuple[Any, Any]:
    """Train the same with the program of single trainings, on the fold's own rows."""
    inputs, targets, folds = table()
    fold = folds[training.fold]
    parts = [part[at] for at in (fold.train, fold.validation) for part in (inputs, targets)]
    single = program_for(
        in_size=6,
        out_size=4,
        width=training.width,
        depth=depth,
        batch_size=BATCH,
        core="xla",
        loss=loss,
    )
    return single.advance(
        single.init(training.seed),
        training_arrays(*parts, fold.scaling),
        Hyperparameters(training.learning_rate, training.huber_delta),
        epochs,
    )


@pytest.mark.parametrize(("depth", "fold"), [(1, 1), (3, 0)])
def test_a_slot_agrees_with_the_program_of_one_training(depth, fold):
    training = Training(fold=fold)
    state, curve = by_itself(depth, training)
    single, expected = alone(depth, training, EPOCHS)
    for series in ("train_loss", "test_loss", "objective", "rmse"):
        np.testing.assert_allclose(
            getattr(curve, series)[0], getattr(expected, series)[0], rtol=1e-5, err_msg=series
        )
        np.testing.assert_allclose(
            getattr(curve, series), getattr(expected, series), rtol=1e-4, err_msg=series
        )
    assert int(state.best_epoch) == int(single.best_epoch)
    assert int(state.optimiser.steps) == int(single.optimiser.steps)
    ours = model_of(at_width(state, 6, 4, training.width).best_parameters, 6, 4, training.width)
    theirs = program_for(
        in_size=6, out_size=4, width=training.width, depth=depth, batch_size=BATCH, core="xla"
    ).best_model(single)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if eqx.is_array(one):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_l2_loss_agrees_too():
    slots = program(1, loss="l2", slots=1)
    training = Training()
    fresh = fresh_state(6, 4, training.width, 1, training.seed)
    states = slots.put(slots.empty(), 0, slots.words(fresh))
    wanted = SlotSettings.empty(1)
    fill(wanted, 0, training, 2)
    _, curves = slots.advance(states, rows(), wanted, 2)
    _, expected = alone(1, training, 2, "l2")
    np.testing.assert_allclose(curves.of(0).train_loss, expected.train_loss, rtol=1e-5)
    np.testing.assert_allclose(curves.of(0).test_loss, expected.test_loss, rtol=1e-5)


def test_a_slot_fails_when_the_program_of_one_training_does():
    training = Training(learning_rate=1e30)
    state, curve = by_itself(3, training)
    single, expected = alone(3, training, EPOCHS)
    assert curve.failed
    assert expected.failed
    assert len(curve) == len(expected)
    assert int(state.epoch) == int(single.epoch)
    assert int(state.best_epoch) == int(single.best_epoch)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_training_begins_with_the_weights_of_equinox(width):
    model = eqx.nn.MLP(6, 4, width, 3, key=jax.random.PRNGKey(7))
    fresh = fresh_state(6, 4, width, 3, 7)
    assert bits(eqx.filter(model_of(fresh.parameters, 6, 4, width), eqx.is_array)) == bits(
        eqx.filter(model, eqx.is_array)
    )
    single = program_for(in_size=6, out_size=4, width=width, depth=3, batch_size=BATCH, core="xla")
    assert bits(fresh) == bits(single.init(7))


def test_many_validation_rows_are_measured_block_by_block(monkeypatch):
    whole = by_itself(1, Training())[1]
    monkeypatch.setattr(slots_module, "VALIDATION_BLOCK", 12)
    slots = SlotProgram(program(1).shape)
    states = slots.put(slots.empty(), 0, slots.words(fresh_state(6, 4, 12, 1, 3)))
    wanted = SlotSettings.empty(SLOTS)
    fill(wanted, 0, Training(), EPOCHS)
    curve = slots.advance(states, rows(), wanted, EPOCHS)[1].of(0)
    np.testing.assert_allclose(curve.rmse, whole.rmse, rtol=1e-6)
    np.testing.assert_allclose(curve.test_loss, whole.test_loss, rtol=1e-6)


# ---------------------------------------------------------------------- order and rows


@pytest.mark.parametrize("count", [1, 31, 32, 33])
def test_padding_leaves_the_order_of_the_rows(count):
    seeds = np.array([0, 1, 99, 2**32 - 1], np.uint32)
    epochs = np.array([0, 3, 499, 10**6], np.uint32)
    padded = jax.vmap(lambda *at: padded_epoch_order(*at, count, 64))(seeds, epochs)
    expected = jax.vmap(lambda *at: epoch_order(*at, count))(seeds, epochs)
    np.testing.assert_array_equal(padded[:, :count], expected)


@pytest.mark.parametrize("count", [2**16, 2**16 + 1])
def test_padding_leaves_the_order_of_many_rows(count):
    padded = padded_epoch_order(5, 9, count, 70_001)
    np.testing.assert_array_equal(padded[:count], epoch_order(5, 9, count))


def test_each_fold_sees_its_rows_in_its_own_scaling():
    inputs, _, folds = table()
    shared = rows()
    assert shared.table.shape == (70, 10)
    for number, fold in enumerate(folds):
        scaled = shared.table[:, :6] * shared.factor[number] - shared.shift[number]
        np.testing.assert_allclose(scaled, fold.scaling.scale_inputs(inputs), atol=2e-6)


def test_one_fold_has_the_rows_of_a_single_training():
    inputs, targets, folds = table()
    shared = slot_rows(inputs, targets, folds[:1])
    scaled = shared.table[:, :6] * shared.factor[0] - shared.shift[0]
    assert np.asarray(scaled).tobytes() == folds[0].scaling.scale_inputs(inputs).tobytes()


def test_a_feature_that_is_constant_in_one_fold_is_neutral_there():
    inputs, targets, folds = table()
    inputs = inputs.copy()
    inputs[folds[1].train, 2] = 4.0
    parts = [FoldRows.of(inputs, targets, fold.train, fold.validation) for fold in folds]
    shared = slot_rows(inputs, targets, parts)
    scaled = np.asarray(shared.table[:, :6] * shared.factor[1] - shared.shift[1])
    assert (scaled[:, 2] == 0).all()
    assert float(shared.factor[0, 2]) > 0


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"width": -1}, "width is -1"),
        ({"loss": "l1"}, "loss is 'l1'"),
        ({"precision": "half"}, "precision is 'half'"),
    ],
)
def test_a_shape_says_what_it_cannot_be(changes, message):
    shape = {"depth": 1, "width": 8, "batch_size": 4, "slots": 2}
    with pytest.raises(InputError, match=message):
        SlotShape(**{**shape, **changes})


def test_slots_and_epochs_are_checked():
    slots = program(1)
    state = fresh_state(6, 4, 5, 1, 0)
    with pytest.raises(InputError, match="slot 3 of a program of 3 slots"):
        slots.put(slots.empty(), 3, slots.words(state))
    with pytest.raises(InputError, match=r"65 epochs; allowed: 0\.\.64"):
        slots.advance(slots.empty(), rows(), SlotSettings.empty(SLOTS), 65)


@pytest.mark.parametrize(
    ("positions", "message"),
    [([], "needed"), ([70], "70..70; there are 70"), ([0], "1 of 1 validation rows")],
)
def test_rows_say_what_is_wrong_with_a_fold(positions, message):
    inputs, targets, folds = table()
    inputs = inputs.copy()
    inputs[0, 0] = np.nan
    train = np.setdiff1d(folds[0].train, [0])
    scaling = Scaling.fit(inputs[train], targets[train])
    fold = FoldRows(train, np.asarray(positions, np.int64), scaling)
    with pytest.raises(InputError, match=message):
        slot_rows(inputs, targets, [fold])


# ---------------------------------------------------------------------- on a bare machine


def test_the_benchmark_needs_jax_alone():
    """A machine with an accelerator may have JAX, Equinox and optax, and nothing else."""
    script = Path(__file__).parents[1] / "benchmarks" / "gpu_slots.py"
    missing = ("ray", "pydantic", "typer", "rich", "optuna", "pandas", "pyarrow", "astropy", "yaml")
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({missing!r}))\n"
        f"sys.argv, sys.path[:0] = [{str(script)!r}, '--help'], [{str(script.parent)!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--slots" in done.stdout
