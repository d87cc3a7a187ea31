"""Schedule, weight decay and clipping: optax's, step for step, in every core; off by default."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.errors import InputError
from desisky_tune.training.hyperparameters import Hyperparameters, rate_at, steps_per_epoch
from desisky_tune.training.program import Program, program_for, training_arrays
from desisky_tune.training.shuffle import epoch_order
from desisky_tune.training.slot_rows import FoldRows, slot_rows
from desisky_tune.training.slot_state import at_width, fresh_state, model_of
from desisky_tune.training.slots import SlotSettings, SlotShape, slot_program

ROWS, TEST_ROWS, BATCH, EPOCHS = 43, 20, 8, 6
STEPS = steps_per_epoch(ROWS, BATCH)
SHAPE: dict[str, Any] = {"in_size": 6, "out_size": 4, "width": 12, "depth": 3, "batch_size": BATCH}
PLAIN = Hyperparameters(3e-3, 0.25)

EXTENDED = {
    "warm": Hyperparameters(3e-3, 0.25, warmup=0.3, epochs=EPOCHS),
    "warm cosine": Hyperparameters(
        3e-3, 0.25, schedule="cosine", warmup=0.2, final_rate=0.1, epochs=EPOCHS
    ),
    "decay": Hyperparameters(3e-3, 0.25, weight_decay=0.5),
    "clip": Hyperparameters(3e-3, 0.25, gradient_clip=0.05),
    "all": Hyperparameters(
        1e-2, 0.25, "cosine", warmup=0.2, weight_decay=0.1, gradient_clip=0.03, epochs=EPOCHS
    ),
}
every = pytest.mark.parametrize("asked", EXTENDED.values(), ids=EXTENDED)


def table() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(2)
    inputs = draw.normal(size=(ROWS + TEST_ROWS, 6)).astype(np.float32)
    targets = 20 + np.tanh(inputs[:, :4]) + draw.normal(0, 0.1, (len(inputs), 4))
    return inputs, targets.astype(np.float32)


def arrays() -> Any:
    inputs, targets = table()
    fold = FoldRows.of(inputs, targets, np.arange(ROWS), np.arange(ROWS, len(inputs)))
    parts = inputs[:ROWS], targets[:ROWS], inputs[ROWS:], targets[ROWS:]
    return training_arrays(*parts, fold.scaling)


def optimizer(asked: Hyperparameters) -> optax.GradientTransformation:
    """What the hyperparameters say, in optax's own words."""
    total = EPOCHS * STEPS
    warmup = round(asked.warmup * total)
    peak = asked.learning_rate
    rate: Any = optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else peak
    if asked.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            0.0 if warmup else peak, peak, warmup, total, asked.final_rate * peak
        )
    adam = optax.adamw(rate, weight_decay=asked.weight_decay)
    if asked.gradient_clip:
        return optax.chain(optax.clip_by_global_norm(asked.gradient_clip), adam)
    return adam


@cache
def by_optax(asked: Hyperparameters, seed: int = 5) -> tuple[Any, np.ndarray, list[float]]:
    """Train by the book; return the model, the train losses and the gradients' norms."""
    data, chain = arrays(), optimizer(asked)
    model = eqx.nn.MLP(6, 4, 12, 3, key=jax.random.PRNGKey(seed))
    state = chain.init(eqx.filter(model, eqx.is_array))

    def lost(model: Any, inputs: Any, targets: Any) -> Any:
        predicted = jax.vmap(model)(inputs) * data.target_sd + data.target_mean
        return optax.huber_loss(predicted, targets, delta=asked.huber_delta).mean()

    @eqx.filter_jit
    def step(model: Any, state: Any, inputs: Any, targets: Any) -> Any:
        loss, gradient = eqx.filter_value_and_grad(lost)(model, inputs, targets)
        updates, state = chain.update(gradient, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, loss, optax.tree.norm(gradient)

    curve, norms = [], []
    for epoch in range(EPOCHS):
        order = np.asarray(epoch_order(seed, epoch, ROWS))
        total = 0.0
        for start in range(0, ROWS, BATCH):
            part = order[start : start + BATCH]
            inputs, targets = data.train_inputs[part], data.train_targets[part]
            model, state, loss, norm = step(model, state, inputs, targets)
            total += float(loss) * len(part)
            norms.append(float(norm))
        curve.append(total / ROWS)
    return model, np.array(curve), norms


def core(name: str, *, extended: bool = True) -> Any:
    return program_for(**SHAPE, core=name, extended=extended)


def leaves(model: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array))]


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def in_slots(
    asked: list[Hyperparameters], chunks: tuple[int, ...] = (EPOCHS,)
) -> tuple[list[Any], list[np.ndarray]]:
    """Train each in a slot of its own; return models and train losses."""
    inputs, targets = table()
    fold = FoldRows.of(inputs, targets, np.arange(ROWS), np.arange(ROWS, len(inputs)))
    rows = slot_rows(inputs, targets, [fold])
    program = slot_program(SlotShape(3, 16, BATCH, 4, extended=True))
    states, wanted = program.empty(), SlotSettings.empty(4)
    for slot, each in enumerate(asked):
        states = program.put(states, slot, program.words(fresh_state(6, 4, 12, 3, 5)))
        wanted.fill(slot, each.steps(STEPS), each.huber_delta, fold=0, target=EPOCHS)
    losses: list[list[np.ndarray]] = [[] for _ in asked]
    for chunk in chunks:
        states, curves = program.advance(states, rows, wanted, chunk)
        for slot, parts in enumerate(losses):
            parts.append(curves.of(slot).train_loss)
    models = [
        model_of(program.state_of(program.take(states, slot), 12).parameters, 6, 4, 12)
        for slot in range(len(asked))
    ]
    return models, [np.concatenate(parts) for parts in losses]


# ---------------------------------------------------------------- against optax


@given(
    epochs=st.integers(1, 40),
    per_epoch=st.integers(1, 30),
    warmup=st.floats(0, 0.99),
    final=st.floats(0, 1),
    cosine=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_the_rate_of_every_step_is_optaxs(epochs, per_epoch, warmup, final, cosine):
    asked = Hyperparameters(
        0.02, 1.0, "cosine" if cosine else "constant", warmup, final, epochs=epochs
    )
    total = epochs * per_epoch
    rising = min(round(warmup * total), total - 1)
    if cosine:
        start = 0.0 if rising else 0.02
        expected = optax.warmup_cosine_decay_schedule(start, 0.02, rising, total, final * 0.02)
    else:
        expected = optax.warmup_constant_schedule(0.0, 0.02, rising) if rising else lambda at: 0.02
    steps = jnp.arange(1200)  # one shape: nothing is compiled twice
    np.testing.assert_allclose(
        np.asarray(rate_at(asked.steps(per_epoch), steps))[:total],
        np.broadcast_to(expected(steps), 1200)[:total],
        rtol=2e-5,
        atol=2e-8,
    )


@every
@pytest.mark.parametrize("name", ["auto", "xla"])
def test_a_training_is_optaxs(asked, name):
    program = core(name)
    state, curve = program.advance(program.init(5), arrays(), asked, EPOCHS)
    model, expected, norms = by_optax(asked)
    if asked.gradient_clip:
        assert max(norms) > asked.gradient_clip > min(norms)
    np.testing.assert_allclose(curve.train_loss, expected, rtol=2e-5)
    for ours, theirs in zip(leaves(program.last_model(state)), leaves(model), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_so_is_each_slot_whatever_its_neighbours_ask_for():
    asked = [EXTENDED[name] for name in ("warm cosine", "decay", "clip", "all")]
    models, losses = in_slots(asked)
    for model, loss, each in zip(models, losses, asked, strict=True):
        expected, curve, _ = by_optax(each)
        np.testing.assert_allclose(loss, curve, rtol=2e-5)
        for ours, theirs in zip(leaves(model), leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


# ---------------------------------------------------------------- invariant 4


@pytest.mark.parametrize("name", ["auto", "xla"])
def test_pieces_of_a_scheduled_training_are_one_run_bit_for_bit(name):
    program, asked = core(name), EXTENDED["all"]
    whole, curve = program.advance(program.init(5), arrays(), asked, EPOCHS)
    state, parts = program.init(5), []
    for epochs in (1, 3, 2):
        state, part = program.advance(state, arrays(), asked, epochs)
        parts.append(part.train_loss)
    assert bits(state) == bits(whole)
    assert np.concatenate(parts).tobytes() == curve.train_loss.tobytes()


def test_pieces_and_neighbours_of_a_slot_change_no_bit():
    asked = EXTENDED["all"]
    alone, _ = in_slots([asked])
    broken = Hyperparameters(1e30, weight_decay=1.0)
    among, _ = in_slots([asked, broken, EXTENDED["clip"], PLAIN], chunks=(1, 3, 2))
    assert bits(among[0]) == bits(alone[0])


# ---------------------------------------------------------------- off unless asked for


@pytest.mark.parametrize("name", ["auto", "xla"])
def test_neutral_values_are_plain_adam_to_the_bit(name):
    neutral = replace(PLAIN, warmup=0.0, final_rate=0.7, epochs=EPOCHS)
    assert not neutral.extended
    plain = core(name, extended=False)
    state, _ = plain.advance(plain.init(5), arrays(), PLAIN, EPOCHS)
    again, _ = plain.advance(plain.init(5), arrays(), neutral, EPOCHS)
    assert bits(again) == bits(state)


def test_padding_stays_zero_under_decay_and_clipping():
    inputs, targets = table()
    fold = FoldRows.of(inputs, targets, np.arange(ROWS), np.arange(ROWS, len(inputs)))
    program = slot_program(SlotShape(3, 16, BATCH, 4, extended=True))
    states, wanted = program.empty(), SlotSettings.empty(4)
    states = program.put(states, 0, program.words(fresh_state(6, 4, 12, 3, 5)))
    wanted.fill(0, EXTENDED["all"].steps(STEPS), 0.25, fold=0, target=2)
    states, _ = program.advance(states, slot_rows(inputs, targets, [fold]), wanted, 2)
    wide = program.state_of(program.take(states, 0), 16)
    assert bits(at_width(at_width(wide, 6, 4, 12), 6, 4, 16)) == bits(wide)


def test_a_plain_program_refuses_what_it_would_leave_out():
    program = core("xla", extended=False)
    with pytest.raises(InputError, match="needs a program made with extended"):
        program.advance(program.init(5), arrays(), EXTENDED["decay"], 1)
    with pytest.raises(InputError, match="not for an optimizer of your own"):
        Program(
            eqx.nn.MLP(6, 4, 5, 1, key=jax.random.PRNGKey(0)),
            batch_size=4,
            optimizer=optax.sgd(0.1),
            extended=True,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "schedule is 'linear'; it must be one of"),
        ({"warmup": 1.0}, "warmup is 1.0; it must be from 0 to below 1"),
        ({"warmup": float("nan")}, "warmup is nan"),
        ({"final_rate": -0.1}, "final_rate is -0.1; it must be from 0 to 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be a number of at least 0"),
        ({"gradient_clip": float("inf")}, "gradient_clip is inf"),
        ({"schedule": "cosine"}, "epochs is 0; it must be at least 1 with a schedule"),
    ],
)
def test_hyperparameters_say_what_they_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        Hyperparameters(1e-3, **changes)
