"""An ensemble: the mean of several checkpoints, with a spread that was calibrated.

On disk it is a folder of ordinary checkpoints with a small index, `ensemble.json`::

    {"kind": "desisky_tune ensemble", "schema": 1,
     "members": ["00032-fold0-seed0.eqx", ...], "weights": [0.1, ...],
     "calibration": {"floor": [..], "factor": [..], "quantile_90": [..],
                     "coverage_90": {"V": .., ...}},
     "meta": {...}}

with `meta` what the header of a checkpoint says of data, split, features and origin, and
`weights` how much each member counts in the mean and in the scatter (without: all alike).

The members' standard deviation alone is too small: what no member can know (aerosol,
airglow) is the same error in all of them. On rows that the members did not see, the
calibration makes the mean of sigma^2 that of the squared residuals, band by band: a floor
is added in quadrature, or, where the members already scatter more than they err, the
spread is scaled down. A 90 % interval is then ``quantile_90`` times sigma to either side,
with a quantile of |residual| / sigma over those rows (split conformal prediction, Lei et
al. 2018, J. Am. Stat. Assoc. 113, 1094).

The interval is for exposures of another night, and those of one night err alike: what counts
is how many nights there were, N, not how many rows. So a night to come, of mean size, is
counted with those that were seen, its rows at infinity: the quantile is that of
0.9 (N + 1) / N of the rows, 93.5 % with 26 nights. For nights of one size this is conformal
prediction with groups (Lee, Barber & Willett 2023, arXiv:2306.06342): at least 90 % of such
exposures are held.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from desisky_tune.data.columns import BANDS, TARGETS
from desisky_tune.errors import CheckpointError, MissingFileError
from desisky_tune.inference.predictor import Predictor

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

INDEX = "ensemble.json"
KIND = "desisky_tune ensemble"
SCHEMA = 1

#: Columns that `predict_frame` adds for an ensemble (mag): sigma, and half the 90 % interval.
SIGMAS: tuple[str, ...] = tuple(name.replace("_SPEC", "_PRED_SIGMA") for name in TARGETS)
HALF_WIDTHS: tuple[str, ...] = tuple(name.replace("_SPEC", "_PRED_HALF90") for name in TARGETS)

#: Below this the quotient of residual and sigma says nothing (mag).
_LEAST_SIGMA = 1e-6
#: What a product of a few numbers may be too large by, of a place among the rows.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Calibration:
    """What makes sigma of the members' scatter, by band V, g, r, z.

    Attributes
    ----------
    floor
        Added to the scatter in quadrature (mag), shape ``(4,)``.
    factor
        Multiplies the scatter, at most 1, shape ``(4,)``.
    quantile_90
        Half the width of a 90 % interval, in units of sigma, shape ``(4,)``.
    """

    floor: Floats
    factor: Floats
    quantile_90: Floats

    @classmethod
    def fit(cls, residual: Floats, scatter: Floats, nights: ArrayLike) -> Calibration:
        """Fit to rows that the members did not see.

        Parameters
        ----------
        residual
            Mean of the members minus observation (mag), shape ``(n, 4)``.
        scatter
            Standard deviation of the members (mag), shape ``(n, 4)``.
        nights
            The night of each row, shape ``(n,)``. With fewer than 9 no quantile promises 90 %;
            the largest quotient that was seen is taken then.
        """
        missed = (residual**2).mean(axis=0)
        scattered = (scatter**2).mean(axis=0)
        floor = np.sqrt(np.maximum(missed - scattered, 0.0))
        too_wide = scattered > missed
        factor = np.ones(residual.shape[1])
        factor[too_wide] = np.sqrt(missed[too_wide] / scattered[too_wide])
        unfinished = cls(floor, factor, np.ones(residual.shape[1]))
        quotient = np.abs(residual) / unfinished.sigma(scatter)
        return cls(floor, factor, quantile_by_night(quotient, nights, 0.9))

    def sigma(self, scatter: Floats) -> Floats:
        """Return the calibrated standard deviation (mag), shape ``(n, 4)``."""
        sigma = np.sqrt(self.floor**2 + (self.factor * scatter) ** 2)
        return np.asarray(np.maximum(sigma, _LEAST_SIGMA))

    def covered_90(self, residual: Floats, scatter: Floats) -> NDArray[np.bool_]:
        """Return which residuals lie inside the 90 % interval, shape ``(n, 4)``."""
        return np.asarray(np.abs(residual) <= self.quantile_90 * self.sigma(scatter))

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; `from_dict` gives the same numbers back."""
        return {
            "floor": self.floor.tolist(),
            "factor": self.factor.tolist(),
            "quantile_90": self.quantile_90.tolist(),
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Calibration:
        """Rebuild from `as_dict`.

        Raises
        ------
        KeyError, ValueError, TypeError
            When it is not what `as_dict` gave.
        """
        parts = [
            np.asarray(mapping[name], dtype=float) for name in ("floor", "factor", "quantile_90")
        ]
        if any(part.shape != (len(BANDS),) or not np.isfinite(part).all() for part in parts):
            raise ValueError(f"calibration: {len(BANDS)} finite numbers each are needed")
        return cls(*parts)


def quantile_by_night(values: Floats, nights: ArrayLike, level: float) -> Floats:
    """Return what a share `level` of another night's values should not exceed.

    Of N nights the quantile of ``level * (N + 1) / N`` of the rows; with a night a row it is
    that of split conformal prediction.

    Parameters
    ----------
    values
        Shape ``(n, k)``.
    nights
        The night of each row, shape ``(n,)``.
    level
        Between 0 and 1. Beyond N / (N + 1) nothing is promised: the largest value is returned.

    Returns
    -------
    ndarray
        Shape ``(k,)``.
    """
    rows, count = len(values), len(np.unique(np.asarray(nights)))
    place = math.ceil(level * rows * (count + 1) / count - _ROUNDING)
    return np.asarray(np.sort(values, axis=0)[min(rows, place) - 1])


def coverage_by_fold(
    residual: Floats, scatter: Floats, fold: NDArray[Any], nights: ArrayLike
) -> dict[str, float]:
    """Return how often the 90 % interval holds the observation, by band.

    Each fold's rows are held against a calibration on the other folds alone. With one fold
    there is nothing to hold it against: NaN.
    """
    inside = np.full(residual.shape, np.nan)
    night = np.asarray(nights)
    for number in np.unique(fold):
        here = fold == number
        if not here.all():
            others = Calibration.fit(residual[~here], scatter[~here], night[~here])
            inside[here] = others.covered_90(residual[here], scatter[here])
    return {band: float(inside[:, place].mean()) for place, band in enumerate(BANDS)}


def mean_of(predictions: Floats, weights: ArrayLike | None = None) -> Floats:
    """Return the mean of members ``(members, n, 4)``.

    Weights, of sum 1 over the members, have the shape ``(members,)``, or ``(members, n)``; None:
    all alike.
    """
    if weights is None:
        return np.asarray(predictions.mean(axis=0))
    return np.asarray((_by_row(weights) * predictions).sum(axis=0))


def scatter_of(predictions: Floats, weights: ArrayLike | None = None) -> Floats:
    """Return the standard deviation of members ``(members, n, 4)``; 0 for one member.

    With weights as in `mean_of`, the unbiased one: the weighted mean of the squared deviations
    over ``1 - sum(weights ** 2)``. With equal ones that is a division by ``members - 1``. It is 0
    where one member has all the weight.
    """
    if len(predictions) == 1:
        return np.zeros(predictions.shape[1:])
    if weights is None:
        return np.asarray(predictions.std(axis=0, ddof=1))
    by_row = _by_row(weights)
    squares = (by_row * (predictions - mean_of(predictions, weights)) ** 2).sum(axis=0)
    spread = 1 - (by_row**2).sum(axis=0)
    return np.asarray(np.sqrt(np.where(spread > 0, squares / np.where(spread > 0, spread, 1), 0)))


def _by_row(weights: ArrayLike) -> Floats:
    """Return weights as they multiply predictions ``(members, n, 4)``."""
    given = np.asarray(weights, dtype=float)
    return given.reshape(len(given), -1, 1)


@dataclass(frozen=True)
class EnsemblePredictor(Predictor):
    """A `Predictor` that is the mean of several; made by `load`.

    Attributes
    ----------
    members
        The predictors.
    weights
        How much each counts; None: all alike.
    calibration
        Of the spread.
    """

    members: tuple[Predictor, ...] = ()
    weights: tuple[float, ...] | None = None
    calibration: Calibration | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None) -> EnsemblePredictor:
        """Load an ensemble's folder, or its index.

        Raises
        ------
        MissingFileError
            When there is no index, or a member is missing.
        CheckpointError
            When the index or a member cannot be trusted, or members have different inputs.
        """
        given = Path("" if path is None else path)
        folder = given.parent if given.name == INDEX else given
        index = _read_index(folder / INDEX)
        members = tuple(Predictor.load(folder / name) for name in index["members"])
        features = members[0].features
        for member in members:
            if member.features != features:
                raise CheckpointError(f"{member.label}: its inputs are not those of the others")
        return cls(
            model=None,
            features=features,
            meta=index["meta"],
            label=str(folder),
            members=members,
            weights=index["weights"],
            calibration=index["calibration"],
        )

    def predict(self, frame: pd.DataFrame) -> np.ndarray:
        """Return the mean of the members, magnitudes (n, 4); NaN where a feature is missing."""
        return mean_of(self._predictions(frame), self.weights)

    def sigma(self, frame: pd.DataFrame) -> np.ndarray:
        """Return the calibrated standard deviation of the prediction (mag), shape (n, 4)."""
        assert self.calibration is not None
        return self.calibration.sigma(scatter_of(self._predictions(frame), self.weights))

    def half_width_90(self, frame: pd.DataFrame) -> np.ndarray:
        """Return half the width of the 90 % interval (mag), shape (n, 4)."""
        assert self.calibration is not None
        return np.asarray(self.calibration.quantile_90 * self.sigma(frame))

    def extra_columns(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Return sigma and half the 90 % interval (mag), by name of column."""
        sigma = self.sigma(frame)
        assert self.calibration is not None
        columns = dict(zip(SIGMAS, sigma.T, strict=True))
        half_widths = (self.calibration.quantile_90 * sigma).T
        return columns | dict(zip(HALF_WIDTHS, half_widths, strict=True))

    def _predictions(self, frame: pd.DataFrame) -> Floats:
        return np.stack([member.predict(frame) for member in self.members])


def load_predictor(path: str | os.PathLike[str] | None) -> Predictor:
    """Load a checkpoint, an ensemble's folder or its index; `None` is the published model."""
    if path is not None and (Path(path).is_dir() or Path(path).name == INDEX):
        return EnsemblePredictor.load(path)
    return Predictor.load(path)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file; an ensemble is a folder with one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CheckpointError(f"{path}: is no index of an ensemble")
    if content.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: schema {content.get('schema')!r}; known: {SCHEMA}")
    names = content.get("members")
    if names is None or not _are_names(names):
        raise CheckpointError(f"{path}: members must be names of files beside it, at least one")
    weights = content.get("weights")
    if weights is not None and not _are_weights(weights, len(names)):
        raise CheckpointError(
            f"{path}: weights must be {len(names)} positive numbers of sum 1, one a member"
        )
    try:
        calibration = Calibration.from_dict(content["calibration"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: calibration: {error}") from error
    meta = content.get("meta")
    return {
        "members": names,
        "weights": None if weights is None else tuple(map(float, weights)),
        "calibration": calibration,
        "meta": meta if isinstance(meta, dict) else {},
    }


def _are_weights(weights: Any, members: int) -> bool:
    """Whether these are weights of so many members."""
    return (
        isinstance(weights, list)
        and len(weights) == members
        and all(type(each) in (int, float) and 0 < each <= 1 for each in weights)
        and math.isclose(sum(weights), 1, abs_tol=1e-6)
    )


def _are_names(names: Any) -> bool:
    """Whether these are names of files in the folder itself, and nowhere else."""
    return (
        isinstance(names, Sequence)
        and not isinstance(names, str)
        and len(names) > 0
        and all(isinstance(name, str) and name and Path(name).name == name for name in names)
    )
