"""The final fit: a configuration trained once on all rows that are not test rows.

The folds have said after how many epochs to stop, so no rows are needed to choose one: the
weights are those after the last epoch. Early stopping has no part in it, and a schedule spans the
epochs that it spanned on the folds: the epoch that they chose is one of that schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, EXPOSURE_ID
from desisky_tune.errors import SearchError
from desisky_tune.search.hyperparameters import of_training

if TYPE_CHECKING:
    from desisky_tune.search.origin import SearchRun
    from desisky_tune.search.records import TrialRecord
    from desisky_tune.search.sections import TrainingSpec


@dataclass(frozen=True)
class FinalFit:
    """What is fitted, and for how long.

    Attributes
    ----------
    configuration
        Hyperparameters.
    epochs
        Epochs to train.
    seed
        Of the initial weights and the shuffles.
    validated
        RMSE by band (mag) on rows that its trainings on folds did not see, for the header.
    test_loss
        Likewise.
    origin
        What the header says under ``search`` beside the run's own entries.
    """

    configuration: Mapping[str, Any]
    epochs: int
    seed: int
    validated: Mapping[str, float]
    test_loss: float
    origin: Mapping[str, Any]


def fit_of(record: TrialRecord, origin: Mapping[str, Any]) -> FinalFit:
    """Return the final fit of a trial that was measured on folds.

    Its epochs are those up to the best of the pooled curve (the lower median over the
    seeds), its seed is the trial's first.
    """
    assert record.best_epoch is not None
    return FinalFit(
        configuration=record.configuration,
        epochs=record.best_epoch + 1,
        seed=record.seed,
        validated=record.rmse or {},
        test_loss=record.curve["test_loss"][record.best_epoch],
        origin=origin,
    )


def fitted_rows(run: SearchRun) -> np.ndarray:
    """Return the rows of a final fit: training and validation rows, ascending."""
    return np.union1d(run.split.train, run.split.validation)


def write_final_fit(run: SearchRun, fit: FinalFit, path: Path) -> Path:
    """Train on a run's training and validation rows, and write the checkpoint.

    Parameters
    ----------
    run
        The run. Its test rows are not looked at.
    fit
        What to fit.
    path
        The checkpoint to write, scaling folded in; it appears when it is complete.

    Raises
    ------
    SearchError
        When the training diverged.
    """
    from desisky_tune.io import checkpoint_meta, save
    from desisky_tune.search.origin import checkpoint_header
    from desisky_tune.search.pretraining import PretrainedWeights, open_pretraining
    from desisky_tune.training.scaling import Scaling, fold

    features = run.spec.data.features
    inputs, targets = run.table.arrays(fitted_rows(run), features)
    scaling = Scaling.fit(inputs, targets)
    start = PretrainedWeights(open_pretraining(run))
    initial = start.initial_model(fit.configuration, fit.seed, scaling)
    model, curve = train_through(inputs, targets, scaling, fit, run.spec.training, initial)
    folded = fold(model, scaling)
    header = checkpoint_header(run)
    meta = checkpoint_meta(
        folded,
        features=features,
        scaling=scaling,
        training={
            "epoch": fit.epochs - 1,
            "test_loss": fit.test_loss,
            "train_loss": float(curve.train_loss[-1]),
            "per_band_rmse": dict(fit.validated),
            "config": {
                "epochs": fit.epochs,
                **_schedule_span(fit.configuration, run.spec.training.epochs),
                "loss": run.spec.training.loss,
                **{k: v for k, v in fit.configuration.items() if k not in ("width", "depth")},
            },
        },
        **{
            **header,
            **start.header(fit.configuration),
            "search": {**header["search"], **fit.origin, "final_fit": True},
            "split": fitted_split(run, header["split"]),
            "seed": fit.seed,
        },
    )
    return save(path, folded, meta)


def train_through(
    inputs: np.ndarray,
    targets: np.ndarray,
    scaling: Any,
    fit: FinalFit,
    training: TrainingSpec,
    initial: Any = None,
) -> tuple[Any, Any]:
    """Train for all epochs of a fit; return the last model, in scaled space, and the curve.

    Parameters
    ----------
    inputs, targets
        Raw rows ``(n, f)`` and ``(n, 4)``.
    scaling
        Fitted to them.
    fit
        What to fit.
    training
        The loss.
    initial
        The model to begin with, in scaled space; None draws one by the seed.

    Raises
    ------
    SearchError
        When a loss was not finite.
    """
    from desisky_tune.training.program import program_for, training_arrays

    configuration = fit.configuration
    hyperparameters = of_training(configuration, training.epochs)
    program = program_for(
        in_size=inputs.shape[1],
        out_size=len(BANDS),
        width=int(configuration["width"]),
        depth=int(configuration["depth"]),
        batch_size=int(configuration["batch_size"]),
        loss=training.loss,
        select="rmse",
        epochs=training.epochs,
        extended=hyperparameters.extended,
    )
    # The rows that it is fitted to stand where others are measured: nothing is chosen here.
    arrays = training_arrays(inputs, targets, inputs, targets, scaling)
    state = program.init(fit.seed, initial)
    state, curve = program.advance(state, arrays, hyperparameters, fit.epochs)
    if curve.failed:
        raise SearchError(
            f"the final fit diverged in epoch {len(curve) - 1}: a loss was not finite, though on"
            " the folds none was"
        )
    return program.last_model(state), curve


def _schedule_span(configuration: Mapping[str, Any], epochs: int) -> dict[str, int]:
    """Say how many epochs a schedule spans, which is more than were trained; nothing without."""
    scheduled = of_training(configuration, epochs).scheduled
    return {"schedule_epochs": epochs} if scheduled else {}


def fitted_split(run: SearchRun, split: Mapping[str, Any]) -> dict[str, Any]:
    """Say in the header which exposures were fitted: there are no validation rows left."""
    if "train" not in split:
        return {**split, "fitted": ["train", "validation"]}
    exposures = run.table.frame[EXPOSURE_ID].to_numpy()[fitted_rows(run)]
    return {**split, "train": np.sort(exposures).tolist(), "validation": []}
