"""Parquet files of whatever origin, read without running code of theirs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from desisky_tune.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

#: In Arrow's written form of a schema beside every extension type, however deep it is nested.
_EXTENSION = b"ARROW:extension:name"


def read_parquet(
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    filters: Sequence[tuple[str, str, Any]] | None = None,
) -> pa.Table:
    """Read a Parquet file without extension types.

    A package may make an extension type unpickle its values: Ray has one that does, known to
    Arrow as soon as Ray Tune is imported.

    Parameters
    ----------
    path
        Of the file.
    columns
        Those to read; by default all.
    filters
        Of the rows, as pyarrow takes them.

    Raises
    ------
    DataError
        When a column of the file, to be read or not, has an extension type. The message
        does not name the file.
    OSError, pyarrow.ArrowException
        When it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(os.fspath(path)) as file:
        # Without Arrow's types of its own for JSON and UUIDs: they are text and bytes.
        schema = pq.ParquetFile(file, arrow_extensions_enabled=False).schema_arrow
        for field in schema:
            if _EXTENSION in pa.schema([field]).serialize().to_pybytes():
                raise DataError(
                    f"column {field.name!r} has an extension type, whose values may be code; "
                    "allowed are Arrow's plain types"
                )
        return pq.read_table(file, columns=columns, filters=filters, arrow_extensions_enabled=False)
