"""A model together with the names of its inputs: predictions for a table.

Columns are selected by the names in the checkpoint's header, whatever the order in the table.
JAX is imported when a model is loaded, not before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, FEATURES, TARGETS
from desisky_tune.data.names import require_columns
from desisky_tune.data.subsets import SUBSETS
from desisky_tune.errors import CheckpointError, DataError
from desisky_tune.io.header import constant_features, feature_names, features_recorded

if TYPE_CHECKING:
    import pandas as pd

#: Columns that `predict_frame` adds, in the order V, g, r, z (AB mag/arcsec2).
PREDICTIONS: tuple[str, ...] = tuple(name.replace("_SPEC", "_PRED") for name in TARGETS)

#: Rows sent through the network at a time: bounds the memory of the widest layer.
_ROWS_AT_A_TIME = 16384

#: What a subset's conditions, and that a field is up, are about.
_CONDITIONS = {"OBSALT", *(each.column for subset in SUBSETS.values() for each in subset)}

#: A value this far (relatively) from the training's constant has left it.
_CONSTANT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Predictor:
    """A model together with the names of its inputs.

    Attributes
    ----------
    model
        Takes raw features `(f,)`, gives magnitudes `(4,)`.
    features
        The names of its inputs, in its order.
    meta
        The checkpoint's header; empty for a model that came from memory.
    label
        What messages call it.
    """

    model: Any
    features: tuple[str, ...] = FEATURES
    meta: Mapping[str, Any] = field(default_factory=dict)
    label: str = "the model"

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None) -> Predictor:
        """Load a checkpoint; `None` loads the weights that desisky publishes.

        Raises
        ------
        CheckpointError
            When the file cannot be trusted, names unknown features, or does not give four bands.
        MissingFileError
            When there is no such file.
        """
        if path is None:
            from desisky_tune.io.registry import load_model

            model, meta = load_model("broadband")
            label = "the published model"
        else:
            from desisky_tune.io.checkpoint import load
            from desisky_tune.models.broadband import make_broadbandMLP

            model, meta = load(path, make_broadbandMLP)
            label = str(path)
        bands = meta["arch"]["out_size"]
        if bands != len(BANDS):
            raise CheckpointError(f"{label}: gives {bands} values; {', '.join(BANDS)} are needed")
        return cls(model, feature_names(meta, label), meta, label)

    def predict(self, frame: pd.DataFrame) -> np.ndarray:
        """Return magnitudes (n, 4) in V, g, r, z; NaN where a feature is missing.

        Parameters
        ----------
        frame
            Has the model's features as columns, in any order.

        Raises
        ------
        DataError
            When a feature is no column of the frame, or holds something that is no number.
        """
        inputs = self.inputs(frame)
        usable = np.isfinite(inputs).all(axis=1)
        predictions = np.full((len(inputs), len(BANDS)), np.nan)
        if usable.any():
            predictions[usable] = apply_model(self.model, inputs[usable])
        return predictions

    def extra_columns(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Return what `predict_frame` adds beside the predictions, by name of column."""
        return {}

    def inputs(self, frame: pd.DataFrame) -> np.ndarray:
        """Return the model's inputs (n, f) float64, in its order."""
        require_columns(self.features, frame.columns, where=f"a table for {self.label}")
        columns = []
        for name in self.features:
            try:
                columns.append(frame[name].to_numpy(dtype=np.float64, na_value=np.nan))
            except (TypeError, ValueError) as error:
                raise DataError(f"column {name} holds something that is no number") from error
        return np.column_stack(columns) if columns else np.empty((len(frame), 0))

    def notes(self, frame: pd.DataFrame) -> list[str]:
        """Return what a user of this model on this table should be told, a line each."""
        notes = []
        if self.meta and not features_recorded(self.meta):
            notes.append(
                f"{self.label} records no feature names; taken in the reference order: "
                + ", ".join(self.features)
            )
        for name in constant_features(self.meta):
            if name in self.features:
                notes += self._constant_notes(name, frame[name].to_numpy(dtype=np.float64))
        missing = int((~np.isfinite(self.inputs(frame)).all(axis=1)).sum())
        if missing:
            notes.append(f"{missing} of {len(frame)} rows lack a feature: no prediction (NaN)")
        return notes

    def condition_notes(self, frame: pd.DataFrame) -> list[str]:
        """Return how many rows are of conditions that the model has not seen, a line each."""
        import pandas as pd

        notes = []
        known = np.isfinite(self.inputs(frame)).all(axis=1)
        whole = f"of {len(frame)} rows"
        columns = {
            name: pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
            for name in _CONDITIONS
            if name in frame
        }
        if "OBSALT" in columns:
            below = int((known & (columns["OBSALT"] <= 0)).sum())
            if below:
                notes.append(f"{below} {whole} have their field below the horizon (OBSALT <= 0)")
        data = self.meta.get("data")
        subset = data.get("subset") if isinstance(data, dict) else None
        conditions = SUBSETS.get(subset, ()) if isinstance(subset, str) else ()
        seen = [condition for condition in conditions if condition.column in columns]
        broken = np.zeros(len(frame), dtype=bool)
        for condition in seen:
            # What is not there breaks nothing.
            broken |= np.isfinite(columns[condition.column]) & ~condition.holds(columns)
        outside = int((known & broken).sum())
        if outside:
            notes.append(
                f"{outside} {whole} are not of the subset {subset} on which the model was trained "
                f"({', '.join(map(str, seen))}): extrapolated"
            )
        return notes

    def _constant_notes(self, name: str, values: np.ndarray) -> list[str]:
        values = values[np.isfinite(values)]
        if not len(values):
            return []
        trained = self._training_value(name)
        usual = trained if trained is not None else float(np.median(values))
        other = int((np.abs(values - usual) > _CONSTANT_TOLERANCE * max(1.0, abs(usual))).sum())
        if not other:
            return []
        known = f" (always {trained:g})" if trained is not None else ""
        return [
            f"{name} did not vary in training{known}, so the model does not look at it;"
            f" {other} of {len(values)} rows have another value"
        ]

    def _training_value(self, name: str) -> float | None:
        """The value that a constant feature had in training, where the header tells."""
        means = (self.meta.get("scaling") or {}).get("input_mean")
        if not isinstance(means, list) or len(means) != len(self.features):
            return None
        value = means[self.features.index(name)]
        return float(value) if isinstance(value, int | float) else None


def apply_model(model: Any, inputs: np.ndarray) -> np.ndarray:
    """Return what a model gives for many rows.

    Parameters
    ----------
    model
        Maps one vector `(f,)` to `(4,)`, as an Equinox module does.
    inputs
        Shape `(n, f)`; given to the model as float32.

    Returns
    -------
    ndarray
        Shape `(n, 4)`, float64.
    """
    rows = np.asarray(inputs, dtype=np.float32)
    many = _layer_by_layer(model) or _vectorized(model)
    starts = range(0, len(rows), _ROWS_AT_A_TIME)
    parts = [many(rows[s : s + _ROWS_AT_A_TIME]) for s in starts]
    return np.concatenate(parts).astype(np.float64) if parts else np.empty((0, len(BANDS)))


def _vectorized(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    import jax
    import jax.numpy as jnp

    many = jax.vmap(model)
    return lambda rows: np.asarray(many(jnp.asarray(rows)))


def _layer_by_layer(model: Any) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return a plain MLP as NumPy's products, which need no compile; None for another model."""
    from desisky_tune.io.checkpoint import is_plain_mlp

    if not is_plain_mlp(model):
        return None
    layers = [(np.asarray(layer.weight).T, np.asarray(layer.bias)) for layer in model.layers]

    def many(rows: np.ndarray) -> np.ndarray:
        for place, (weight, bias) in enumerate(layers):
            rows = rows @ weight + bias
            if place < len(layers) - 1:
                rows = np.maximum(rows, 0)
        return rows

    return many


def predict_frame(
    checkpoint: str | os.PathLike[str] | Predictor | None, frame: pd.DataFrame
) -> pd.DataFrame:
    """Add a checkpoint's predictions to a table.

    Parameters
    ----------
    checkpoint
        A file, an ensemble's folder, a `Predictor`, or `None` for the published weights.
    frame
        Has the model's features as columns, in any order.

    Returns
    -------
    DataFrame
        A copy (of an ensemble also with its sigma and half its 90 % interval by band, mag)
        with SKY_MAG_V_PRED, SKY_MAG_G_PRED, SKY_MAG_R_PRED, SKY_MAG_Z_PRED (AB
        mag/arcsec2); NaN where a feature is missing. `frame.attrs["notes"]` is a list of lines
        that the user should see: rows without a prediction, conditions on which the model was
        not trained, a constant feature that varies here, an order of features that had to be
        assumed.

    Raises
    ------
    CheckpointError, DataError
        When the checkpoint cannot be trusted or the table lacks a feature.
    """
    from desisky_tune.inference.ensemble import load_predictor

    predictor = checkpoint if isinstance(checkpoint, Predictor) else load_predictor(checkpoint)
    predictions = predictor.predict(frame)
    result = frame.copy()
    for column, values in zip(PREDICTIONS, predictions.T, strict=True):
        result[column] = values
    for column, values in predictor.extra_columns(frame).items():
        result[column] = values
    notes = [*predictor.notes(frame), *predictor.condition_notes(frame)]
    result.attrs = {**frame.attrs, "notes": notes}
    return result
