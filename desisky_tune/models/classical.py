"""What a network is to be compared with: Krisciunas & Schaefer's moonlight, and a constant.

Krisciunas & Schaefer 1991 (PASP 103, 1033) predict the V brightness of moonlight from
the Moon's phase and three angles. `ClassicalModel` turns that into four bands with a
handful of fitted numbers; `ConstantModel` is the mean of each band.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from desisky_tune.data.columns import BANDS
from desisky_tune.errors import DataError

Array = NDArray[np.float64]

#: Extinction in V at Kitt Peak (mag per airmass).
KITT_PEAK_EXTINCTION = 0.162
#: Columns without which no moonlight can be predicted.
CLASSICAL_FEATURES: tuple[str, ...] = ("MOONFRAC", "MOONSEP", "MOONALT", "OBSALT")

_PARAMETERS_PER_BAND = 3
#: Residuals beyond this (mag) count less than quadratically in the fit.
_ROBUST_SCALE = 0.3
_BOUNDS = ((-5.0, 12.0, -5.0), (5.0, 30.0, 5.0))  # colour, dark level, cloud


def moon_airmass(altitude: ArrayLike) -> Array:
    """Return the airmass of eq. 3, ``(1 - 0.96 sin^2 Z)^-0.5``; altitude in deg."""
    zenith = np.radians(90.0 - np.asarray(altitude, dtype=np.float64))
    return (1.0 - 0.96 * np.sin(zenith) ** 2) ** -0.5


def moon_magnitude(phase: ArrayLike) -> Array:
    """Return the Moon's V magnitude (eq. 9) at a phase angle in deg (0 = full)."""
    angle = np.abs(np.asarray(phase, dtype=np.float64))
    return -12.73 + 0.026 * angle + 4e-9 * angle**4


def scattering_function(separation: ArrayLike) -> Array:
    """Return f of eq. 21 (Rayleigh and Mie scattering) at an angle in deg."""
    rho = np.asarray(separation, dtype=np.float64)
    return 10**5.36 * (1.06 + np.cos(np.radians(rho)) ** 2) + 10 ** (6.15 - rho / 40.0)


def moonlight_nanolamberts(
    moonfrac: ArrayLike,
    moonsep: ArrayLike,
    moonalt: ArrayLike,
    obsalt: ArrayLike,
    k: float = KITT_PEAK_EXTINCTION,
) -> Array:
    """Return the brightness of moonlight in V (eq. 15), nanolamberts.

    Parameters
    ----------
    moonfrac
        Illuminated fraction, 0-1; the phase angle is ``arccos(2 moonfrac - 1)``.
    moonsep, moonalt, obsalt
        Separation, altitude of the Moon and of the pointing, deg.
    k
        Extinction, mag per airmass.

    Returns
    -------
    array
        0 where the Moon is at or below the horizon.
    """
    cosine = np.clip(2.0 * np.asarray(moonfrac, dtype=np.float64) - 1.0, -1.0, 1.0)
    illuminance = 10 ** (-0.4 * (moon_magnitude(np.degrees(np.arccos(cosine))) + 16.57))  # eq. 8
    through_moon_path = 10 ** (-0.4 * k * moon_airmass(moonalt))
    into_sight = 1.0 - 10 ** (-0.4 * k * moon_airmass(obsalt))
    brightness = scattering_function(moonsep) * illuminance * through_moon_path * into_sight
    return np.where(np.asarray(moonalt) > 0, brightness, 0.0)


def magnitude_of_nanolamberts(brightness: ArrayLike) -> Array:
    """Return V in mag/arcsec2 of a brightness in nanolamberts (eq. 1); inf for 0."""
    brightness = np.asarray(brightness, dtype=np.float64)
    positive = brightness > 0
    logarithm = np.log(np.where(positive, brightness, 34.08) / 34.08)
    return np.where(positive, (20.7233 - logarithm) / 0.92104, np.inf)


def krisciunas_schaefer_v(
    moonfrac: ArrayLike,
    moonsep: ArrayLike,
    moonalt: ArrayLike,
    obsalt: ArrayLike,
    k: float = KITT_PEAK_EXTINCTION,
) -> Array:
    """Return V of moonlight alone, mag/arcsec2, by Krisciunas & Schaefer 1991.

    Arguments as for `moonlight_nanolamberts`. Where the Moon is not up there is no
    moonlight, and V is ``inf``.
    """
    return magnitude_of_nanolamberts(moonlight_nanolamberts(moonfrac, moonsep, moonalt, obsalt, k))


@dataclass(frozen=True)
class ClassicalModel:
    """Krisciunas & Schaefer's moonlight, with a colour and a dark level per band.

    In each band the flux is that of moonlight at the magnitude ``V_KS + colour``, plus a
    dark sky of magnitude `dark`. Cloud enters as ``cloud * -2.5 log10(T)`` magnitudes on
    the moonlight, T the transparency (fitted, and negative: a thin cloud scatters moonlight
    into the line of sight). It earns its place: on the SV1 exposures, folds grouped by
    night, the RMSE in V, g, r falls from 0.35, 0.27, 0.44 to 0.20, 0.17, 0.25 mag. An
    unusable or missing transparency counts as clear; leave the column out for plain
    Krisciunas & Schaefer. An eclipse, where the column is there, takes its fraction of the
    disc away.

    Each field holds one number per band, in the order V, g, r, z.
    """

    colour: tuple[float, ...]
    dark: tuple[float, ...]
    cloud: tuple[float, ...]
    extinction: float = KITT_PEAK_EXTINCTION

    @classmethod
    def fit(
        cls,
        features: Mapping[str, Any],
        targets: ArrayLike,
        *,
        extinction: float = KITT_PEAK_EXTINCTION,
    ) -> ClassicalModel:
        """Fit colour, dark level and cloud of each band by robust least squares.

        Parameters
        ----------
        features
            A DataFrame or mapping with MOONFRAC, MOONSEP, MOONALT, OBSALT, and
            TRANSPARENCY_GFA and ECLIPSE_FRAC where known; columns of shape ``(n,)``.
        targets
            Magnitudes V, g, r, z, shape ``(n, 4)``. Rows that are not finite in a band
            are left out of that band's fit.

        Raises
        ------
        DataError
            When a column is missing, shapes disagree, or a band has too few rows.
        """
        from scipy.optimize import least_squares

        moonlight, dimming = _moonlight(features, extinction)
        observed = _checked_targets(targets, rows=moonlight.size)
        fitted = []
        for band, magnitudes in zip(BANDS, observed.T, strict=True):
            rows = np.isfinite(magnitudes) & np.isfinite(moonlight)
            if rows.sum() < _PARAMETERS_PER_BAND:
                raise DataError(
                    f"band {band} has {rows.sum()} usable rows: the classical model needs at "
                    f"least {_PARAMETERS_PER_BAND}"
                )
            light, dim, truth = moonlight[rows], dimming[rows], magnitudes[rows]
            solution = least_squares(
                lambda p, light=light, dim=dim, truth=truth: _band(p, light, dim) - truth,
                x0=_first_guess(light, truth),
                bounds=_BOUNDS,
                loss="soft_l1",
                f_scale=_ROBUST_SCALE,
            )
            fitted.append([float(value) for value in solution.x])
        colour, dark, cloud = (tuple(values) for values in zip(*fitted, strict=True))
        return cls(colour=colour, dark=dark, cloud=cloud, extinction=float(extinction))

    def predict(self, features: Mapping[str, Any]) -> Array:
        """Return magnitudes V, g, r, z, shape ``(n, 4)``.

        Finite wherever the four angles and phases are, the Moon up or not.
        """
        moonlight, dimming = _moonlight(features, self.extinction)
        bands = zip(self.colour, self.dark, self.cloud, strict=True)
        return np.stack([_band(np.array(band), moonlight, dimming) for band in bands], axis=1)

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, in JSON's types."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> ClassicalModel:
        """Rebuild a model from `as_dict`'s mapping."""
        return cls(
            colour=_numbers(mapping, "colour"),
            dark=_numbers(mapping, "dark"),
            cloud=_numbers(mapping, "cloud"),
            extinction=float(mapping["extinction"]),
        )


@dataclass(frozen=True)
class ConstantModel:
    """The mean of each band, whatever the conditions; `level` in the order V, g, r, z."""

    level: tuple[float, ...]

    @classmethod
    def fit(cls, features: Mapping[str, Any] | None, targets: ArrayLike) -> ConstantModel:
        """Take the mean of each band's finite magnitudes, shape ``(n, 4)``.

        `features` is not used: it stands here so that the models can be swapped.

        Raises
        ------
        DataError
            When a band has no finite magnitude.
        """
        observed = _checked_targets(targets)
        finite = np.isfinite(observed)
        if not finite.any(axis=0).all():
            empty = BANDS[int(np.flatnonzero(~finite.any(axis=0))[0])]
            raise DataError(f"band {empty} has no finite magnitude to take the mean of")
        level = np.where(finite, observed, 0.0).sum(axis=0) / finite.sum(axis=0)
        return cls(level=tuple(float(value) for value in level))

    def predict(self, features: Mapping[str, Any]) -> Array:
        """Return the level of each band for every row, shape ``(n, 4)``."""
        return np.tile(np.array(self.level), (_rows(features), 1))

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, in JSON's types."""
        return {"level": list(self.level)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> ConstantModel:
        """Rebuild a model from `as_dict`'s mapping."""
        return cls(level=_numbers(mapping, "level"))


def _moonlight(features: Mapping[str, Any], extinction: float) -> tuple[Array, Array]:
    """Return moonlight in V as a flux (10^(-0.4 mag)), and the cloud's dimming (mag)."""
    phase, separation, moon_altitude, altitude = (
        _column(features, name) for name in CLASSICAL_FEATURES
    )
    brightness = moonlight_nanolamberts(phase, separation, moon_altitude, altitude, extinction)
    flux = 10 ** (-0.4 * magnitude_of_nanolamberts(brightness))
    if "ECLIPSE_FRAC" in features:
        flux = flux * (1.0 - np.clip(_column(features, "ECLIPSE_FRAC"), 0.0, 1.0))
    dimming = np.zeros_like(flux)
    if "TRANSPARENCY_GFA" in features:
        transparency = _column(features, "TRANSPARENCY_GFA")
        usable = np.isfinite(transparency) & (transparency > 0)
        dimming[usable] = -2.5 * np.log10(transparency[usable])
    return flux, dimming


def _band(parameters: Array, moonlight: Array, dimming: Array) -> Array:
    colour, dark, cloud = parameters
    moon = moonlight * 10 ** (-0.4 * (colour + cloud * dimming))
    return -2.5 * np.log10(moon + 10 ** (-0.4 * dark))


def _first_guess(moonlight: Array, magnitudes: Array) -> tuple[float, float, float]:
    """Start from the median colour and from a sky somewhat darker than the darkest row."""
    moonlit = moonlight > 0
    colour = 0.0
    if moonlit.any():
        colour = float(np.median(magnitudes[moonlit] + 2.5 * np.log10(moonlight[moonlit])))
    dark = float(np.quantile(magnitudes, 0.95)) + 0.3
    (low_colour, low_dark, _), (high_colour, high_dark, _) = _BOUNDS
    return (
        float(np.clip(colour, low_colour + 0.1, high_colour - 0.1)),
        float(np.clip(dark, low_dark + 0.1, high_dark - 0.1)),
        0.0,
    )


def _column(features: Mapping[str, Any], name: str) -> Array:
    try:
        values = features[name]
    except KeyError:
        raise DataError(
            f"column {name} is missing: the classical model needs {', '.join(CLASSICAL_FEATURES)}"
        ) from None
    return np.atleast_1d(np.asarray(values, dtype=np.float64))


def _rows(features: Mapping[str, Any]) -> int:
    """Return the number of rows of a DataFrame or of a mapping of columns."""
    if hasattr(features, "columns"):
        return len(features)
    return len(np.atleast_1d(np.asarray(next(iter(features.values())))))


def _checked_targets(targets: ArrayLike, rows: int | None = None) -> Array:
    observed = np.asarray(targets, dtype=np.float64)
    if observed.ndim != 2 or observed.shape[1] != len(BANDS) or rows not in (None, len(observed)):
        wanted = f"({'n' if rows is None else rows}, {len(BANDS)})"
        raise DataError(f"targets have shape {observed.shape}: {wanted} is needed (V, g, r, z)")
    return observed


def _numbers(mapping: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = tuple(float(value) for value in mapping[name])
    if len(values) != len(BANDS):
        raise DataError(f"{name} has {len(values)} numbers: one per band ({len(BANDS)}) is needed")
    return values


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
