"""Kinds of models by name: who builds them, where their published weights lie."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from desisky_tune.data.columns import FEATURES
from desisky_tune.data.download import fetch
from desisky_tune.errors import CheckpointError, DownloadError
from desisky_tune.files import sha256_file
from desisky_tune.io.header import as_path, feature_names, features_recorded

_log = logging.getLogger("desisky_tune.io")


@dataclass(frozen=True)
class ModelSpec:
    """A kind of model.

    Parameters
    ----------
    constructor
        Called with the header's `arch`.
    resource
        The name of its published weights' file.
    url
        Where the published weights are, or None.
    sha256
        Their SHA-256, 64 hex digits.
    """

    constructor: Callable[..., Any]
    resource: str
    url: str | None = None
    sha256: str | None = None


REGISTRY: dict[str, ModelSpec] = {}


def register_model(kind: str, spec: ModelSpec) -> None:
    """Make `kind` known to `load_model`; an earlier specification of that name is replaced."""
    REGISTRY[kind] = spec


def get_user_model_dir(kind: str | None = None) -> Path:
    """Return where checkpoints are saved by default: `~/.cache/desisky/saved_models[/kind]`."""
    base = Path.home() / ".cache" / "desisky" / "saved_models"
    return base / kind if kind else base


def load_model(
    kind: str,
    path: str | os.PathLike[str] | None = None,
    constructor: Callable[..., Any] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint, or the published weights of a kind of model.

    Parameters
    ----------
    kind
        "broadband", or a name given to `register_model`.
    path
        A checkpoint of desisky_tune or desisky. None: the published weights, downloaded once,
        verified by SHA-256 and kept under `~/.cache/desisky/models/<kind>/` (or
        `$DESISKY_CACHE_DIR/<kind>/`).
    constructor
        Used in place of the registered one.

    Returns
    -------
    model, meta
        The model (raw features to magnitudes) and the header. `feature_names(meta)` is the order
        in which the model takes its inputs.

    Raises
    ------
    CheckpointError
        When the kind is unknown or the file cannot be trusted.
    MissingFileError
        When `path` does not exist.
    DownloadError
        When the published weights cannot be had.
    """
    from desisky_tune.io.checkpoint import load

    spec = _specification(kind, constructor, path)
    if path is None:
        return load(published_weights(kind, spec), constructor or spec.constructor)
    model, meta = load(path, constructor or spec.constructor)
    if kind == "broadband" and constructor is None:
        _say_order(meta, path)
    return model, meta


def _say_order(meta: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Check the recorded names of the inputs; without any, log what is assumed instead."""
    if features_recorded(meta):
        feature_names(meta, path)
    elif meta["arch"]["in_size"] == len(FEATURES):
        order = ", ".join(FEATURES)
        _log.warning("%s records no feature names; taken in the reference order: %s", path, order)
    else:
        _log.warning("%s records no feature names for its inputs", path)


def _specification(
    kind: str, constructor: Callable[..., Any] | None, path: str | os.PathLike[str] | None
) -> ModelSpec:
    if kind == "broadband" and kind not in REGISTRY:
        from desisky_tune.models.broadband import PUBLISHED_SHA256, PUBLISHED_URL, make_broadbandMLP

        spec = ModelSpec(
            make_broadbandMLP, "broadband_weights.eqx", PUBLISHED_URL, PUBLISHED_SHA256
        )
        register_model(kind, spec)
    if kind in REGISTRY:
        return REGISTRY[kind]
    if constructor is not None and path is not None:
        return ModelSpec(constructor, "")
    known = ", ".join(sorted({"broadband", *REGISTRY}))
    raise CheckpointError(
        f"unknown model kind {kind!r}; known: {known} (register_model adds one,"
        " constructor= with path= needs none)"
    )


def published_weights(kind: str, spec: ModelSpec) -> Path:
    """Return the path of a kind's published weights, downloading them when they are not there.

    Raises
    ------
    DownloadError
        When they cannot be fetched or have the wrong SHA-256.
    CheckpointError
        When none are published.
    """
    target = _weights_folder(kind) / spec.resource
    if target.is_file() and (spec.sha256 is None or sha256_file(target) == spec.sha256):
        return target
    if spec.url is None:
        raise CheckpointError(f"no weights are published for {kind!r}; give path= a checkpoint")
    try:
        return fetch(spec.url, target, sha256=spec.sha256)
    except DownloadError as error:
        raise DownloadError(
            f"no published {kind} weights: {error} (SHA-256 {spec.sha256});"
            " or give path= another checkpoint"
        ) from error


def _weights_folder(kind: str) -> Path:
    configured = os.environ.get("DESISKY_CACHE_DIR")
    base = as_path(configured) if configured else Path.home() / ".cache" / "desisky" / "models"
    return base / kind
