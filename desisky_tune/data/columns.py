"""The names of the columns that every room agrees on."""

from __future__ import annotations

#: Inputs of the model, in the order in which desisky feeds them to a checkpoint.
FEATURES: tuple[str, ...] = (
    "MOONSEP",  # deg, between pointing and Moon
    "OBSALT",  # deg, altitude of the pointing
    "MOONALT",  # deg, altitude of the Moon
    "MOONFRAC",  # illuminated fraction of the Moon, 0-1
    "TRANSPARENCY_GFA",  # atmospheric transparency, 1 = clear
    "ECLIPSE_FRAC",  # fraction of the lunar disc inside the umbra, 0-1
)

#: Magnitudes that the model predicts (AB mag/arcsec2), in the order V, g, r, z.
TARGETS: tuple[str, ...] = (
    "SKY_MAG_V_SPEC",
    "SKY_MAG_G_SPEC",
    "SKY_MAG_R_SPEC",
    "SKY_MAG_Z_SPEC",
)

#: How the bands are called in everything that is shown or written.
BANDS: tuple[str, ...] = ("V", "g", "r", "z")

#: Columns that identify an exposure.
EXPOSURE_ID = "EXPID"
NIGHT = "NIGHT"
