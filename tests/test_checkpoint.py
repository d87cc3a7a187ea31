"""Checkpoints: both ways with desisky, and nothing believed of a file."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import pickle
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from desisky_tune import io as checkpoints
from desisky_tune.data.columns import FEATURES
from desisky_tune.errors import CheckpointError, DownloadError, MissingFileError, StorageError
from desisky_tune.io import (
    ModelSpec,
    checkpoint_meta,
    feature_names,
    features_recorded,
    get_user_model_dir,
    load,
    load_model,
    read_header,
    register_model,
    save,
)
from desisky_tune.models import make_broadbandMLP

#: A moonlit exposure, in the reference order: deg, deg, deg, fraction, transparency, fraction.
EXPOSURE = np.array([55.0, 62.0, 40.0, 0.8, 1.0, 0.0], dtype=np.float32)

SMALL = {"in_size": 6, "out_size": 4, "width_size": 8, "depth": 2}


def small_model(seed: int = 1) -> eqx.nn.MLP:
    return make_broadbandMLP(**SMALL, key=jax.random.PRNGKey(seed))


@pytest.fixture
def model() -> eqx.nn.MLP:
    return small_model()


@pytest.fixture
def checkpoint(tmp_path: Path, model: eqx.nn.MLP) -> Path:
    return save(tmp_path / "good.eqx", model, checkpoint_meta(model, features=FEATURES))


def payload(model: Any) -> bytes:
    stream = io.BytesIO()
    eqx.tree_serialise_leaves(stream, model)
    return stream.getvalue()


def write(path: Path, header: Any, body: bytes) -> Path:
    line = header if isinstance(header, bytes) else json.dumps(header).encode() + b"\n"
    path.write_bytes(line + body)
    return path


# --- the format ---------------------------------------------------------------------------------


def test_is_one_line_of_json_and_equinox_leaves(checkpoint: Path, model: eqx.nn.MLP) -> None:
    line, body = checkpoint.read_bytes().split(b"\n", 1)
    header = json.loads(line)
    assert header["schema"] == 1
    assert header["arch"] == SMALL
    assert body == payload(model)


def test_comes_back_bitwise(checkpoint: Path, model: eqx.nn.MLP) -> None:
    loaded, meta = load_model("broadband", path=checkpoint)
    assert eqx.tree_equal(loaded, model)
    assert meta == read_header(checkpoint)


def test_header_keeps_the_documented_keys_and_further_ones(
    tmp_path: Path, model: eqx.nn.MLP
) -> None:
    training = {
        "date": "2025-01-15T10:30:00",
        "epoch": np.int64(342),
        "test_loss": np.float32(0.5),
        "train_loss": 0.0398,
        "per_band_rmse": {"V": 0.145, "g": 0.132, "r": 0.128, "z": 0.151},
        "config": {"epochs": 500, "learning_rate": 1e-4, "loss": "huber", "huber_delta": 0.25},
    }
    path = save(
        tmp_path / "x.eqx",
        model,
        checkpoint_meta(model, features=FEATURES, training=training, seed=3, split=(1, 2)),
    )
    meta = read_header(path)
    assert meta["training"] == {**training, "epoch": 342, "test_loss": 0.5}
    assert (meta["seed"], meta["split"], meta["bands"]) == (3, [1, 2], ["V", "g", "r", "z"])
    assert feature_names(meta) == FEATURES


def test_number_that_is_not_finite_is_written_as_null(tmp_path: Path, model: eqx.nn.MLP) -> None:
    meta = checkpoint_meta(model, features=None, training={"test_loss": math.nan, "epoch": 1})
    path = save(tmp_path / "x.eqx", model, meta)
    assert b"NaN" not in path.read_bytes().split(b"\n")[0]
    assert read_header(path)["training"]["test_loss"] is None


def test_scaling_lists_its_constant_features(model: eqx.nn.MLP) -> None:
    order = tuple(reversed(FEATURES))
    scaling = {"input_mean": [0.0] * 6, "constant": [True, False, False, False, False, False]}
    meta = checkpoint_meta(model, features=order, scaling=scaling)
    assert meta["constant_features"] == ["ECLIPSE_FRAC"]
    assert meta["scaling"]["folded"] is True


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(FEATURES))
def test_any_order_of_features_comes_back(
    tmp_path_factory: pytest.TempPathFactory, order: list[str]
) -> None:
    model = small_model()
    path = save(
        tmp_path_factory.mktemp("order") / "x.eqx", model, checkpoint_meta(model, features=order)
    )
    _, meta = load_model("broadband", path=path)
    assert feature_names(meta) == tuple(order)
    assert features_recorded(meta)


def test_legacy_flat_header_is_read(tmp_path: Path, model: eqx.nn.MLP) -> None:
    path = write(tmp_path / "legacy.eqx", SMALL, payload(model))
    loaded, meta = load_model("broadband", path=path)
    assert eqx.tree_equal(loaded, model)
    assert (meta["schema"], meta["arch"]) == (0, SMALL)


def test_file_without_names_is_in_the_reference_order_and_that_is_said(
    tmp_path: Path, model: eqx.nn.MLP, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "x.eqx", {"schema": 1, "arch": SMALL}, payload(model))
    with caplog.at_level(logging.WARNING, logger="desisky_tune.io"):
        _, meta = load_model("broadband", path=path)
    assert feature_names(meta) == FEATURES
    assert not features_recorded(meta)
    assert "no feature names" in caplog.text
    assert ", ".join(FEATURES) in caplog.text


def test_other_constructors_load_their_own_arch(tmp_path: Path) -> None:
    def make(*, size: int, scale: float) -> dict[str, Any]:
        key = jax.random.PRNGKey(0)
        linear = eqx.nn.Linear(size, size, dtype=jnp.bfloat16, key=key)
        return {"linear": linear, "count": jnp.arange(3), "scale": scale, "table": np.ones((2, 2))}

    built = make(size=3, scale=0.5)
    changed = {**built, "count": built["count"] + 4, "scale": 0.25, "table": np.zeros((2, 2))}
    path = save(tmp_path / "x.eqx", changed, {"arch": {"size": 3, "scale": 0.5}})
    loaded, meta = load(path, make)
    assert eqx.tree_equal(loaded, changed)
    assert meta == {"schema": 1, "arch": {"size": 3, "scale": 0.5}}


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2"])
def test_other_floating_types_are_converted(tmp_path: Path, dtype: str) -> None:
    halves = jax.tree.map(
        lambda x: np.asarray(np.round(8 * x) / 8, dtype), eqx.filter(small_model(), eqx.is_array)
    )
    body = payload(halves)
    loaded, _ = load(write(tmp_path / "x.eqx", {"arch": SMALL}, body), make_broadbandMLP)
    for ours, theirs in zip(
        jax.tree.leaves(eqx.filter(loaded, eqx.is_array)), jax.tree.leaves(halves), strict=True
    ):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


def test_mlp_that_is_not_plain_does_not_pass_for_one(tmp_path: Path) -> None:
    tanh = eqx.nn.MLP(6, 4, 8, 2, activation=jnp.tanh, key=jax.random.PRNGKey(0))
    path = save(tmp_path / "x.eqx", tanh, checkpoint_meta(tanh, features=FEATURES))
    with pytest.raises(CheckpointError, match="variant"):
        load_model("broadband", path=path)

    def make(variant: str, **sizes: int) -> eqx.nn.MLP:
        assert variant == "activation tanh"
        return eqx.nn.MLP(**sizes, activation=jnp.tanh, key=jax.random.PRNGKey(1))

    loaded, _ = load(path, make)
    np.testing.assert_array_equal(loaded(EXPOSURE), tanh(EXPOSURE))


# --- desisky ------------------------------------------------------------------------------------


def desisky_io() -> Any:
    return pytest.importorskip("desisky.io", reason="desisky, of the test extra, is not installed")


def test_desisky_loads_ours_and_predicts_the_same(checkpoint: Path, model: eqx.nn.MLP) -> None:
    theirs, meta = desisky_io().load_model("broadband", path=checkpoint)
    assert meta["features"] == list(FEATURES)
    np.testing.assert_allclose(theirs(EXPOSURE), model(EXPOSURE), atol=1e-4)


def test_we_load_desisky_and_predict_the_same(tmp_path: Path) -> None:
    desisky = desisky_io()
    make = pytest.importorskip(
        "desisky.models.broadband", reason="desisky, of the test extra, is not installed"
    ).make_broadbandMLP
    theirs = make(in_size=6, out_size=4, width_size=128, depth=5)
    arch = {"in_size": 6, "out_size": 4, "width_size": 128, "depth": 5}
    path = desisky.save(tmp_path / "theirs.eqx", theirs, {"schema": 1, "arch": arch})
    ours, _ = load_model("broadband", path=path)
    np.testing.assert_allclose(ours(EXPOSURE), theirs(EXPOSURE), atol=1e-4)


# --- files that cannot be trusted ---------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model("broadband", path=path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "no end"),
        (b'{"arch": {}', "no end"),
        (b"not json\n", "not a JSON header"),
        (b"\xff\xfe\n", "not a JSON header"),
        (b"[" * 100_000 + b"\n", "not a JSON header"),
        (b"9" * 10_000 + b"\n", "not a JSON header"),
        (b"[1, 2]\n", "a list"),
        (b"{}\n", "an object"),
        (b'{"schema": 1}\n', "no 'arch'"),
        (b'{"schema": 2, "arch": {}}\n', "schema 2"),
        (b'{"schema": true, "arch": {}}\n', "schema true"),
        (b'{"arch": [6, 4]}\n', "a list"),
        (b'{"arch": ' + b" " * 2**20 + b"{}}\n", "no end of the header"),
    ],
)
def test_broken_header_is_refused(tmp_path: Path, line: bytes, message: str) -> None:
    assert message in refused(write(tmp_path / "x.eqx", line, b""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "arch holds 'activation'"),
        ({"depth": None}, "arch.depth is None"),
        ({"depth": -1}, "arch.depth is -1"),
        ({"depth": 10**9}, "arch.depth is 1000000000"),
        ({"width_size": 0}, "arch.width_size is 0"),
        ({"width_size": 10**30}, "arch.width_size is 1000"),
        ({"width_size": 2.5}, "arch.width_size is 2.5"),
        ({"in_size": True}, "arch.in_size is True"),
        ({"in_size": "6"}, "arch.in_size is '6'"),
        ({"width_size": 2**20}, "absurd sizes"),
        ({"depth": 900}, "absurd sizes"),
    ],
)
def test_other_architecture_is_refused(
    tmp_path: Path, model: eqx.nn.MLP, change: dict[str, Any], message: str
) -> None:
    header = {"schema": 1, "arch": {**SMALL, **change}}
    assert message in refused(write(tmp_path / "x.eqx", header, payload(model)))


def test_missing_architecture_key_is_named(tmp_path: Path, model: eqx.nn.MLP) -> None:
    arch = {key: value for key, value in SMALL.items() if key != "depth"}
    assert "lacks 'depth'" in refused(write(tmp_path / "x.eqx", {"arch": arch}, payload(model)))


@pytest.mark.parametrize("constructor", ["broadband", "another"])
def test_absurd_sizes_take_no_memory(tmp_path: Path, constructor: str) -> None:
    header = {"arch": {**SMALL, "width_size": 2**18}}
    path = write(tmp_path / "x.eqx", header, payload(small_model()))
    make = (
        make_broadbandMLP
        if constructor == "broadband"
        else partial(eqx.nn.MLP, key=jax.random.PRNGKey(0))
    )
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="absurd sizes"):
            load(path, make)
        assert tracemalloc.get_traced_memory()[1] < 5e6  # the arrays would have 2.7e11 bytes
    finally:
        tracemalloc.stop()


def test_array_that_claims_absurd_sizes_takes_no_memory(tmp_path: Path) -> None:
    body = payload(small_model())
    huge = body.replace(b"'shape': (8, 6), }   ", b"'shape': (800000, 6), }   "[:21], 1)
    assert huge != body
    assert "leaf .layers[0].weight" in refused(write(tmp_path / "x.eqx", {"arch": SMALL}, huge))


def test_leaf_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    other = make_broadbandMLP(in_size=6, out_size=4, width_size=9, depth=2)
    message = refused(write(tmp_path / "x.eqx", {"arch": SMALL}, payload(other)))
    assert "leaf .layers[0].weight has shape (9, 6) in the file, (8, 6)" in message


def test_truncated_file_is_refused_wherever_it_ends(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    for length in range(0, len(whole), 61):
        checkpoint.write_bytes(whole[:length])
        refused(checkpoint)


def test_bytes_behind_the_last_leaf_are_refused(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes() + b"x")
    assert "1 bytes follow the last leaf" in refused(checkpoint)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weight_that_is_not_finite_is_refused(
    tmp_path: Path, model: eqx.nn.MLP, value: float
) -> None:
    broken = eqx.tree_at(lambda m: m.layers[1].bias, model, model.layers[1].bias.at[2].set(value))
    path = write(tmp_path / "x.eqx", {"arch": SMALL}, payload(broken))
    assert "leaf .layers[1].bias holds NaN" in refused(path)
    with pytest.raises(CheckpointError, match=r"not written, leaf \.layers\[1\]\.bias"):
        save(tmp_path / "y.eqx", broken, {"arch": SMALL})
    assert not (tmp_path / "y.eqx").exists()


class _Trap:
    """Unpickling this would be noticed."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pytest.fail, ("the file was unpickled",)


def test_pickles_are_never_opened(tmp_path: Path, model: eqx.nn.MLP) -> None:
    objects = io.BytesIO()
    np.save(objects, np.array([[_Trap()] * 6] * 8, dtype=object), allow_pickle=True)
    for body in (objects.getvalue() + payload(model), pickle.dumps(_Trap()) + payload(model)):
        assert "leaf .layers[0].weight" in refused(write(tmp_path / "x", {"arch": SMALL}, body))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([*FEATURES[:5], "MOONSEPP"], 'unknown feature "MOONSEPP"; did it mean MOONSEP?'),
        ([*FEATURES[:5], FEATURES[0]], "MOONSEP is named twice"),
        (list(FEATURES[:5]), "5 features are named, the model takes 6"),
        ("MOONSEP", "not a list of names"),
        ([1, 2, 3, 4, 5, 6], "not a list of names"),
    ],
)
def test_unknown_features_are_refused(
    tmp_path: Path, model: eqx.nn.MLP, features: Any, message: str
) -> None:
    header = {"arch": SMALL, "features": features}
    assert message in refused(write(tmp_path / "x.eqx", header, payload(model)))


def test_columns_of_the_users_own_are_declared_and_so_known(
    tmp_path: Path, model: eqx.nn.MLP
) -> None:
    order = (*FEATURES[:5], "HUMIDITY")
    meta = checkpoint_meta(model, features=order)
    _, read = load_model("broadband", path=save(tmp_path / "x.eqx", model, meta))
    assert feature_names(read) == order
    assert read["own_features"] == ["HUMIDITY"]


def test_features_that_do_not_fit_are_not_written(model: eqx.nn.MLP) -> None:
    with pytest.raises(CheckpointError, match="MOONSEP is named twice"):
        checkpoint_meta(model, features=(*FEATURES[:5], FEATURES[0]))
    with pytest.raises(CheckpointError, match="5 features are named, the model takes 6"):
        checkpoint_meta(model, features=FEATURES[:5])


def test_header_that_contradicts_the_model_is_not_written(
    tmp_path: Path, model: eqx.nn.MLP
) -> None:
    with pytest.raises(CheckpointError, match=r"arch\.depth is 3, the model's is 2"):
        save(tmp_path / "x.eqx", model, {"arch": {**SMALL, "depth": 3}})
    with pytest.raises(CheckpointError, match="no 'arch'"):
        save(tmp_path / "x.eqx", model, {"schema": 1})
    with pytest.raises(CheckpointError, match=r"header\.model is a MLP"):
        save(tmp_path / "x.eqx", model, {"arch": SMALL, "model": model})
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere\.eqx"):
        load_model("broadband", path=tmp_path / "nowhere.eqx")
    with pytest.raises(MissingFileError):
        load_model("broadband", path=tmp_path)


def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, model: eqx.nn.MLP, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(eqx, "tree_serialise_leaves", full)
    with pytest.raises(StorageError, match="No space left"):
        save(tmp_path / "x.eqx", model, {"arch": SMALL})
    assert list(tmp_path.iterdir()) == []


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_file_loads_or_is_refused_and_nothing_else(
    tmp_path: Path, data: st.DataObject
) -> None:
    body = bytearray(
        json.dumps({"schema": 1, "arch": SMALL, "features": list(FEATURES)}).encode() + b"\n"
    ) + bytearray(payload(small_model()))
    for _ in range(data.draw(st.integers(1, 4))):
        # Most damage goes where it is understood: the two kinds of headers.
        place = data.draw(st.integers(0, 350) | st.integers(0, len(body) - 1))
        body[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del body[data.draw(st.integers(0, len(body))) :]
    path = tmp_path / "damaged.eqx"
    path.write_bytes(body)
    try:
        load_model("broadband", path=path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017  (a flipped weight bit may load)


@pytest.mark.parametrize("bits", [0x7FA00000, 0x7FC00000, 0xFF800000], ids=["sNaN", "NaN", "-inf"])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, bits: int) -> None:
    header = json.dumps({"schema": 1, "arch": SMALL, "features": list(FEATURES)})
    body = header.encode() + b"\n" + payload(small_model())
    path = tmp_path / "damaged.eqx"
    path.write_bytes(body[:-4] + bits.to_bytes(4, "little"))
    with pytest.raises(CheckpointError, match="holds NaN or infinite weights"):
        load_model("broadband", path=path)


# --- kinds of models and their published weights --------------------------------------------------


class _Weights(BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def published(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThreadingHTTPServer]:
    """A loopback server that publishes the weights of the kind "broadband"."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("DESISKY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_Weights, "content", checkpoint.read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Weights)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    publish(monkeypatch, f"http://127.0.0.1:{server.server_port}/weights.eqx", checkpoint)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def publish(monkeypatch: pytest.MonkeyPatch, url: str, checkpoint: Path) -> None:
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    spec = ModelSpec(make_broadbandMLP, "weights.eqx", url, digest)
    monkeypatch.setitem(checkpoints.REGISTRY, "broadband", spec)


def test_published_weights_are_fetched_once(
    published: ThreadingHTTPServer, tmp_path: Path, model: eqx.nn.MLP
) -> None:
    loaded, _ = load_model("broadband")
    assert eqx.tree_equal(loaded, model)
    kept = tmp_path / "cache" / "broadband" / "weights.eqx"
    before = kept.stat().st_mtime_ns
    load_model("broadband")
    assert kept.stat().st_mtime_ns == before


def test_damaged_copy_of_published_weights_is_fetched_again(
    published: ThreadingHTTPServer, tmp_path: Path, model: eqx.nn.MLP
) -> None:
    kept = tmp_path / "cache" / "broadband" / "weights.eqx"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half")
    loaded, _ = load_model("broadband")
    assert eqx.tree_equal(loaded, model)


def test_wrong_checksum_is_refused_and_nothing_kept(
    published: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Weights, "content", b"something else")
    with pytest.raises(DownloadError, match="checksum"):
        load_model("broadband")
    assert not list((tmp_path / "cache" / "broadband").glob("*.eqx"))


def test_without_a_network_the_message_says_what_to_do(
    published: ThreadingHTTPServer,
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket

    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/weights.eqx"
        publish(monkeypatch, url, checkpoint)
        with pytest.raises(DownloadError) as caught:
            load_model("broadband")
    message = str(caught.value)
    assert url in message
    assert str(tmp_path / "cache" / "broadband" / "weights.eqx") in message
    assert "path=" in message


def test_published_weights_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pytest.importorskip("desisky.io.model_io", reason="desisky is not installed")
    monkeypatch.delitem(checkpoints.REGISTRY, "broadband", raising=False)
    with pytest.raises(MissingFileError):
        load_model("broadband", path="nowhere.eqx")
    spec = checkpoints.REGISTRY["broadband"]
    theirs = reference.EXTERNAL_WEIGHTS["broadband"]
    assert (spec.url, spec.sha256) == (theirs["url"], theirs["sha256"])


def test_kinds_can_be_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.setattr("desisky_tune.io.registry.REGISTRY", {})
    with pytest.raises(CheckpointError, match="unknown model kind 'mine'; known: broadband"):
        load_model("mine", path=checkpoint)
    assert load_model("mine", path=checkpoint, constructor=make_broadbandMLP)[1]["arch"] == SMALL
    register_model("mine", ModelSpec(make_broadbandMLP, "mine.eqx"))
    assert load_model("mine", path=checkpoint)[1]["arch"] == SMALL
    monkeypatch.setenv("DESISKY_CACHE_DIR", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="no weights are published for 'mine'"):
        load_model("mine")


def test_checkpoints_go_where_desisky_puts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/astronomer")
    assert get_user_model_dir() == Path("/home/astronomer/.cache/desisky/saved_models")
    assert get_user_model_dir("broadband").name == "broadband"
