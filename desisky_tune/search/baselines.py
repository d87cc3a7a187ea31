"""What a winner is held against, fitted to the rows that it was fitted to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from desisky_tune.models.classical import ClassicalModel, ConstantModel
from desisky_tune.models.trees import TreeModel, trees_available
from desisky_tune.search.folds import observed

if TYPE_CHECKING:
    import pandas as pd

    from desisky_tune.search.origin import SearchRun

Predict = Callable[["pd.DataFrame"], np.ndarray]


def fit_baselines(run: SearchRun, rows: np.ndarray) -> dict[str, Predict]:
    """Fit the baselines.

    Parameters
    ----------
    run
        The run.
    rows
        Positions of the rows to fit.

    Returns
    -------
    dict
        By name: ``classical`` (Krisciunas & Schaefer 1991, refitted), ``constant``, and
        ``trees`` where scikit-learn is installed; each gives magnitudes ``(n, 4)``.
    """
    frame, targets = run.table.frame.iloc[rows], observed(run, rows)
    models: dict[str, Predict] = {
        "classical": ClassicalModel.fit(frame, targets).predict,
        "constant": ConstantModel.fit(frame, targets).predict,
    }
    if trees_available():
        models["trees"] = TreeModel.fit(frame, targets, run.spec.data.features).predict
    return models
