"""Checkpoints: one line of JSON, then the leaves of an Equinox model.

The format is desisky's; files go both ways between the two packages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from numpy.typing import NDArray

from desisky_tune.data.columns import BANDS
from desisky_tune.errors import CheckpointError
from desisky_tune.files import atomic_open
from desisky_tune.io.header import (
    ARCH_KEYS,
    KNOWN_FEATURES,
    SCHEMA,
    as_path,
    check_names,
    header_line,
    open_checkpoint,
    parse_header,
    plain_json,
)
from desisky_tune.io.leaves import expected_leaves, finite, read_leaves
from desisky_tune.models.broadband import make_broadbandMLP
from desisky_tune.models.raw_space import mark_raw_space

#: What an architecture may ask for. The widest model that a search tries is 512 x 8.
MAX_SIZE = 2**20
MAX_DEPTH = 1000

#: An array in a payload is never shorter: 128 bytes of header in practice, 64 at least.
_LEAF_BYTES = 64


def save(path: str | os.PathLike[str], model: Any, meta: Mapping[str, Any]) -> Path:
    """Write a model and its header; the file is whole or absent.

    Parameters
    ----------
    path
        The file to write. Its folder is created when missing.
    model
        An Equinox module that takes raw features and gives magnitudes.
    meta
        The header: `arch` (what the constructor takes to build the model again), `schema`
        (1 when missing) and whatever else JSON can hold. `checkpoint_meta` makes one.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    CheckpointError
        When the header has no `arch`, cannot be JSON, or contradicts the model; when a weight is
        not finite.
    StorageError
        When the file cannot be written.
    """
    target = as_path(path)
    line = header_line(meta, target)
    _check_agreement(model, meta["arch"], target)
    broken = finite(model)
    if broken is not None:
        raise CheckpointError(f"{target}: not written, leaf {broken} holds NaN or infinite weights")
    with atomic_open(target, "wb") as stream:
        stream.write(line)
        eqx.tree_serialise_leaves(stream, model)
    return target


def load(
    path: str | os.PathLike[str], constructor: Callable[..., Any]
) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint with the constructor of its model.

    Nothing in the file is executed or unpickled, and no memory is taken for arrays that the file
    does not hold.

    Parameters
    ----------
    path
        The checkpoint.
    constructor
        Called as `constructor(**arch)`. With `make_broadbandMLP`, `arch` must hold exactly
        in_size, out_size, width_size and depth; with any other, what that constructor takes.

    Returns
    -------
    model, meta
        The model, and the header with at least `schema` and `arch`.

    Raises
    ------
    MissingFileError
        When there is no such file.
    CheckpointError
        When the file is damaged, truncated, or does not fit the constructor.
    """
    source = as_path(path)
    with open_checkpoint(source) as stream:
        meta = parse_header(stream, source)
        arch = meta["arch"]
        remaining = os.fstat(stream.fileno()).st_size - stream.tell()
        _check_arch(arch, constructor is make_broadbandMLP, remaining, source)
        like = _construct(constructor, arch, source, abstract=True)
        _check_payload_size(like, remaining, source)
        if constructor is not make_broadbandMLP:
            # A stranger's constructor may keep arrays where only a real call puts them.
            like = _construct(constructor, arch, source, abstract=False)
        return mark_raw_space(read_leaves(stream, like, source)), meta


def load_layers(
    path: str | os.PathLike[str],
) -> tuple[list[tuple[NDArray[np.float32], NDArray[np.float32]]], dict[str, Any]]:
    """Read the weights of a broadband model as NumPy arrays: no device is touched.

    Parameters
    ----------
    path
        The checkpoint.

    Returns
    -------
    layers, meta
        Weight ``(out, in)`` and bias ``(out,)`` by layer, and the header.

    Raises
    ------
    MissingFileError, CheckpointError
        As `load`.
    """
    source = as_path(path)
    with open_checkpoint(source) as stream:
        meta = parse_header(stream, source)
        arch = meta["arch"]
        remaining = os.fstat(stream.fileno()).st_size - stream.tell()
        _check_arch(arch, True, remaining, source)
        sizes = [arch["in_size"], *[arch["width_size"]] * arch["depth"], arch["out_size"]]
        like = [
            (np.empty((units, inputs), np.float32), np.empty(units, np.float32))
            for inputs, units in pairwise(sizes)
        ]
        return read_leaves(stream, like, source), meta


def checkpoint_meta(
    model: Any,
    *,
    features: Sequence[str] | None,
    scaling: Any = None,
    training: Mapping[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Make the header of a checkpoint: the documented keys, then further ones.

    Parameters
    ----------
    model
        The model as it will be saved, scaling folded in.
    features
        The names of its inputs, in its order; None when they are not known. Those that are no
        columns of the catalogue are also listed under `own_features`: a reader refuses names
        that it neither knows nor finds there.
    scaling
        The scaling that was folded in: a `desisky_tune.training.scaling.Scaling`, its `as_dict`,
        or None. Its constant features are listed under `constant_features`.
    training
        date, epoch, test_loss, train_loss, per_band_rmse, config; the date is added when missing.
    **extra
        Further top-level keys (split, seed, versions, data, search, ...).

    Returns
    -------
    dict
        A header that `save` takes.

    Raises
    ------
    CheckpointError
        When features are repeated, or not as many as the model takes.
    """
    meta: dict[str, Any] = {"schema": SCHEMA, "arch": architecture(model)}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    meta["training"] = {"date": now, **(training or {})}
    size = meta["arch"].get("in_size")
    if features is not None:
        names = list(features)
        own = [name for name in names if name not in KNOWN_FEATURES]
        check_names(names, "checkpoint: ", own)
        if size is not None and len(names) != size:
            raise CheckpointError(
                f"checkpoint: {len(names)} features are named, the model takes {size}"
            )
        meta["features"] = names
        if own:
            meta["own_features"] = own
    if meta["arch"].get("out_size") == len(BANDS):
        meta["bands"] = list(BANDS)
    if scaling is not None:
        fitted = scaling if isinstance(scaling, Mapping) else scaling.as_dict()
        meta["scaling"] = {**fitted, "folded": True}
        if features is not None and "constant" in fitted:
            flags = zip(meta["features"], fitted["constant"], strict=True)
            meta["constant_features"] = [name for name, flag in flags if flag]
    meta.update(extra)
    plain: dict[str, Any] = plain_json(meta)
    return plain


def architecture(model: Any) -> dict[str, Any]:
    """Return what goes under `arch` for a model.

    A plain `eqx.nn.MLP` (ReLU, biases, no final activation) gives the four documented keys. One
    that is not plain gets a fifth key that says what it is: a reader that would build the plain
    model then stops, instead of giving other predictions. Any other module gives those of its
    fields that are plain values.
    """
    if isinstance(model, eqx.nn.MLP):
        arch = {key: getattr(model, key) for key in ARCH_KEYS}
        difference = _not_plain(model)
        return {**arch, "variant": difference} if difference else arch
    fields = getattr(model, "__dataclass_fields__", {})
    values = {name: getattr(model, name, None) for name in fields}
    return {name: value for name, value in values.items() if type(value) in (int, float, str, bool)}


def is_plain_mlp(model: Any) -> bool:
    """Whether a model is what `architecture` describes by the four documented keys alone."""
    return type(model) is eqx.nn.MLP and _not_plain(model) is None


def _not_plain(model: eqx.nn.MLP) -> str | None:
    plain = _shapes_of_mlp(*zip(ARCH_KEYS, (1, 1, 1, 1), strict=True))
    if not isinstance(model.in_size, int) or not isinstance(model.out_size, int):
        return "scalar inputs or outputs"
    if model.activation is not plain.activation:
        return f"activation {getattr(model.activation, '__name__', repr(model.activation))}"
    if model.final_activation is not plain.final_activation:
        name = getattr(model.final_activation, "__name__", repr(model.final_activation))
        return f"final activation {name}"
    if not (model.use_bias and model.use_final_bias):
        return "without biases"
    return None


def _check_agreement(model: Any, arch: Mapping[str, Any], path: Path) -> None:
    """Refuse to write an MLP under an `arch` that describes another."""
    if not isinstance(model, eqx.nn.MLP):
        return
    for key in ARCH_KEYS:
        if key in arch and arch[key] != getattr(model, key):
            raise CheckpointError(
                f"{path}: not written, arch.{key} is {arch[key]}, the model's is"
                f" {getattr(model, key)}"
            )


def _check_arch(arch: dict[str, Any], broadband: bool, remaining: int, path: Path) -> None:
    """Check an architecture before anything is built from it."""
    if broadband:
        unknown = [key for key in arch if key not in ARCH_KEYS]
        missing = [key for key in ARCH_KEYS if key not in arch]
        if unknown or missing:
            wrong = f"holds {unknown[0][:40]!r}" if unknown else f"lacks {missing[0]!r}"
            raise CheckpointError(f"{path}: arch {wrong}; it holds exactly {', '.join(ARCH_KEYS)}")
    for key in ARCH_KEYS:
        value = arch.get(key, 1)
        low, high = (0, MAX_DEPTH) if key == "depth" else (1, MAX_SIZE)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            if not broadband and not isinstance(value, int):
                continue  # another constructor may mean something else by the name
            shown = repr(value)[:40]
            raise CheckpointError(
                f"{path}: arch.{key} is {shown}; an integer from {low} to {high} is allowed"
            )
    if broadband:
        sizes = [arch["in_size"], *[arch["width_size"]] * arch["depth"], arch["out_size"]]
        pairs = list(pairwise(sizes))
        weights = sum(fan_in * fan_out + fan_out for fan_in, fan_out in pairs)
        _check_room(weights, 2 * len(pairs), remaining, path)


def _check_payload_size(like: Any, remaining: int, path: Path) -> None:
    shapes = expected_leaves(like)
    _check_room(sum(_product(shape) for shape in shapes), len(shapes), remaining, path)


def _check_room(weights: int, leaves: int, remaining: int, path: Path) -> None:
    """Compare what the header asks for with what the file can hold, a byte a weight at least."""
    if weights + leaves * _LEAF_BYTES > remaining:
        raise CheckpointError(
            f"{path}: arch asks for {weights} weights, {remaining} bytes follow the header;"
            " truncated file or absurd sizes"
        )


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= int(length)
    return count


@lru_cache(maxsize=64)
def _shapes_of_mlp(*arch: tuple[str, Any]) -> Any:
    """Return the shapes of an MLP's arrays; to trace one takes longer than to read its file."""
    return eqx.filter_eval_shape(make_broadbandMLP, **dict(arch))


def _construct(
    constructor: Callable[..., Any], arch: dict[str, Any], path: Path, *, abstract: bool
) -> Any:
    """Build the model, or only its shapes; a constructor that objects is a CheckpointError."""
    try:
        if abstract and constructor is make_broadbandMLP:
            return _shapes_of_mlp(*sorted(arch.items()))
        if abstract:
            return eqx.filter_eval_shape(constructor, **arch)
        return constructor(**arch)
    except jax.errors.JAXTypeError:  # cannot be traced: build it for real
        return constructor(**arch)
    except (TypeError, ValueError) as error:
        name = getattr(constructor, "__name__", type(constructor).__name__)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: {name} cannot build its arch: {reason}") from error
