"""The core in C against float64 NumPy, Equinox and JAX, and what it promises."""

from __future__ import annotations

import ctypes
import threading

import equinox as eqx
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.training.initial import initial_layers
from desisky_tune.training.native.library import NoLibraryError, _load, cache_folder, library
from desisky_tune.training.native.program import NativeProgram, Training
from desisky_tune.training.native.weights import pack, unpack
from desisky_tune.training.program import Hyperparameters, Program, program_for, training_arrays
from desisky_tune.training.shuffle import epoch_order

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler on this machine")

sizes = st.integers(1, 40)


def program(**changes) -> NativeProgram:
    settings = {"in_size": 6, "out_size": 4, "width": 16, "depth": 2, "batch_size": 8}
    made = program_for(**{**settings, **changes})
    assert isinstance(made, NativeProgram)
    return made


def rows(count: int, test: int, inputs: int = 6, outputs: int = 4, seed: int = 0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(count + test, inputs))
    y = np.tanh(x @ random.normal(size=(inputs, outputs))) + random.normal(
        0, 0.1, (count + test, outputs)
    )
    return training_arrays(x[:count], y[:count], x[count:], y[count:])


def by_hand(layers, arrays, orders, *, batch, rate, delta):
    """Train in float64 by the textbook; return layers, train losses, test losses, RMSE."""
    weights = [[np.array(part, np.float64) for part in layer] for layer in layers]
    first = [[0 * part for part in layer] for layer in weights]
    second = [[0 * part for part in layer] for layer in weights]
    x, y, test_x, test_y = (np.array(part, np.float64) for part in arrays[:4])
    steps, curve = 0, []

    def run(x):
        units = [x]
        for number, (weight, bias) in enumerate(weights):
            value = units[-1] @ weight.T + bias
            units.append(value if number == len(weights) - 1 else np.maximum(value, 0))
        return units

    def loss(residual):
        size = np.abs(residual)
        inside = residual**2 / 2 if delta else residual**2
        return np.where(size <= delta, inside, delta * (size - delta / 2)) if delta else inside

    for order in orders:
        total = 0.0
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            units = run(x[part])
            residual = units[-1] - y[part]
            total += loss(residual).mean() * len(part)
            slope = np.clip(residual, -delta, delta) if delta else 2 * residual
            signal, gradients = slope / residual.size, []
            for number in reversed(range(len(weights))):
                gradients.insert(0, [signal.T @ units[number], signal.sum(0)])
                signal = signal @ weights[number][0] * (units[number] > 0)
            steps += 1
            for layer, gradient in enumerate(gradients):
                for at, g in enumerate(gradient):
                    first[layer][at] = 0.9 * first[layer][at] + 0.1 * g
                    second[layer][at] = 0.999 * second[layer][at] + 0.001 * g**2
                    m = first[layer][at] / (1 - 0.9**steps)
                    v = second[layer][at] / (1 - 0.999**steps)
                    weights[layer][at] = weights[layer][at] - rate * m / (np.sqrt(v) + 1e-8)
        residual = run(test_x)[-1] - test_y
        curve.append([total / len(order), loss(residual).mean(), *np.sqrt((residual**2).mean(0))])
    return weights, np.array(curve)


# ---------------------------------------------------------------- the arithmetic


@needs_compiler
@settings(max_examples=12, deadline=None)
@given(
    width=sizes,
    depth=st.integers(1, 4),
    inputs=st.integers(1, 19),
    outputs=st.integers(1, 18),
    batch=st.sampled_from([1, 3, 16, 33, 200]),
    count=st.sampled_from([1, 17, 70]),
    test=st.sampled_from([1, 150]),
    delta=st.sampled_from([0.0, 0.3]),
)
def test_it_trains_as_the_textbook_says(width, depth, inputs, outputs, batch, count, test, delta):
    arrays = rows(count, test, inputs, outputs)
    made = program(
        in_size=inputs,
        out_size=outputs,
        width=width,
        depth=depth,
        batch_size=batch,
        loss="huber" if delta else "l2",
    )
    state, curve = made.advance(made.init(3), arrays, Hyperparameters(1e-3, delta), 2)
    orders = [np.asarray(epoch_order(3, epoch, count)) for epoch in range(2)]
    layers = initial_layers(3, inputs, outputs, width, depth)
    weights, expected = by_hand(layers, arrays, orders, batch=batch, rate=1e-3, delta=delta)
    np.testing.assert_allclose(curve.train_loss, expected[:, 0], rtol=1e-4)
    np.testing.assert_allclose(curve.test_loss, expected[:, 1], rtol=1e-4)
    np.testing.assert_allclose(curve.rmse, expected[:, 2:], rtol=1e-4)
    np.testing.assert_allclose(curve.objective, expected[:, 2:].mean(1), rtol=1e-4)
    for layer, (weight, bias) in zip(made.last_model(state).layers, weights, strict=True):
        # Adam divides by the gradient's own size: where that is rounding, so is the step.
        assert np.quantile(np.abs(layer.weight - weight), 0.9) < 2e-5
        assert np.quantile(np.abs(layer.bias - bias), 0.9) < 2e-5


def with_idle_units(width: int, depth: int):
    """Layers of which every third unit is idle for good, and every third for most exposures."""
    layers = initial_layers(3, 6, 4, width, depth)
    for weight, bias in layers[:-1]:
        bias[::3] = -1e3
        bias[1::3] -= np.float32(np.quantile(np.abs(weight).sum(1), 0.5))
    return layers


@needs_compiler
@pytest.mark.parametrize("batch", [3, 16, 40])
def test_units_that_are_idle_for_a_batch_change_nothing(batch):
    arrays = rows(70, 150)
    made = program(width=29, depth=3, batch_size=batch)
    layers = with_idle_units(29, 3)
    state, curve = made.advance(
        made.init(3, made._model(pack(layers))), arrays, Hyperparameters(1e-3, 0.3), 3
    )
    orders = [np.asarray(epoch_order(3, epoch, 70)) for epoch in range(3)]
    weights, expected = by_hand(layers, arrays, orders, batch=batch, rate=1e-3, delta=0.3)
    np.testing.assert_allclose(curve.train_loss, expected[:, 0], rtol=1e-4)
    np.testing.assert_allclose(curve.rmse, expected[:, 2:], rtol=1e-4)
    after = [np.asarray(layer.weight) for layer in made.last_model(state).layers]
    for found, (weight, _) in zip(after, weights, strict=True):
        assert np.quantile(np.abs(found - weight), 0.9) < 2e-5
    for found, (begun, _) in zip(after[:-1], layers[:-1], strict=True):
        np.testing.assert_array_equal(found[::3], begun[::3])  # into those idle for good
        assert np.any(found[2::3] != begun[2::3])
    for found, (begun, _) in zip(after[1:], layers[1:], strict=True):
        np.testing.assert_array_equal(found[:, ::3], begun[:, ::3])  # and out of them


@needs_compiler
@pytest.mark.parametrize("moment", [0.0, 1e-3])
def test_the_moments_of_idle_units_fade(moment):
    arrays = rows(12, 10)
    made = program(width=20, depth=2, batch_size=12)
    begun = made.init(3, made._model(pack(with_idle_units(20, 2))))
    first, second = (np.full_like(begun.parameters, value) for value in (moment, 1e-4))
    optimiser = begun.optimiser._replace(first=first, second=second, steps=np.array(1000, np.int32))
    after, _ = made.advance(
        begun._replace(optimiser=optimiser), arrays, Hyperparameters(1e-2, 0.3), 1
    )
    step = 1e-2 * (0.9 * moment / (1 - 0.9**1001))
    step /= np.sqrt(0.999e-4 / (1 - 0.999**1001)) + 1e-8
    sizes = [(6, 20), (20, 20), (20, 4)]
    w, w_after, m_after, v_after = (
        unpack(part, sizes)[1][0][::3]
        for part in (begun.parameters, after.parameters, *after.optimiser[:2])
    )
    np.testing.assert_allclose(w - w_after, step, atol=1e-7)
    np.testing.assert_allclose(m_after, 0.9 * moment, rtol=1e-6)
    np.testing.assert_allclose(v_after, 0.999e-4, rtol=1e-6)


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.sampled_from([0, 1, 7, 1000, 10**6]),
    zero=st.floats(0, 0.5),
    huge=st.booleans(),
)
def test_a_step_is_right_to_a_few_units_in_the_last_place(seed, steps, zero, huge):
    random = np.random.default_rng(seed)
    arrays = rows(12, 10)
    made = program(width=20, depth=2, batch_size=12)
    layers = with_idle_units(20, 2)
    layers[1][0][::3] = 0  # what such a weight is after a step, is the step
    begun = made.init(3, made._model(pack(layers)))
    shape = layers[1][0][::3].shape
    m = 10 ** random.uniform(-15, 10, shape) * random.choice([-1, 1], shape)
    v = 10 ** random.uniform(-30, 38 if huge else 4, shape)
    m[random.random(shape) < zero] = 0
    v[random.random(shape) < zero] = 0
    if huge:
        v[0, 0] = np.inf
    m, v = m.astype(np.float32), v.astype(np.float32)
    moments = []
    for values in (m, v):
        parts = [[0 * part for part in layer] for layer in layers]
        parts[1][0][::3] = values
        moments.append(pack(parts))
    optimiser = begun.optimiser._replace(
        first=moments[0], second=moments[1], steps=np.array(steps, np.int32)
    )
    after, _ = made.advance(
        begun._replace(optimiser=optimiser), arrays, Hyperparameters(1e-3, 0.3), 1
    )
    t, beta1, beta2 = steps + 1, float(np.float32(0.9)), float(np.float32(0.999))
    first = beta1 * m.astype(float) / (1 - beta1**t)
    second = beta2 * v.astype(float) / (1 - beta2**t)
    step = 1e-3 * first / (np.sqrt(second) + 1e-8)
    found = unpack(after.parameters, [(6, 20), (20, 20), (20, 4)])[1][0][::3]
    np.testing.assert_allclose(found, -step, rtol=5e-7, atol=1e-37)


@needs_compiler
def test_a_long_training_stays_beside_the_compiled_one_of_jax():
    arrays = rows(300, 100)
    native = program(width=48, depth=3, batch_size=32)
    jitted = program_for(in_size=6, out_size=4, width=48, depth=3, batch_size=32, core="xla")
    assert isinstance(jitted, Program)
    curves = [
        each.advance(each.init(1), arrays, Hyperparameters(1e-3, 0.25), 100)[1]
        for each in (native, jitted)
    ]
    np.testing.assert_allclose(curves[0].objective[0], curves[1].objective[0], rtol=1e-5)
    np.testing.assert_allclose(curves[0].objective, curves[1].objective, rtol=0.02)


# ---------------------------------------------------------------- exactness


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(
    width=sizes,
    depth=st.integers(1, 3),
    batch=st.sampled_from([1, 16, 50]),
    pieces=st.lists(st.integers(0, 4), min_size=1, max_size=4),
)
def test_pieces_are_one_run_bit_for_bit(width, depth, batch, pieces):
    arrays = rows(45, 20)
    made = program(width=width, depth=depth, batch_size=batch)
    rate = Hyperparameters(3e-3, 0.25)
    whole, curve = made.advance(made.init(2), arrays, rate, sum(pieces))
    state, parts = made.init(2), []
    for piece in pieces:
        state, part = made.advance(state, arrays, rate, piece)
        parts.append(part.rmse)
    np.testing.assert_array_equal(np.concatenate(parts), curve.rmse)
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(left, right)


@needs_compiler
def test_neighbours_in_other_threads_change_no_bit():
    arrays = rows(200, 50)
    made = program(width=33, depth=3)
    rate = Hyperparameters(3e-3, 0.25)
    alone = made.advance(made.init(0), arrays, rate, 30)[1].rmse
    found: list[np.ndarray] = []

    def train(seed: int, rate: Hyperparameters) -> None:
        curve = made.advance(made.init(seed), arrays, rate, 30)[1]
        if seed == 0:
            found.append(curve.rmse)

    threads = [
        threading.Thread(target=train, args=args)
        for args in ((0, rate), (1, rate), (2, Hyperparameters(1e30)), (0, rate))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for curve in found:
        np.testing.assert_array_equal(curve, alone)


@needs_compiler
def test_idle_units_and_the_panels_fill_stay_zero():
    made = program(width=5, in_size=3, depth=2)
    state = made.init(0)
    filled = pack([(np.ones_like(w), np.ones_like(b)) for w, b in initial_layers(0, 3, 4, 5, 2)])
    after, _ = made.advance(state, rows(40, 10, 3), Hyperparameters(1e-2, 0.25), 20)
    for part in (after.parameters, after.optimiser.first, after.optimiser.second):
        assert np.all(part[filled == 0] == 0)
        assert np.any(part[filled == 1] != 0)


# ---------------------------------------------------------------- weights and order


@pytest.mark.parametrize(
    ("seed", "width", "depth"), [(0, 128, 5), (1, 17, 1), (2**32 - 1, 17, 3), (12345, 128, 2)]
)
def test_initial_weights_are_equinox_s(seed, width, depth):
    model = eqx.nn.MLP(6, 4, width, depth, key=jax.random.PRNGKey(seed))
    for layer, (weight, bias) in zip(
        model.layers, initial_layers(seed, 6, 4, width, depth), strict=True
    ):
        np.testing.assert_array_equal(layer.weight, weight)
        np.testing.assert_array_equal(layer.bias, bias)


@settings(deadline=None)
@given(inputs=sizes, outputs=sizes, width=sizes, depth=st.integers(1, 3))
def test_packed_weights_unpack(inputs, outputs, width, depth):
    layers = initial_layers(1, inputs, outputs, width, depth)
    packed = pack(layers)
    for given_, found in zip(
        layers, unpack(packed, [weight.shape[::-1] for weight, _ in layers]), strict=True
    ):
        np.testing.assert_array_equal(given_[0], found[0])
        np.testing.assert_array_equal(given_[1], found[1])
    core = library()
    if core is not None:
        assert core.parameter_count(inputs, outputs, width, depth) == len(packed)


@needs_compiler
@pytest.mark.parametrize("count", [1, 2, 1351, 65536, 65537])
def test_the_order_of_an_epoch_is_that_of_the_compiled_program(count):
    """Read off the first steps: with batches of one row, the last is the one that is left out."""
    core = library()
    assert core is not None
    order = np.empty(count, np.int32)
    work = np.empty(3 * count, np.uint32)
    core.epoch_order.argtypes = [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int64] + [
        ctypes.c_void_p
    ] * 2
    core.epoch_order(7, 3, count, order.ctypes.data, work.ctypes.data)
    np.testing.assert_array_equal(order, epoch_order(7, 3, count))


# ---------------------------------------------------------------- the library


def test_without_a_compiler_xla_trains(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NoLibraryError, match="no C compiler was found"):
        _load()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(NoLibraryError, match="false failed"):
        _load()
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    with pytest.raises(NoLibraryError, match="did not run"):
        _load()
    assert not list(cache_folder().glob("*.so"))


@needs_compiler
def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _load()
    (compiled,) = cache_folder().iterdir()
    monkeypatch.setenv("CC", "false")
    _load()
    assert compiled.suffix == ".so"


@needs_compiler
def test_the_environment_can_ask_for_xla(monkeypatch):
    monkeypatch.setenv("DESISKY_TUNE_CORE", "xla")
    made = program_for(in_size=2, out_size=1, width=3, depth=1, batch_size=5, epochs=9)
    assert isinstance(made, Program)


def test_the_structure_is_the_one_in_c():
    """Every field takes eight bytes on both sides, and they are named in the same order."""
    from importlib.resources import files

    source = files("desisky_tune.training.native").joinpath("training.c").read_text()
    body = source[: source.index("} Training;")].rsplit("typedef struct {", 1)[1]
    named = [
        word.strip(" *;")
        for line in body.splitlines()
        for word in line.split("/*")[0].strip().split(" ", 1)[-1].replace("float", "").split(",")
        if word.strip(" *;")
    ]
    renamed = [name for name, _ in Training._fields_]
    assert named == renamed
    assert ctypes.sizeof(Training) == 8 * len(renamed)
