"""What a checkpoint predicts for a table of exposures, and how good that is.

JAX is imported when a model is loaded, not before.
"""

from __future__ import annotations

from desisky_tune.inference.ensemble import EnsemblePredictor, load_predictor
from desisky_tune.inference.evaluation import Evaluation, Figures, evaluate, recorded_split
from desisky_tune.inference.predictor import PREDICTIONS, Predictor, apply_model, predict_frame

__all__ = [
    "PREDICTIONS",
    "EnsemblePredictor",
    "Evaluation",
    "Figures",
    "Predictor",
    "apply_model",
    "evaluate",
    "load_predictor",
    "predict_frame",
    "recorded_split",
]
