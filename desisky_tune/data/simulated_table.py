"""The feature table of a simulated VAC, without the VAC: spectra only pass through memory.

The same exposures and magnitudes as `desisky_tune.data.simulate.simulate_vac` writes and
`desisky_tune.data.features.load_features` reads back, in seconds and without a file.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.cache import cache_key, read_cached, write_cached
from desisky_tune.data.columns import BANDS, TARGETS
from desisky_tune.data.photometry import magnitudes
from desisky_tune.data.simulate import (
    METADATA_COLUMNS,
    Sky,
    draw_season,
    measured_flux,
    tabulated,
    vac_wavelength,
)
from desisky_tune.data.subsets import first_failure, subset_conditions

if TYPE_CHECKING:
    import pandas as pd

#: Columns that a simulated exposure has beside its magnitudes.
SIMULATED_COLUMNS: tuple[str, ...] = (
    *(name for name, _, _ in METADATA_COLUMNS if name not in TARGETS),
    "ECLIPSE_FRAC",
)

#: How far the simulator knows real exposures; to be said beside every figure that rests on it.
CONSTANTS_NOTE = (
    "the simulator's constants were fitted to real DESI exposures, the shipped SV1 ones among them"
)

_BLOCK = 64


def simulated_table(
    exposures: int,
    seed: int = 0,
    subset: str = "moon",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Return the exposures of one subset of a simulated VAC.

    Parameters
    ----------
    exposures, seed
        Of the whole catalogue, as for `desisky_tune.data.simulate.simulate_vac`; about a
        fifth of it is moonlit and usable.
    subset
        ``moon``, ``dark``, ``twilight`` or ``all``; the known bad nights are left out.
    cache_dir
        Where tables are kept, as for `desisky_tune.data.features.load_features`.

    Returns
    -------
    DataFrame
        `SIMULATED_COLUMNS` and the magnitudes V, g, r, z (AB mag/arcsec2), by EXPID.

    Raises
    ------
    DataError
        When the number of exposures, the seed or the subset is not allowed.
    StorageError
        When the table cannot be kept.
    """
    options: dict[str, Any] = {"exposures": exposures, "seed": seed, "subset": subset}
    key = cache_key("simulated", options)
    if (known := read_cached(key, cache_dir)) is not None:
        return known[0]
    frame = _simulate(exposures, seed, subset)
    write_cached(key, frame, {"source": "simulated", **options, "v_derived": False}, cache_dir)
    return frame


def _simulate(exposures: int, seed: int, subset: str) -> pd.DataFrame:
    import pandas as pd

    conditions = subset_conditions(subset, exclude_known_bad=True)
    season = draw_season(exposures, seed)
    rows = np.flatnonzero(first_failure(season.columns, conditions, exposures) < 0)
    wavelength = vac_wavelength()
    sky = Sky(wavelength)
    bands = np.concatenate(
        [
            magnitudes(measured_flux(sky, season, rows[start : start + _BLOCK]), wavelength, BANDS)
            for start in range(0, len(rows), _BLOCK)
        ]
    )
    bands[:, 1:] = tabulated(bands[:, 1:], season.magnitude_error[rows])
    columns = {**season.columns, "ECLIPSE_FRAC": season.eclipse}
    frame = pd.DataFrame({name: columns[name][rows] for name in SIMULATED_COLUMNS})
    return frame.assign(**dict(zip(TARGETS, bands.T, strict=True)))
