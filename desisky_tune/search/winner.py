"""The winner: chosen on the validation rows, written, read back, measured.

This is the only place that reads the test rows, and it reads them once: after the
winner's file stands. What was measured is kept in `evaluation.json`; a run that is
resumed after its end reads them no second time.

An evaluation is a JSON object::

    {"winner": 17, "v_derived": true,
     "rows": {"train": .., "validation": .., "test": ..}, "nights": {...},
     "figures": {"winner" | "default" | "classical" | "constant":
       {"validation" | "test": {"V": .., "g": .., "r": .., "z": .., "mean": .., "mean_grz": ..}}}}

with every figure an RMSE in magnitudes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, TARGETS
from desisky_tune.errors import SearchError
from desisky_tune.inference import Predictor
from desisky_tune.models.classical import ClassicalModel, ConstantModel
from desisky_tune.search.export import export_trial
from desisky_tune.search.folder import write_json
from desisky_tune.search.space import default_configuration
from desisky_tune.training.metrics import band_rmse

if TYPE_CHECKING:
    import pandas as pd

    from desisky_tune.data.features import FeatureTable
    from desisky_tune.data.splits import Split
    from desisky_tune.search.origin import SearchRun
    from desisky_tune.search.records import TrialRecord

#: How far the RMSE of the file that was read back may lie from the trial's own (mag):
#: folding the scaling into the weights rounds them once more to float32.
FOLDING_TOLERANCE = 2e-3

Predict = Callable[["pd.DataFrame"], np.ndarray]


def crown(run: SearchRun, winner: TrialRecord, records: list[TrialRecord]) -> dict[str, Any]:
    """Write the winner's checkpoint, read it back, and measure it and the baselines.

    Returns
    -------
    dict
        The evaluation, also in `evaluation.json`.

    Raises
    ------
    SearchError
        When the file read back does not give the figures that the trial reported.
    """
    folder, table, split = run.folder, run.table, run.split
    known = json.loads(folder.evaluation.read_text()) if folder.evaluation.exists() else {}
    if known.get("winner") != winner.number or not folder.best.exists():
        export_trial(folder.path, folder.best, trial=winner.number)
    if known.get("winner") == winner.number:
        return dict(known)
    models = _models(run, records)
    figures: dict[str, dict[str, Any]] = {
        name: {"validation": _figures(model, table, split.validation)}
        for name, model in models.items()
    }
    reread = figures["winner"]["validation"]["mean"]
    if abs(reread - float(winner.objective or np.nan)) > FOLDING_TOLERANCE:
        raise SearchError(
            f"{folder.best}: read back, it has an RMSE of {reread:.5f} mag on the validation "
            f"rows; trial {winner.number} reported {winner.objective:.5f}"
        )
    _measure_on_test(models, table, split, figures)
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    nights = table.frame["NIGHT"]
    evaluation = {
        "winner": winner.number,
        "checkpoint": str(folder.best.relative_to(folder.path)),
        "v_derived": table.v_derived,
        "rows": {part: len(rows) for part, rows in parts.items()},
        "nights": {part: int(nights.iloc[rows].nunique()) for part, rows in parts.items()},
        "figures": figures,
    }
    write_json(folder.evaluation, evaluation)
    return evaluation


def _measure_on_test(
    models: Mapping[str, Predict],
    table: FeatureTable,
    split: Split,
    figures: dict[str, dict[str, Any]],
) -> None:
    """Read the test rows: once per run, after the winner was chosen and written."""
    for name, model in models.items():
        figures[name]["test"] = _figures(model, table, split.test)


def _models(run: SearchRun, records: list[TrialRecord]) -> dict[str, Predict]:
    """The winner and what it is held against, fitted on the training rows alone."""
    folder = run.folder
    train = run.table.frame.iloc[run.split.train]
    targets = _targets(train)
    models: dict[str, Predict] = {"winner": Predictor.load(folder.best).predict}
    documented = default_configuration()
    for record in records:
        if record.state == "COMPLETE" and record.configuration == documented:
            path = folder.trials / "default.eqx"
            export_trial(folder.path, path, trial=record.number)
            models["default"] = Predictor.load(path).predict
            break
    models["classical"] = ClassicalModel.fit(train, targets).predict
    models["constant"] = ConstantModel.fit(train, targets).predict
    return models


def _figures(model: Predict, table: FeatureTable, rows: np.ndarray) -> dict[str, float]:
    frame = table.frame.iloc[rows]
    rmse = band_rmse(np.asarray(model(frame), dtype=float), _targets(frame))
    by_band = {band: float(value) for band, value in zip(BANDS, rmse, strict=True)}
    return {
        **by_band,
        "mean": float(np.mean(rmse)),
        "mean_grz": float(np.mean([by_band[band] for band in ("g", "r", "z")])),
    }


def _targets(frame: pd.DataFrame) -> np.ndarray:
    return frame[list(TARGETS)].to_numpy(dtype=float)
