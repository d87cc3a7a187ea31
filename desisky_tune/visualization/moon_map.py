"""The predicted brightness around the Moon, where the model has seen such pointings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, FEATURES
from desisky_tune.visualization.panels import panel
from desisky_tune.visualization.winner import MAGNITUDE, band_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: Where exposures are taken at all (deg): separations from the Moon, and pointing altitudes.
SEPARATIONS = (31.0, 90.0)
LOWEST_ALTITUDE = 31.0

_SEPARATION_STEPS = 48
_ANGLE_STEPS = 120


@dataclass(frozen=True)
class MoonMap:
    """Predicted magnitudes on a polar grid around the Moon.

    Attributes
    ----------
    separation, angle
        Edges of the cells (deg): distance from the Moon, and the angle at the Moon from
        the direction of the zenith.
    magnitudes
        V, g, r, z at the centres, (separations, angles, 4); NaN outside the sampled range.
    conditions
        What was held fixed, by feature: the medians of the training rows.
    limits
        The sampled range, by feature: MOONSEP and OBSALT (deg).
    """

    separation: np.ndarray
    angle: np.ndarray
    magnitudes: np.ndarray
    conditions: dict[str, float]
    limits: dict[str, tuple[float, float]]


def moon_map(train: pd.DataFrame, predict: Callable[[pd.DataFrame], np.ndarray]) -> MoonMap:
    """Predict the sky around the Moon under the median conditions of the training rows.

    The pointing's altitude follows from the Moon's, the separation and the angle by
    spherical trigonometry, ``sin alt = sin alt_M cos sep + cos alt_M sin sep cos angle``.
    Pointings outside the range of the training rows, closer to the Moon than 31 deg,
    further than 90 deg or below 31 deg of altitude get NaN.

    Parameters
    ----------
    train
        The training rows: their features.
    predict
        Maps a frame of features to magnitudes (n, 4).
    """
    import pandas as pd

    sampled = {
        name: (float(train[name].min()), float(train[name].max())) for name in ("MOONSEP", "OBSALT")
    }
    limits = {
        "MOONSEP": (
            max(SEPARATIONS[0], sampled["MOONSEP"][0]),
            min(SEPARATIONS[1], sampled["MOONSEP"][1]),
        ),
        "OBSALT": (max(LOWEST_ALTITUDE, sampled["OBSALT"][0]), sampled["OBSALT"][1]),
    }
    conditions = {
        name: float(train[name].median())
        for name in FEATURES
        if name in train and name not in ("MOONSEP", "OBSALT", "ECLIPSE_FRAC")
    }
    conditions["ECLIPSE_FRAC"] = 0.0
    separation = np.linspace(*limits["MOONSEP"], _SEPARATION_STEPS + 1)
    angle = np.linspace(-180.0, 180.0, _ANGLE_STEPS + 1)
    sep, pa = np.meshgrid(_middle(separation), _middle(angle), indexing="ij")
    altitude = pointing_altitude(conditions["MOONALT"], sep, pa)
    frame = pd.DataFrame({"MOONSEP": sep.ravel(), "OBSALT": altitude.ravel()})
    for name, value in conditions.items():
        frame[name] = value
    for name in train.columns.difference(frame.columns):
        # Further features that a space file may name.
        if pd.api.types.is_numeric_dtype(train[name]):
            frame[name] = float(train[name].median())
    magnitudes = predict(frame).reshape(*sep.shape, len(BANDS))
    low, high = limits["OBSALT"]
    magnitudes = np.where(((altitude > low) & (altitude <= high))[..., None], magnitudes, np.nan)
    return MoonMap(separation, angle, magnitudes, conditions, limits)


def pointing_altitude(
    moon_altitude: float, separation: np.ndarray, angle: np.ndarray
) -> np.ndarray:
    """Return the altitude (deg) of a pointing at a distance and an angle from the Moon.

    Parameters
    ----------
    moon_altitude
        deg.
    separation
        From the Moon, deg.
    angle
        At the Moon, from the direction of the zenith, deg.
    """
    moon, sep, pa = (np.radians(each) for each in (moon_altitude, separation, angle))
    sine = np.sin(moon) * np.cos(sep) + np.cos(moon) * np.sin(sep) * np.cos(pa)
    return np.degrees(np.arcsin(np.clip(sine, -1.0, 1.0)))


def plot_moon_map(maps: Mapping[str, MoonMap], band: str, v_derived: bool) -> Figure:
    """Draw one band of each map: the Moon in the middle, the zenith upwards, one scale.

    Parameters
    ----------
    maps
        By what each is called.
    band
        V, g, r or z.
    v_derived
        True where V was derived from g and r.
    """
    index = BANDS.index(band)
    values = {
        name: np.ma.masked_invalid(each.magnitudes[..., index]) for name, each in maps.items()
    }
    ends = [end for each in values.values() if each.count() for end in (each.min(), each.max())]
    with panel(3.2) as figure:
        grid: Any = figure.subplots(1, len(maps), subplot_kw={"projection": "polar"}, squeeze=False)
        for axes, (name, data) in zip(grid.flat, maps.items(), strict=True):
            axes.set(theta_zero_location="N", rlim=(0, data.separation[-1]))
            mesh = axes.pcolormesh(
                np.radians(data.angle),
                data.separation,
                values[name],
                cmap="viridis_r",
                shading="flat",
                rasterized=True,
                vmin=min(ends, default=None),
                vmax=max(ends, default=None),
            )
            axes.set_xticks(np.radians([0, 90, 180, 270]), ["zenith", "90°", "180°", "90°"])
            axes.set_yticks([30, 60, 90], ["30°", "60°", "90°"])
            axes.set_rlabel_position(180)
            axes.plot([0], [0], "o", color="#d9b300", markersize=7)
            axes.tick_params(pad=0, labelsize=7.5)
            axes.set_title(name, loc="center", pad=4)
        bar = figure.colorbar(mesh, ax=grid, location="bottom", aspect=32, pad=0.04)
        bar.ax.invert_xaxis()
        bar.outline.set_visible(False)
        bar.set_label(
            f"Predicted {band_name(band, v_derived)} [{MAGNITUDE}], brighter to the right"
        )
    return figure


def _middle(edges: np.ndarray) -> np.ndarray:
    return 0.5 * (edges[:-1] + edges[1:])
