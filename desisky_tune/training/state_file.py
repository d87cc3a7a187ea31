"""A training's state on disk: a line of JSON, then the arrays. Nothing is pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax

from desisky_tune.errors import CheckpointError, MissingFileError
from desisky_tune.files import atomic_open

if TYPE_CHECKING:
    from desisky_tune.training.program import TrainState

_KIND = "desisky_tune training state"
_SCHEMA = 1
#: Bytes of the first line: notes may hold the curves of a million epochs.
_LONGEST_HEADER = 1 << 28


def write_state(
    path: str | os.PathLike[str], state: TrainState, notes: Mapping[str, Any] | None = None
) -> None:
    """Write a state atomically, with whatever else JSON can hold.

    Raises
    ------
    StorageError
        When the file cannot be written.
    """
    header = {
        "kind": _KIND,
        "schema": _SCHEMA,
        "epoch": int(state.epoch),
        "leaves": _leaves(state),
        "notes": dict(notes or {}),
    }
    with atomic_open(path, "wb") as stream:
        stream.write(json.dumps(header, allow_nan=False).encode() + b"\n")
        eqx.tree_serialise_leaves(stream, state)


def read_state(path: str | os.PathLike[str], like: Any) -> tuple[TrainState, dict[str, Any]]:
    """Read a state with the shapes of `like`, and the notes that were written with it.

    Raises
    ------
    MissingFileError
        When there is no such file.
    CheckpointError
        When it is truncated, or no state, or of a program of another shape.
    """
    try:
        stream = open(path, "rb")  # noqa: SIM115  (closed below)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such training state") from None
    with stream:
        try:
            header = json.loads(stream.readline(_LONGEST_HEADER))
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("kind") != _KIND:
            raise CheckpointError(f"{path}: is no training state")
        if header.get("schema") != _SCHEMA:
            raise CheckpointError(
                f"{path}: training state of schema {header.get('schema')}; known: {_SCHEMA}"
            )
        expected = _leaves(like)
        if header.get("leaves") != expected:
            raise CheckpointError(
                f"{path}: is the state of a program of another shape"
                f" ({_first_difference(header.get('leaves'), expected)})"
            )
        try:
            state = eqx.tree_deserialise_leaves(stream, like)
        except (EOFError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: training state is truncated or damaged") from error
        if stream.read(1):
            raise CheckpointError(f"{path}: training state is followed by further bytes")
    return state, dict(header.get("notes") or {})


def _leaves(tree: Any) -> list[str]:
    return [
        f"{jax.tree_util.keystr(place)} {leaf.dtype}{list(leaf.shape)}"
        for place, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _first_difference(found: Any, expected: list[str]) -> str:
    if not isinstance(found, list):
        return "no list of arrays"
    for have, want in zip(found, expected, strict=False):
        if have != want:
            return f"{have} where {want} was expected"
    return f"{len(found)} arrays where {len(expected)} were expected"
