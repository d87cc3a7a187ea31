"""Catalogues, tables of exposures and simulated catalogues, as one feature table.

Names are imported when first used: pandas and astropy are slow to load.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from desisky_tune.data.columns import BANDS, EXPOSURE_ID, FEATURES, NIGHT, TARGETS

if TYPE_CHECKING:
    from desisky_tune.data.exposures import night_of, read_table
    from desisky_tune.data.features import FeatureTable, load_features
    from desisky_tune.data.fits import SpectraFile
    from desisky_tune.data.geometry import (
        configure_offline_iers,
        eclipse_fraction,
        galactic_ecliptic,
        observing_geometry,
        umbral_magnitude,
    )
    from desisky_tune.data.photometry import band_weights, derived_v, magnitudes
    from desisky_tune.data.simulate import simulate_vac
    from desisky_tune.data.splits import Split, make_folds, make_split
    from desisky_tune.data.subsets import KNOWN_BAD_NIGHTS, SUBSETS, cut
    from desisky_tune.data.tables import write_table
    from desisky_tune.data.vac import SkySpecVAC

_HOMES = {
    "configure_offline_iers": "geometry",
    "eclipse_fraction": "geometry",
    "galactic_ecliptic": "geometry",
    "observing_geometry": "geometry",
    "umbral_magnitude": "geometry",
    "band_weights": "photometry",
    "derived_v": "photometry",
    "magnitudes": "photometry",
    "simulate_vac": "simulate",
    "KNOWN_BAD_NIGHTS": "subsets",
    "SUBSETS": "subsets",
    "cut": "subsets",
    "night_of": "exposures",
    "read_table": "exposures",
    "write_table": "tables",
    "FeatureTable": "features",
    "load_features": "features",
    "SpectraFile": "fits",
    "Split": "splits",
    "make_folds": "splits",
    "make_split": "splits",
    "SkySpecVAC": "vac",
}

__all__ = [
    "BANDS",
    "EXPOSURE_ID",
    "FEATURES",
    "KNOWN_BAD_NIGHTS",
    "NIGHT",
    "SUBSETS",
    "TARGETS",
    "FeatureTable",
    "SkySpecVAC",
    "SpectraFile",
    "Split",
    "band_weights",
    "configure_offline_iers",
    "cut",
    "derived_v",
    "eclipse_fraction",
    "galactic_ecliptic",
    "load_features",
    "magnitudes",
    "make_folds",
    "make_split",
    "night_of",
    "observing_geometry",
    "read_table",
    "simulate_vac",
    "umbral_magnitude",
    "write_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
