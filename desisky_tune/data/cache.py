"""Feature tables kept as Parquet, under the content they were made from and the code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desisky_tune.data.parquet import read_parquet
from desisky_tune.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

_PROVENANCE = b"desisky_tune"
#: Packages whose numbers go into a feature table: ephemerides and filter curves.
_NUMERICAL_PACKAGES = ("astropy", "speclite")


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of cached tables: `cache_dir`, or below XDG_CACHE_HOME."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "desisky_tune" / "features"


def cache_key(content: str, options: Mapping[str, Any]) -> str:
    """Return the name under which a table is kept, 64 hex digits.

    Parameters
    ----------
    content
        SHA-256 of the whole input file. (Every byte is read, at about 1.5 GB/s from
        memory: samples of it could miss a change.)
    options
        What was asked for, JSON-able.
    """
    signed = {"content": content, "options": dict(options), "code": code_version()}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def code_version() -> str:
    """Return a digest of the code that makes feature tables.

    It covers the source of this room and the versions of the packages whose numbers
    it uses, so that an edited checkout never meets a table of its past.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    for package in _NUMERICAL_PACKAGES:
        digest.update(f"{package} {version(package)}".encode())
    return digest.hexdigest()


def read_cached(
    key: str, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """Return a kept table and its provenance, or None where there is none that reads."""
    import pyarrow as pa

    path = cache_folder(cache_dir) / f"{key}.parquet"
    try:
        table = read_parquet(path)
        provenance = json.loads(table.schema.metadata[_PROVENANCE])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        # A damaged entry costs no more than making the table again.
        return None
    frame = table.to_pandas()
    frame.attrs = {"v_derived": provenance["v_derived"]}
    return frame, provenance


def write_cached(
    key: str,
    frame: pd.DataFrame,
    provenance: Mapping[str, Any],
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Keep a table under a key.

    Raises
    ------
    StorageError
        When it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = cache_folder(cache_dir) / f"{key}.parquet"
    plain = frame.copy(deep=False)
    plain.attrs = {}
    table = pa.Table.from_pandas(plain, preserve_index=False)
    noted = {**(table.schema.metadata or {}), _PROVENANCE: json.dumps(provenance).encode()}
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(noted), temporary)
    return path
