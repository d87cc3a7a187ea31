"""The Ray Data path: ranges of rows of a FITS file -> Arrow blocks -> thin rows.

The only module of this room that knows Ray. Read tasks take rows of the file and
yield Arrow blocks with the spectra as a tensor column; geometry, cut, photometry and
eclipse run over the blocks, which Ray fuses with the read, so that a spectrum lives in
one task alone and never reaches the object store. Only thin rows come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import TARGETS
from desisky_tune.data.exposures import geometry_columns, set_eclipse
from desisky_tune.data.fits import SpectraFile
from desisky_tune.data.geometry import GEOMETRY_COLUMNS
from desisky_tune.data.names import POINTING
from desisky_tune.data.remote import local_copy
from desisky_tune.data.subsets import (
    Conditions,
    condition_columns,
    count_removed,
    first_failure,
)
from desisky_tune.errors import DesiskyTuneError
from desisky_tune.ray_session import ray_session

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from ray.data import Dataset

#: Rows of a read task at most: 32 MB of the VAC's spectra.
ROWS_PER_TASK = 1024
#: Read tasks at least, so that all workers have some; where that leaves each so many rows, for a
#: worker that starts costs more than they do.
_LEAST_TASKS, _LEAST_ROWS = 8, 128
#: Rows of METADATA looked at in one go by the driver.
_ROWS_PER_SCAN = 1 << 16

_FLUX = "FLUX"
_FAILED = "FAILED_CONDITION"
_V = TARGETS[0]

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Ingest:
    """What came out of a file of spectra.

    Attributes
    ----------
    frame
        One row per exposure that passed, in the order of the file; no spectra.
    rows_read
        Rows of the file.
    removed
        By condition, the rows that it was the first to remove.
    """

    frame: pd.DataFrame
    rows_read: int
    removed: dict[str, int]


def ingest(
    file: SpectraFile,
    conditions: Conditions,
    *,
    eclipse: str = "exact",
    address: str | None = None,
    origin: str | None = None,
) -> Ingest:
    """Turn a file of spectra into rows of features and magnitudes, with Ray Data.

    Where METADATA has the columns that the cut compares, the cut is made before a
    spectrum is read, and only the spectra of rows that pass are. Missing geometry is
    computed by the workers, which then cut. Missing V magnitudes come from FLUX.

    Parameters
    ----------
    file
        The opened file. On a cluster its path must be readable on every node, or `origin`
        be given.
    conditions
        The cut.
    eclipse
        As in :func:`~desisky_tune.data.exposures.set_eclipse`.
    address
        Of a Ray cluster; a Ray that this process already runs is used, else a local
        one is started for the time of the call.
    origin
        The URL that `file` is a copy of: a node that has no copy makes its own.

    Raises
    ------
    DataError
        When a column is missing, or the file cannot be read to its end.
    """
    import pandas as pd
    import pyarrow as pa

    missing = [name for name in GEOMETRY_COLUMNS if name not in file.columns]
    if missing and not set(POINTING) <= set(file.columns):
        file.require([*missing, *POINTING])
    early = set(condition_columns(conditions)) <= set(file.columns)
    if early:
        rows, removed = _scan(file, conditions)
        if len(rows) == 0:
            return Ingest(pd.DataFrame(), file.rows, removed)
    else:
        file.require([c for c in condition_columns(conditions) if c not in GEOMETRY_COLUMNS])
        rows, removed = np.arange(file.rows), {}
    with ray_session(address=address), _quiet_data_context(), _own_errors():
        dataset = spectra_dataset(file, rows, with_flux=_V not in file.columns, origin=origin)
        dataset = dataset.map_batches(add_geometry, batch_size=None, batch_format="numpy")
        dataset = _mapped(dataset, mark_cut, conditions=() if early else conditions)
        dataset = _mapped(dataset, add_photometry, wavelength=file.wavelength)
        dataset = _mapped(dataset, add_eclipse, eclipse=eclipse)
        tables: list[pa.Table] = []
        block: Any
        counts = np.zeros(len(conditions), dtype=np.int64)
        for block in dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            failed = np.asarray(block.column(_FAILED))
            counts += np.bincount(failed[failed >= 0], minlength=len(conditions))
            tables.append(block.filter(pa.array(failed < 0)).drop_columns([_FAILED]))
    if not early:
        removed = {str(c): int(n) for c, n in zip(conditions, counts, strict=True)}
    return Ingest(pa.concat_tables(tables).to_pandas(), file.rows, removed)


def spectra_dataset(
    file: SpectraFile, rows: np.ndarray, *, with_flux: bool = True, origin: str | None = None
) -> Dataset:
    """Return a Ray Dataset of some rows of a file: METADATA and, as tensors, FLUX.

    Parameters
    ----------
    file
        The opened file.
    rows
        Positions, ascending; each read task takes a range of them.
    with_flux
        Without it only METADATA is read.
    origin
        As in :func:`ingest`.
    """
    import ray
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    row_bytes = 8 * len(file.columns) + (4 * len(file.wavelength) if with_flux else 0)

    class SpectraDatasource(Datasource):
        """Ranges of rows of one FITS file."""

        def get_name(self) -> str:
            return "SkySpectra"

        def estimate_inmemory_data_size(self) -> int:
            return row_bytes * len(rows)

        def get_read_tasks(
            self,
            parallelism: int,
            per_task_row_limit: int | None = None,
            data_context: Any = None,
        ) -> list[ReadTask]:
            return [
                ReadTask(
                    partial(_read_block, file, piece, with_flux, origin),
                    BlockMetadata(
                        num_rows=len(piece),
                        size_bytes=row_bytes * len(piece),
                        exec_stats=None,
                        input_files=(str(file.path),),
                    ),
                    per_task_row_limit=per_task_row_limit,
                )
                for piece in np.array_split(rows, parallelism)
                if len(piece)
            ]

    some = min(_LEAST_TASKS, -(-len(rows) // _LEAST_ROWS))
    tasks = max(-(-len(rows) // ROWS_PER_TASK), some)
    return ray.data.read_datasource(SpectraDatasource(), override_num_blocks=tasks)


def add_geometry(batch: Batch) -> Batch:
    """Compute the Moon, Sun and pointing columns that the batch lacks."""
    missing = [name for name in GEOMETRY_COLUMNS if name not in batch]
    if not missing:
        return batch
    computed = geometry_columns(batch)
    return batch | {name: computed[name] for name in missing}


def mark_cut(batch: Batch, conditions: Conditions) -> Batch:
    """Add the place of the first condition that each row fails, -1 for those that pass.

    Rows that fail are marked and not dropped, for the driver counts them.
    """
    rows = len(next(iter(batch.values())))
    return batch | {_FAILED: first_failure(batch, conditions, rows)}


def add_photometry(batch: Batch, wavelength: np.ndarray) -> Batch:
    """Compute V of the rows that pass, where the table has none, and drop the spectra."""
    if _FLUX not in batch:
        return batch
    from desisky_tune.data.photometry import magnitudes

    flux = batch.pop(_FLUX)
    passed = batch[_FAILED] < 0
    v = np.full(len(flux), np.nan)
    if passed.any():
        chosen = flux if passed.all() else flux[passed]
        v[passed] = magnitudes(chosen, wavelength, bands=("V",))[:, 0]
    return batch | {_V: v}


def add_eclipse(batch: Batch, eclipse: str) -> Batch:
    """Set ECLIPSE_FRAC as asked."""
    set_eclipse(batch, eclipse, rows=len(batch[_FAILED]))
    return batch


def _mapped(dataset: Dataset, function: Any, **arguments: Any) -> Dataset:
    return dataset.map_batches(function, batch_size=None, batch_format="numpy", fn_kwargs=arguments)


def _read_block(
    file: SpectraFile, rows: np.ndarray, with_flux: bool, origin: str | None = None
) -> Iterator[pa.Table]:
    """Read some rows into one Arrow block."""
    import pyarrow as pa
    from ray.data.extensions import ArrowTensorArray

    if origin is not None and not file.path.exists():
        file = replace(file, path=local_copy(origin))
    first, last = int(rows[0]), int(rows[-1])
    metadata = file.metadata(slice(first, last + 1))
    columns: Mapping[str, Any] = {
        name: pa.array(values[rows - first]) for name, values in metadata.items()
    }
    if with_flux:
        columns = {**columns, _FLUX: ArrowTensorArray.from_numpy(file.flux(rows))}
    yield pa.table(columns)


def _scan(file: SpectraFile, conditions: Conditions) -> tuple[np.ndarray, dict[str, int]]:
    """Cut by METADATA alone: the rows that pass, and how many each condition removed."""
    failed = np.concatenate(
        [
            first_failure(
                file.metadata(slice(start, start + _ROWS_PER_SCAN)),
                conditions,
                min(_ROWS_PER_SCAN, file.rows - start),
            )
            for start in range(0, file.rows, _ROWS_PER_SCAN)
        ]
    )
    return np.flatnonzero(failed < 0), count_removed(failed, conditions)


@contextmanager
def _quiet_data_context() -> Iterator[None]:
    """Run with a copy of Ray Data's settings: rows in order, no bars, no chatter."""
    import logging

    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    with DataContext.current(context):
        # An error is raised here all the same; it need not be printed three times.
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Let an error of ours, raised in a worker, arrive here as itself."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        cause: BaseException | None = error
        while cause is not None:
            inner = getattr(cause, "cause", None) or cause.__cause__
            if isinstance(inner, DesiskyTuneError) and not isinstance(inner, RayTaskError):
                # Ray appends advice of its own below our line.
                raise type(inner)(str(inner).splitlines()[0]) from error
            cause = inner
        raise
