"""The feature table: what every training, search and evaluation starts from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import desisky_tune
from desisky_tune.data.cache import cache_key, read_cached, write_cached
from desisky_tune.data.columns import EXPOSURE_ID, FEATURES, NIGHT, TARGETS
from desisky_tune.data.exposures import (
    ECLIPSE_CHOICES,
    complete_table,
    normalise_names,
    set_eclipse,
)
from desisky_tune.data.fits import SpectraFile, check_readable, has_spectra_layout
from desisky_tune.data.names import require_columns
from desisky_tune.data.remote import is_url, local_copy
from desisky_tune.data.subsets import cut, refuse_empty, subset_conditions
from desisky_tune.data.tables import is_fits, read_raw_table
from desisky_tune.errors import DataError
from desisky_tune.files import sha256_file

if TYPE_CHECKING:
    import pandas as pd

#: Magnitudes outside are no sky (mag/arcsec2): such rows are dropped and counted.
MAGNITUDE_RANGE: tuple[float, float] = (10.0, 25.0)

#: Names of sources that are no path.
SHIPPED = "sv1"
CATALOGUE = "vac"

_SAMPLE_FILE = "desi-sv1-exposures.csv"


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Exposures with their features and magnitudes, ready to be learnt from.

    Attributes
    ----------
    frame
        One row per exposure, ascending EXPID: EXPID and NIGHT int64, FEATURES and
        TARGETS float64 and finite, magnitudes within 10-25; further columns as they
        came. No spectra.
    provenance
        JSON-able: ``source``, ``path``, ``source_sha256``, ``subset``, ``eclipse``,
        ``exclude_known_bad``, ``v_derived``, ``rows_read``, ``rows``, ``removed``
        (rows by reason, in the order of the steps), ``fingerprint``, ``version``.
    """

    frame: pd.DataFrame
    provenance: dict[str, Any]

    @property
    def v_derived(self) -> bool:
        """Whether V was made from g and r."""
        return bool(self.provenance["v_derived"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the exposures, features and magnitudes, 64 hex digits."""
        return str(self.provenance["fingerprint"])

    def arrays(
        self,
        rows: np.ndarray | Sequence[int] | None = None,
        features: Sequence[str] = FEATURES,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs (n, f) and the magnitudes (n, 4) in V, g, r, z, float32.

        Parameters
        ----------
        rows
            Positions in the frame; all by default.
        features
            Columns, in the order wanted.

        Raises
        ------
        DataError
            When a feature is no column of the frame.
        """
        require_columns(features, self.frame.columns, where="the feature table")
        chosen = self.frame if rows is None else self.frame.iloc[np.asarray(rows)]
        return (
            chosen[list(features)].to_numpy(dtype=np.float32),
            chosen[list(TARGETS)].to_numpy(dtype=np.float32),
        )


def load_features(
    source: str | os.PathLike[str] = SHIPPED,
    subset: str = "moon",
    *,
    eclipse: str = "exact",
    exclude_known_bad: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    address: str | None = None,
) -> FeatureTable:
    """Load a source as a feature table.

    Parameters
    ----------
    source
        ``"sv1"``: the real exposures that ship with the package; ``"vac"``: the
        sky-spectra VAC where it was downloaded to; or the path of a file. A FITS file
        with the VAC's layout (a simulated one, say) goes through Ray Data and is
        cached; any other file is read as a table of exposures. A URL that pyarrow or
        fsspec opens (``s3://``, ``gs://``, ...) stands for a file too.
    subset
        ``moon``, ``dark``, ``twilight`` or ``all``.
    eclipse
        ``"exact"`` (computed), ``"none"`` (0 everywhere) or ``"table"`` (the source's
        own column).
    exclude_known_bad
        Leave out the nights with smoke of June 2021.
    cache_dir
        Of the feature tables made from spectra; by default
        ``$XDG_CACHE_HOME/desisky_tune/features`` (``~/.cache/...``). The key is the
        SHA-256 of the whole file together with the options and the code.
    address
        Of a Ray cluster to use for spectra.

    Raises
    ------
    MissingFileError
        When there is no such file.
    DataError
        When the file is damaged, a column is missing, or no row is left (with how
        many each condition removed).
    """
    subset_conditions(subset)  # an unknown subset is refused before a file is touched
    if eclipse not in ECLIPSE_CHOICES:
        raise DataError(f"eclipse = {eclipse!r}: one of {', '.join(ECLIPSE_CHOICES)}")
    path = source_path(source)
    options = {
        "subset": subset,
        "eclipse": eclipse,
        "exclude_known_bad": bool(exclude_known_bad),
    }
    notes = {"source": str(source), "path": str(path)}
    if needs_ray(source):
        return _from_spectra(path, notes, options, cache_dir, address)
    return _from_table(path, notes, options)


def needs_ray(source: str | os.PathLike[str]) -> bool:
    """Return whether a source holds spectra, which go through Ray Data.

    Raises
    ------
    MissingFileError, DataError
        When there is no such file, or it is a damaged FITS file.
    """
    path = source_path(source)
    return is_fits(path) and has_spectra_layout(path)


def source_path(source: str | os.PathLike[str]) -> Path:
    """Return the file that a source stands for; that of a URL is a local copy.

    Raises
    ------
    MissingFileError
        When there is no such file.
    """
    if source == SHIPPED:
        return Path(str(resources.files("desisky_tune.data") / "sample" / _SAMPLE_FILE))
    if source == CATALOGUE:
        from desisky_tune.data.vac import SkySpecVAC

        return SkySpecVAC().path
    if is_url(source):
        return check_readable(local_copy(str(source)))
    return check_readable(source)


def _from_table(path: Path, notes: dict[str, Any], options: dict[str, Any]) -> FeatureTable:
    where = str(path)
    frame = complete_table(read_raw_table(path), where=where, eclipse=False)
    v_derived = bool(frame.attrs["v_derived"])
    rows_read = len(frame)
    frame, removed = cut(frame, options["subset"], exclude_known_bad=options["exclude_known_bad"])
    refuse_empty(len(frame), rows_read, removed, f"{where}: the cut {options['subset']!r}")
    eclipse = set_eclipse(frame, options["eclipse"], rows=len(frame), where=where)
    notes = notes | {"source_sha256": sha256_file(path), "v_derived": v_derived}
    return _finish(frame, rows_read, removed, notes | options | {"eclipse": eclipse}, where)


def _from_spectra(
    path: Path,
    notes: dict[str, Any],
    options: dict[str, Any],
    cache_dir: str | os.PathLike[str] | None,
    address: str | None,
) -> FeatureTable:
    where = str(path)
    file = SpectraFile.open(path)
    digest = sha256_file(path)
    key = cache_key(digest, options)
    cached = read_cached(key, cache_dir)
    if cached is not None:
        frame, provenance = cached
        return FeatureTable(frame, provenance | notes)

    from desisky_tune.data.source import ingest

    conditions = subset_conditions(
        options["subset"], exclude_known_bad=options["exclude_known_bad"]
    )
    eclipse = options["eclipse"]
    if eclipse == "exact" and "MJD" not in file.columns:
        eclipse = "table"
    file.require(_needed_of_spectra(eclipse))
    origin = notes["source"] if is_url(notes["source"]) else None
    result = ingest(file, conditions, eclipse=eclipse, address=address, origin=origin)
    refuse_empty(
        len(result.frame),
        result.rows_read,
        result.removed,
        f"{where}: the cut {options['subset']!r}",
    )
    frame = normalise_names(result.frame, where=where)
    notes = notes | {"source_sha256": digest, "v_derived": False}
    table = _finish(
        frame, result.rows_read, result.removed, notes | options | {"eclipse": eclipse}, where
    )
    write_cached(key, table.frame, table.provenance, cache_dir)
    return table


def _needed_of_spectra(eclipse: str) -> list[str]:
    """Return the columns of METADATA that nothing can stand in for."""
    needed = [EXPOSURE_ID, NIGHT, "TRANSPARENCY_GFA", *TARGETS[1:]]
    return [*needed, "ECLIPSE_FRAC"] if eclipse == "table" else needed


def _finish(
    frame: pd.DataFrame,
    rows_read: int,
    removed: dict[str, int],
    notes: dict[str, Any],
    where: str,
) -> FeatureTable:
    """Drop and count what cannot be learnt from, sort, and sign."""
    low, high = MAGNITUDE_RANGE
    magnitudes = frame[list(TARGETS)].to_numpy(dtype=np.float64)
    features = frame[list(FEATURES)].to_numpy(dtype=np.float64)
    missing = np.isnan(magnitudes).any(axis=1)
    outside = ~missing & ((magnitudes < low) | (magnitudes > high)).any(axis=1)
    unusable = ~missing & ~outside & ~np.isfinite(features).all(axis=1)
    removed = removed | {
        "magnitude missing": int(missing.sum()),
        f"magnitude outside {low:g}-{high:g}": int(outside.sum()),
        "feature missing": int(unusable.sum()),
    }
    keep = ~(missing | outside | unusable)
    refuse_empty(int(keep.sum()), rows_read, removed, where)
    frame = frame[keep].sort_values(EXPOSURE_ID, kind="stable", ignore_index=True)
    exposures = frame[EXPOSURE_ID].to_numpy()
    repeated = np.flatnonzero(exposures[1:] == exposures[:-1])
    if len(repeated):
        raise DataError(
            f"{where}: {EXPOSURE_ID} {exposures[repeated[0]]} stands there more than once, "
            f"and {len(repeated) - 1} others: once only"
        )
    types = dict.fromkeys((EXPOSURE_ID, NIGHT), np.int64)
    frame = frame.astype(types | dict.fromkeys((*FEATURES, *TARGETS), np.float64))
    frame.attrs = {"v_derived": notes["v_derived"]}
    provenance = {
        **notes,
        "rows_read": rows_read,
        "rows": len(frame),
        "removed": removed,
        "fingerprint": fingerprint(frame),
        "version": desisky_tune.__version__,
    }
    return FeatureTable(frame, provenance)


def fingerprint(frame: pd.DataFrame) -> str:
    """Return the SHA-256 of what is learnt from: exposures, nights, features, magnitudes.

    It depends neither on where the rows came from nor on other columns.
    """
    digest = hashlib.sha256()
    for name in (EXPOSURE_ID, NIGHT, *FEATURES, *TARGETS):
        kind = "<i8" if name in (EXPOSURE_ID, NIGHT) else "<f8"
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(frame[name].to_numpy(), dtype=kind).tobytes())
    return digest.hexdigest()
