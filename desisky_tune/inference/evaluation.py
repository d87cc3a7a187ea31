"""How good a model is, beside the classical model and a constant, over all rows and by night."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from desisky_tune.data.columns import BANDS, FEATURES, NIGHT, TARGETS
from desisky_tune.errors import DataError
from desisky_tune.inference.ensemble import load_predictor
from desisky_tune.inference.predictor import Predictor
from desisky_tune.io.header import check_names

if TYPE_CHECKING:
    import pandas as pd

    from desisky_tune.data.features import FeatureTable
    from desisky_tune.data.splits import Split


class _Model(Protocol):
    def predict(self, frame: pd.DataFrame, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Figures:
    """How far predictions lie from observations, over one set of rows.

    Attributes
    ----------
    bands
        By band (V, g, r, z): `rmse`, `bias`, `nmad` in mag, `outlier_fraction` (residuals
        beyond 0.4 mag) and `n`.
    """

    bands: Mapping[str, Mapping[str, float]]

    @property
    def mean(self) -> float:
        """Mean of the bands' RMSE over V, g, r, z (mag): the objective of a search."""
        return float(np.mean([self.bands[band]["rmse"] for band in BANDS]))

    @property
    def mean_grz(self) -> float:
        """The same over g, r, z alone, for a table whose V was made from g and r (mag)."""
        return float(np.mean([self.bands[band]["rmse"] for band in BANDS[1:]]))

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        bands = {band: dict(values) for band, values in self.bands.items()}
        return {**bands, "mean": self.mean, "mean_grz": self.mean_grz}


@dataclass(frozen=True)
class Evaluation:
    """A model beside the classical model and a constant, over all rows and by night.

    Attributes
    ----------
    rows
        Rows that were evaluated.
    v_derived
        Whether the table's V was made from its g and r.
    figures
        By model: "checkpoint", and where training rows are known "classical" and "constant".
    by_night
        By night (YYYYMMDD, ascending): the same, over its rows.
    notes
        Lines that a reader of the figures should see.
    """

    rows: int
    v_derived: bool
    figures: Mapping[str, Figures]
    by_night: Mapping[int, Mapping[str, Figures]]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "rows": self.rows,
            "nights": len(self.by_night),
            "v_derived": self.v_derived,
            "figures": {name: figures.as_dict() for name, figures in self.figures.items()},
            "by_night": [
                {
                    "night": night,
                    "rows": int(models["checkpoint"].bands["g"]["n"]),
                    "figures": {name: figures.as_dict() for name, figures in models.items()},
                }
                for night, models in self.by_night.items()
            ],
            "notes": list(self.notes),
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row per model and band, then its means: model, band, rmse, bias, nmad, ...

        A V that was derived is called "V (derived)". The means, "V g r z" and "g r z", have an
        RMSE alone.
        """
        rows: list[dict[str, Any]] = []
        for name, figures in self.figures.items():
            for band, values in figures.bands.items():
                rows.append({"model": name, "band": self._called(band), **values})
            rows.append({"model": name, "band": "V g r z", "rmse": figures.mean})
            rows.append({"model": name, "band": "g r z", "rmse": figures.mean_grz})
        return rows

    def night_rows(self) -> list[dict[str, Any]]:
        """Return a row per night: night, rows, and by model the mean RMSE over V g r z (mag)."""
        return [
            {
                "night": night,
                "rows": int(models["checkpoint"].bands["g"]["n"]),
                **{name: figures.mean for name, figures in models.items()},
            }
            for night, models in self.by_night.items()
        ]

    def _called(self, band: str) -> str:
        return "V (derived)" if band == "V" and self.v_derived else band


def evaluate(
    checkpoint: str | os.PathLike[str] | Any,
    table: FeatureTable,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    train_rows: Sequence[int] | np.ndarray | None = None,
    features: Sequence[str] = FEATURES,
) -> Evaluation:
    """Measure a model on rows of a feature table, beside what it has to beat.

    Parameters
    ----------
    checkpoint
        A file, an ensemble's folder, a `Predictor`, or a model that takes `features` and
        gives V, g, r, z.
    table
        The exposures.
    rows
        Positions of the rows to measure on; all by default.
    train_rows
        Positions of the rows on which the classical model and the constant are fitted. By
        default those that the checkpoint was fitted to, as its header tells; where it does not
        tell, the model stands alone and a note says so. A note also counts the rows measured
        on that the checkpoint was fitted to.
    features
        The inputs of a model that is not a file.

    Returns
    -------
    Evaluation
        Per-band figures for all rows and by night.

    Raises
    ------
    CheckpointError, DataError
        When the checkpoint cannot be trusted or the table lacks a feature.
    """
    predictor = _as_predictor(checkpoint, features)
    chosen = np.arange(len(table.frame)) if rows is None else np.asarray(rows)
    if not len(chosen):
        raise DataError("no row to evaluate on")
    frame = table.frame.iloc[chosen]
    notes = predictor.notes(frame)
    own = recorded_split(predictor.meta, table)
    if train_rows is None and own is not None:
        train_rows = own.train
    models: dict[str, _Model] = {"checkpoint": predictor}
    if train_rows is None:
        notes.append("the training rows are not known: no classical model and no constant")
    else:
        models |= _baselines(table, np.asarray(train_rows))
        fitted = own.train if own is not None else np.asarray(train_rows)
        seen = int(np.isin(chosen, fitted).sum())
        if seen:
            notes.append(f"{seen} of {len(chosen)} rows measured on are training rows")
    if table.v_derived:
        notes.append("V is derived from g and r in this table; see g r z alone")
    targets = frame[list(TARGETS)].to_numpy(dtype=np.float64)
    predictions = {name: np.asarray(model.predict(frame)) for name, model in models.items()}
    nights = frame[NIGHT].to_numpy()
    by_night = {
        int(night): _figures(predictions, targets, nights == night) for night in np.unique(nights)
    }
    everywhere = np.ones(len(frame), dtype=bool)
    return Evaluation(
        rows=len(frame),
        v_derived=table.v_derived,
        figures=_figures(predictions, targets, everywhere),
        by_night=by_night,
        notes=tuple(notes),
    )


def recorded_split(meta: Mapping[str, Any], table: FeatureTable) -> Split | None:
    """Return the split that a checkpoint was trained with, if its header tells and it fits.

    The header may hold the exposures of each part, or how the split was drawn; a drawn one is
    drawn again where the table's fingerprint is the one of the header. Validation rows that a
    final fit trained on count as training rows.
    """
    from desisky_tune.data.splits import Split, make_split

    recorded = meta.get("split")
    if not isinstance(recorded, Mapping):
        return None
    try:
        if "train" in recorded:
            return Split.from_exposures(recorded, table.frame)
        if (meta.get("data") or {}).get("fingerprint") != table.fingerprint:
            return None
        drawn = make_split(
            table.frame,
            by=recorded["by"],
            fractions=tuple(recorded["fractions"]),
            seed=recorded["seed"],
        )
        if "validation" not in recorded.get("fitted", ()):
            return drawn
        both = np.sort(np.concatenate([drawn.train, drawn.validation]))
        return replace(drawn, train=both, validation=drawn.validation[:0])
    except (DataError, KeyError, TypeError):
        return None  # another table than the one it was trained on


def _as_predictor(checkpoint: Any, features: Sequence[str]) -> Predictor:
    if isinstance(checkpoint, Predictor):
        return checkpoint
    if checkpoint is None or isinstance(checkpoint, str | os.PathLike):
        return load_predictor(checkpoint)
    check_names(features, "the model: ", own=features)
    return Predictor(checkpoint, tuple(features))


def _baselines(table: FeatureTable, train_rows: np.ndarray) -> dict[str, _Model]:
    """What anybody has without a network, fitted on the training rows alone."""
    from desisky_tune.models.classical import ClassicalModel, ConstantModel

    train = table.frame.iloc[train_rows]
    targets = train[list(TARGETS)].to_numpy(dtype=np.float64)
    return {
        "classical": ClassicalModel.fit(train, targets),
        "constant": ConstantModel.fit(train, targets),
    }


def _figures(
    predictions: Mapping[str, np.ndarray], targets: np.ndarray, rows: np.ndarray
) -> dict[str, Figures]:
    from desisky_tune.training.metrics import band_metrics

    return {
        name: Figures(band_metrics(values[rows], targets[rows]))
        for name, values in predictions.items()
    }
