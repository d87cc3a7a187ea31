"""The Parquet tables of a run, derived from its records.

Their columns and types are the same whatever the records hold, also without any.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from desisky_tune.data.columns import BANDS
from desisky_tune.files import atomic_path
from desisky_tune.search.backend import CURVE_SERIES
from desisky_tune.search.hyperparameters import OPTIONAL, in_full

if TYPE_CHECKING:
    from desisky_tune.search.records import TrialRecord

#: ``trials.parquet``: a row per trial. RMSE in mag; times in seconds, since 1970-01-01
#: UTC where they are points in time; epochs count from 0. Optional hyperparameters that a
#: search did not name stand there as what they were: off.
TRIALS_SCHEMA = pa.schema(
    [
        ("trial", pa.int64()),
        ("state", pa.string()),
        ("reason", pa.string()),
        ("objective", pa.float64()),
        *((f"rmse_{band}", pa.float64()) for band in BANDS),
        ("width", pa.int64()),
        ("depth", pa.int64()),
        ("learning_rate", pa.float64()),
        ("huber_delta", pa.float64()),
        ("batch_size", pa.int64()),
        ("schedule", pa.string()),
        ("warmup", pa.float64()),
        ("final_rate", pa.float64()),
        ("weight_decay", pa.float64()),
        ("gradient_clip", pa.float64()),
        ("early_stopping", pa.int64()),
        ("parameters", pa.int64()),
        ("epochs", pa.int64()),
        ("best_epoch", pa.int64()),
        ("seconds", pa.float64()),
        ("seed", pa.int64()),
        ("started", pa.float64()),
        ("ended", pa.float64()),
    ]
)

#: ``curves.parquet``: a row per trial and epoch.
CURVES_SCHEMA = pa.schema(
    [
        ("trial", pa.int64()),
        ("epoch", pa.int64()),
        *((name, pa.float64()) for name in CURVE_SERIES),
    ]
)


def trial_row(record: TrialRecord) -> dict[str, Any]:
    """Return a record as one row of `TRIALS_SCHEMA`."""
    configuration, rmse = in_full(record.configuration), record.rmse or {}
    return {
        "trial": record.number,
        "state": record.state,
        "reason": record.reason,
        "objective": record.objective,
        **{f"rmse_{band}": rmse.get(band) for band in BANDS},
        "width": int(configuration["width"]),
        "depth": int(configuration["depth"]),
        "learning_rate": float(configuration["learning_rate"]),
        "huber_delta": float(configuration["huber_delta"]),
        "batch_size": int(configuration["batch_size"]),
        **{name: configuration[name] for name in OPTIONAL},
        "parameters": record.parameters,
        "epochs": record.epochs,
        "best_epoch": record.best_epoch,
        "seconds": record.seconds,
        "seed": record.seed,
        "started": record.started,
        "ended": record.ended,
    }


def write_trials(records: Sequence[TrialRecord], folder: str | Path) -> Path:
    """Write ``trials.parquet`` in `folder`, whole; return its path."""
    return _write(trials_table(records), Path(folder) / "trials.parquet")


def write_curves(records: Sequence[TrialRecord], folder: str | Path) -> Path:
    """Write ``curves.parquet`` in `folder`, whole; return its path."""
    return _write(curves_table(records), Path(folder) / "curves.parquet")


def trials_table(records: Sequence[TrialRecord]) -> pa.Table:
    """Return records as a table of `TRIALS_SCHEMA`."""
    return pa.Table.from_pylist([trial_row(record) for record in records], schema=TRIALS_SCHEMA)


def curves_table(records: Sequence[TrialRecord]) -> pa.Table:
    """Return the curves of records as a table of `CURVES_SCHEMA`.

    Series that a record lacks, or that are shorter than its others, end in nulls.
    """
    lengths = [max(map(len, record.curve.values()), default=0) for record in records]
    columns: dict[str, Any] = {
        "trial": np.repeat([record.number for record in records], lengths).astype(np.int64),
        "epoch": np.concatenate([np.arange(length) for length in [0, *lengths]]).astype(np.int64),
    }
    for name in CURVE_SERIES:
        series: list[float | None] = []
        for record, length in zip(records, lengths, strict=True):
            values = record.curve.get(name, [])
            series += [*values, *[None] * (length - len(values))]
        columns[name] = pa.array(series, pa.float64())
    return pa.table(columns, schema=CURVES_SCHEMA)


def _write(table: pa.Table, path: Path) -> Path:
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return path
