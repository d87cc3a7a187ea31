"""Gradient-boosted trees, a baseline that needs scikit-learn (the extra ``trees``)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import FEATURES

if TYPE_CHECKING:
    import pandas as pd


#: Rows beyond which splits are sought between 255 bins and not between all values: with two
#: million rows that had not ended after minutes.
EXACT_ROWS = 20_000


def trees_available() -> bool:
    """Whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


class TreeModel:
    """One ensemble of boosted trees per band, with scikit-learn's default settings.

    Friedman 2001, "Greedy function approximation: a gradient boosting machine", Annals of
    Statistics 29, 1189: 100 trees of depth 3, learning rate 0.1. With more than `EXACT_ROWS` rows
    the same by histograms (scikit-learn's `HistGradientBoostingRegressor`).
    """

    def __init__(self, trees: list[Any], features: tuple[str, ...]) -> None:
        self._trees = trees
        self._features = features

    @classmethod
    def fit(
        cls, frame: pd.DataFrame, targets: np.ndarray, features: tuple[str, ...] = FEATURES
    ) -> TreeModel:
        """Fit to exposures.

        Parameters
        ----------
        frame
            Has the features as columns.
        targets
            Magnitudes, shape ``(n, bands)``.
        features
            Columns to use.
        """
        from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingRegressor

        inputs = frame[list(features)].to_numpy(dtype=float)

        def boosted() -> Any:
            if len(inputs) <= EXACT_ROWS:
                return GradientBoostingRegressor(random_state=0)
            return HistGradientBoostingRegressor(
                max_iter=100, max_depth=3, learning_rate=0.1, early_stopping=False, random_state=0
            )

        trees = [boosted().fit(inputs, band) for band in np.asarray(targets, dtype=float).T]
        return cls(trees, tuple(features))

    def predict(self, frame: pd.DataFrame) -> np.ndarray:
        """Return magnitudes ``(n, bands)``."""
        inputs = frame[list(self._features)].to_numpy(dtype=float)
        return np.column_stack([trees.predict(inputs) for trees in self._trees])
