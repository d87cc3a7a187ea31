"""The first line of a checkpoint: what it may hold, and what its keys mean.

Nothing here imports JAX, so a header can be looked at in milliseconds.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from desisky_tune.data.columns import FEATURES
from desisky_tune.errors import CheckpointError, MissingFileError

SCHEMA = 1
#: A header with the EXPIDs of the whole VAC in it has 0.1 MiB.
MAX_HEADER_BYTES = 2**20

#: The keys under `arch` of the broadband model: the reader calls `constructor(**arch)`.
ARCH_KEYS: tuple[str, ...] = ("in_size", "out_size", "width_size", "depth")

#: Columns that a model may take as inputs: the VAC's conditions and what is computed from them.
KNOWN_FEATURES: frozenset[str] = frozenset(FEATURES) | {
    *("TILERA", "TILEDEC", "MJD", "EXPTIME", "AIRMASS", "EBV", "SEEING_ETC", "SEEING_GFA"),
    *("SUNALT", "SUNSEP", "OBSAZ", "SOLFLUX", "GALLON", "GALLAT", "ECLLON", "ECLLAT", "PWV_los"),
}


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the header of a checkpoint, and nothing else of it.

    Parameters
    ----------
    path
        A checkpoint written by desisky_tune or desisky.

    Returns
    -------
    dict
        At least `schema` (int) and `arch` (dict), then every further key of the file. A legacy
        flat header comes back with its keys under `arch` and schema 0.

    Raises
    ------
    MissingFileError
        When the file does not exist or cannot be opened.
    CheckpointError
        When the first line is not such a header.
    """
    with open_checkpoint(path) as stream:
        return parse_header(stream, path)


def open_checkpoint(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a checkpoint for reading.

    Raises
    ------
    MissingFileError
        When the file does not exist or cannot be opened.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise MissingFileError(f"cannot read checkpoint {path}: {error.strerror}") from error


def parse_header(stream: BinaryIO, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Take the header line off an open checkpoint; `path` is for the messages.

    Raises
    ------
    CheckpointError
        When the line is missing, longer than 1 MiB, not JSON, or lacks `arch`.
    """
    line = stream.readline(MAX_HEADER_BYTES + 1)
    if len(line) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: no end of the header within {MAX_HEADER_BYTES} bytes; not a checkpoint"
        )
    if not line.endswith(b"\n"):
        raise CheckpointError(f"{path}: the header line has no end; empty or truncated file")
    try:
        header = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: the first line is not a JSON header: {reason}") from error
    if not isinstance(header, dict) or not header:
        raise CheckpointError(f"{path}: the header is {_kind(header)}, not a JSON object with keys")
    return _normalise(header, path)


def _normalise(header: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    schema = header.get("schema", 0)
    if isinstance(schema, bool) or not isinstance(schema, int) or not 0 <= schema <= SCHEMA:
        raise CheckpointError(
            f"{path}: schema {_shown(schema)} is not known; this version reads 0 to {SCHEMA}"
        )
    if "arch" not in header:  # legacy: the arch keys stand at the top level
        arch = {key: value for key, value in header.items() if key != "schema"}
        if not arch:
            raise CheckpointError(f"{path}: the header has no 'arch'")
        return {"schema": schema, "arch": arch}
    if not isinstance(header["arch"], dict):
        raise CheckpointError(f"{path}: 'arch' is {_kind(header['arch'])}, not a JSON object")
    rest = {key: value for key, value in header.items() if key not in ("schema", "arch")}
    return {"schema": schema, "arch": header["arch"], **rest}


def header_line(meta: Mapping[str, Any], path: str | os.PathLike[str]) -> bytes:
    """Encode a header as the one line that a checkpoint starts with.

    NumPy scalars and arrays, tuples and paths are written as plain JSON; a number that is not
    finite is written as null, because NaN is not JSON.

    Raises
    ------
    CheckpointError
        When `meta` lacks `arch`, holds something that JSON cannot, or is longer than 1 MiB.
    """
    if not isinstance(meta.get("arch"), Mapping):
        raise CheckpointError(f"{path}: the header to write has no 'arch' mapping")
    plain = plain_json({"schema": SCHEMA, **meta}, where=f"{path}: header")
    line = json.dumps(plain, allow_nan=False).encode() + b"\n"
    if len(line) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: the header to write has {len(line)} bytes; at most {MAX_HEADER_BYTES}"
        )
    return line


def plain_json(value: Any, where: str = "header") -> Any:
    """Return `value` as dicts, lists, strings, numbers, booleans and None."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise CheckpointError(f"{where} is a {type(value).__name__}, which a JSON header cannot hold")


def feature_names(meta: Mapping[str, Any], path: str | os.PathLike[str] = "") -> tuple[str, ...]:
    """Return the inputs of a checkpoint's model, in the order in which it takes them.

    A header without `features` means the reference order (`desisky_tune.data.columns.FEATURES`);
    `features_recorded` tells the two apart.

    Parameters
    ----------
    meta
        The header, as `read_header` or `load` give it.
    path
        The file, for the messages.

    Raises
    ------
    CheckpointError
        When the names are unknown, repeated, or not as many as the model takes.
    """
    label = f"{path}: " if path else "checkpoint: "
    size = meta["arch"].get("in_size")
    if not features_recorded(meta):
        if size != len(FEATURES):
            raise CheckpointError(
                f"{label}records no feature names and takes {_shown(size)} inputs;"
                f" the reference order has {len(FEATURES)}"
            )
        return FEATURES
    names = meta["features"]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{label}'features' is {_shown(names)}, not a list of names")
    check_names(names, label, own=_names(meta, "own_features"))
    if size is not None and len(names) != size:
        raise CheckpointError(f"{label}{len(names)} features are named, the model takes {size}")
    return tuple(names)


def features_recorded(meta: Mapping[str, Any]) -> bool:
    """Say whether the file itself names its features."""
    return meta.get("features") is not None


def check_names(names: Sequence[str], label: str = "", own: Sequence[str] = ()) -> None:
    """Refuse feature names that are unknown or repeated.

    Parameters
    ----------
    names
        To check.
    label
        Begins the messages.
    own
        Columns of the user's own, which are known as well.

    Raises
    ------
    CheckpointError
        Naming the feature and, where there is one, the nearest known name.
    """
    for position, name in enumerate(names):
        if name not in KNOWN_FEATURES and name not in own:
            near = difflib.get_close_matches(name, sorted(KNOWN_FEATURES), n=1)
            hint = f"; did it mean {near[0]}?" if near else ""
            raise CheckpointError(f"{label}unknown feature {_shown(name)}{hint}")
        if name in names[:position]:
            raise CheckpointError(f"{label}feature {name} is named twice")


def constant_features(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the features that never varied in training: the model does not look at them."""
    return _names(meta, "constant_features")


def _names(meta: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = meta.get(key) or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"checkpoint: '{key}' is {_shown(names)}, not a list of names")
    return tuple(names)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return kinds.get(type(value), "null" if value is None else "a number")


def _shown(value: Any) -> str:
    """Show a value of a stranger's file on one short line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def as_path(path: str | os.PathLike[str]) -> Path:
    """Expand `~`, as a shell would have done."""
    return Path(path).expanduser()
