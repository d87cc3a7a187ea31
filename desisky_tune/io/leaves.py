"""Reading Equinox leaves from a file that nobody vouches for.

A payload is a row of `.npy` arrays, one per leaf. `numpy.load` would believe their headers: it
takes memory for any shape they claim, and may unpickle. Here every array's header is matched
against the one form that NumPy writes, compared with the expected leaf, and only then read.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import jax
import jax.tree_util as jtu
import ml_dtypes
import numpy as np
from equinox import is_array_like

from desisky_tune.errors import CheckpointError

_MAGIC = b"\x93NUMPY"
_MAX_NPY_HEADER = 4096
_NPY_HEADER = re.compile(
    r"\{'descr': '(?P<descr>[<>|=][a-zA-Z][0-9]{1,2})', "
    r"'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>[0-9, ]{0,200})\), \} *\n"
)


def read_leaves(stream: BinaryIO, like: Any, path: str | os.PathLike[str]) -> Any:
    """Fill a tree with the leaves that follow in an open checkpoint.

    Parameters
    ----------
    stream
        Positioned behind the header line.
    like
        A tree with the expected structure; its arrays may be `jax.ShapeDtypeStruct`.
    path
        The file, for the messages.

    Returns
    -------
    tree
        `like` with every array (and Python number) replaced by the file's.

    Raises
    ------
    CheckpointError
        When an array is missing, of another shape or kind, or not finite; when bytes follow the
        last one. The message names the tree path.
    """
    size = os.fstat(stream.fileno()).st_size
    paths_and_leaves, structure = jtu.tree_flatten_with_path(like)
    leaves = [
        _read_leaf(stream, leaf, f"{path}: leaf {jtu.keystr(place)}", size)
        if _stored(leaf)
        else leaf
        for place, leaf in paths_and_leaves
    ]
    left = size - stream.tell()
    if left:
        raise CheckpointError(f"{path}: {left} bytes follow the last leaf; not a whole checkpoint")
    return jtu.tree_unflatten(structure, leaves)


def expected_leaves(like: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the leaves that a payload for `like` holds."""
    return [np.shape(leaf) for leaf in jtu.tree_leaves(like) if _stored(leaf)]


def finite(tree: Any) -> str | None:
    """Return the path of the first leaf that holds a NaN or an infinity, or None."""
    for place, leaf in jtu.tree_flatten_with_path(tree)[0]:
        if _stored(leaf):
            values = np.asarray(leaf)
            if not _is_finite(values):
                return jtu.keystr(place)
    return None


def _stored(leaf: Any) -> bool:
    return isinstance(leaf, (jax.ShapeDtypeStruct, np.ndarray)) or bool(is_array_like(leaf))


def _read_leaf(stream: BinaryIO, like: Any, where: str, size: int) -> Any:
    descr, shape, order = _npy_header(stream, where)
    expected = tuple(np.shape(like))
    if shape != expected:
        raise CheckpointError(f"{where} has shape {shape} in the file, {expected} by its header")
    wanted = np.dtype(like.dtype) if hasattr(like, "dtype") else np.asarray(like).dtype
    convert = _conversion(descr, wanted, where)
    dtype = np.dtype(descr)
    count = math.prod(shape)
    if count * dtype.itemsize > size - stream.tell():
        raise CheckpointError(f"{where} ends early: the file is truncated")
    raw = stream.read(count * dtype.itemsize)
    values = convert(np.frombuffer(raw, dtype=dtype).reshape(shape, order=order))
    if not _is_finite(values):
        raise CheckpointError(f"{where} holds NaN or infinite weights")
    if isinstance(like, np.ndarray):
        return values
    if isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        return jax.device_put(values)  # `asarray` would compile a program for each shape
    return type(like)(values.item())


def _npy_header(stream: BinaryIO, where: str) -> tuple[str, tuple[int, ...], Any]:
    """Read one array's header: dtype string, shape, memory order."""
    start = stream.read(8)
    if len(start) < 8:
        raise CheckpointError(f"{where} is missing: the file is truncated")
    if start[:6] != _MAGIC or start[6] not in (1, 2, 3) or start[7] != 0:
        raise CheckpointError(f"{where} is not an array; damaged file")
    width = "<H" if start[6] == 1 else "<I"
    length_bytes = stream.read(struct.calcsize(width))
    length = struct.unpack(width, length_bytes)[0] if len(length_bytes) >= 2 else 0
    if not 0 < length <= _MAX_NPY_HEADER:
        raise CheckpointError(f"{where} has an array header of {length} bytes; damaged file")
    header = stream.read(length).decode("latin-1")
    match = _NPY_HEADER.fullmatch(header)
    if match is None:
        raise CheckpointError(f"{where} has an array header that NumPy does not write")
    numbers = [part.strip() for part in match["shape"].split(",") if part.strip()]
    if not all(part.isdigit() and len(part) <= 12 for part in numbers):
        raise CheckpointError(f"{where} has the shape ({match['shape'][:60]}); damaged file")
    shape = tuple(int(part) for part in numbers)
    return match["descr"], shape, "F" if match["fortran"] == "True" else "C"


def _conversion(descr: str, wanted: np.dtype[Any], where: str) -> Callable[[Any], Any]:
    """Say how the file's numbers become the leaf's, or refuse."""
    kind, width = descr[1], int(descr[2:])
    if wanted == ml_dtypes.bfloat16 and kind == "V" and width == 2:
        return lambda values: values.view(ml_dtypes.bfloat16)
    native = f"{kind}{width}"
    same = native == f"{wanted.kind}{wanted.itemsize}"
    float_to_float = native in ("f2", "f4", "f8") and _is_floating(wanted)
    if not (same and kind in "biufc") and not float_to_float:
        raise CheckpointError(f"{where} is of kind '{descr}' in the file, {wanted} is expected")

    def convert(values: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(wanted)

    return convert


def _is_floating(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def _is_finite(values: Any) -> bool:
    """Whether all numbers are finite, or of a kind that is always so."""
    if not _is_floating(values.dtype):
        return True
    # A signalling NaN, which damage can make, is "invalid" in any operation.
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(values.astype(np.float64)).all())
