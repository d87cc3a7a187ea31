"""Intervals of RMSE over the validation nights: whole nights are drawn anew.

A trial that was chosen for its RMSE on these nights has had luck as well, which no interval
over them shows; they say how far the figures of other nights may lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from desisky_tune.data.columns import BANDS, NIGHT, TARGETS
from desisky_tune.errors import CheckpointError, MissingFileError
from desisky_tune.inference import Predictor
from desisky_tune.inference.bootstrap import DRAWS, interval, night_weights, resampled_rmse
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.local import checkpoint_path

if TYPE_CHECKING:
    import pandas as pd

    from desisky_tune.search.loaded import LoadedRun
    from desisky_tune.search.records import TrialRecord

__all__ = ["DRAWS", "Intervals", "model_intervals", "rmse_intervals", "trial_intervals"]

#: By model or trial, then by band, ``mean`` or ``mean_grz``: ends of a 95 % interval, mag.
Ends: TypeAlias = dict[str, tuple[float, float]]
Intervals: TypeAlias = Mapping[str, Ends]


def rmse_intervals(predicted: np.ndarray, observed: np.ndarray, nights: np.ndarray) -> Ends:
    """Return 95 % intervals of the RMSE by band, and of their means.

    Parameters
    ----------
    predicted, observed
        Magnitudes V, g, r, z, (n, 4).
    nights
        The night of each row, (n,).

    Returns
    -------
    dict
        Ends (mag) by band, ``mean`` (of all) and ``mean_grz``; a bootstrap over nights.
    """
    drawn = resampled_rmse((predicted - observed) ** 2, night_weights(nights))
    observed_bands = [BANDS.index(band) for band in ("g", "r", "z")]
    return {
        **{band: interval(drawn[:, column]) for column, band in enumerate(BANDS)},
        "mean": interval(drawn.mean(axis=1)),
        "mean_grz": interval(drawn[:, observed_bands].mean(axis=1)),
    }


def model_intervals(run: LoadedRun) -> Intervals:
    """Return the intervals of the winner and the baselines on the rows that they were chosen on.

    They are those that were measured with the figures; an older evaluation has none.
    """
    known = (run.evaluation or {}).get("intervals", {})
    return {
        name: {key: (low, high) for key, (low, high) in parts["validation"].items()}
        for name, parts in known.items()
    }


def trial_intervals(run: LoadedRun, records: Sequence[TrialRecord]) -> dict[int, Ends]:
    """Return the intervals of trials on the validation rows, by number.

    Of those whose weights are there. The rows are those of the split, also where the finalists
    were measured on folds: the trials have seen the others.
    """
    folder, frame = RunFolder(run.path), run.rows("validation")
    observed, nights = frame[list(TARGETS)].to_numpy(dtype=float), frame[NIGHT].to_numpy()
    found = {}
    for record in records:
        predicted = _predict(checkpoint_path(folder.trials, record.number), frame)
        if predicted is not None:
            found[record.number] = rmse_intervals(predicted, observed, nights)
    return found


def _predict(checkpoint: Path, frame: pd.DataFrame) -> np.ndarray | None:
    """Predict exposures; None where the weights are missing or damaged."""
    try:
        return Predictor.load(checkpoint).predict(frame)
    except (MissingFileError, CheckpointError):
        return None
