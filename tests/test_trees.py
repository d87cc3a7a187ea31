"""Gradient-boosted trees as a baseline: exact on few rows, by histograms on many."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from desisky_tune.data.columns import FEATURES
from desisky_tune.models import trees
from desisky_tune.models.trees import TreeModel

pytest.importorskip("sklearn", reason="scikit-learn is an extra; it is not installed here")


def exposures(rows: int) -> tuple[pd.DataFrame, np.ndarray]:
    """A smooth function of two features, noise of 0.1 mag in each band."""
    draw = np.random.default_rng(5)
    frame = pd.DataFrame(draw.uniform(size=(rows, len(FEATURES))), columns=list(FEATURES))
    smooth = 19 + np.sin(4 * frame[FEATURES[0]]) + frame[FEATURES[1]]
    return frame, smooth.to_numpy()[:, None] + draw.normal(0, 0.1, (rows, 2))


def test_by_histograms_the_trees_are_as_good_as_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    frame, targets = exposures(3000)
    known, unseen = slice(0, 1500), slice(1500, None)
    errors = []
    for most in (1500, 1499):
        monkeypatch.setattr(trees, "EXACT_ROWS", most)
        model = TreeModel.fit(frame[known], targets[known])
        errors.append(np.sqrt(np.mean((model.predict(frame[unseen]) - targets[unseen]) ** 2)))
    assert errors[0] != errors[1]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    # Nothing can be better than the noise.
    assert 0.095 < errors[0] < 0.15
