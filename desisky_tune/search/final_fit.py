"""The final fit: a configuration trained on all rows that are not test rows.

The folds have said after how many epochs to stop, so no rows are needed to choose one: the
weights are those after the last epoch. Early stopping has no part in it, and a schedule spans the
epochs that it spanned on the folds: the epoch that they chose is one of that schedule.

What one training gives depends on its seed. So it is made with several, and the checkpoint holds
the mean of the networks, which is one network (`desisky_tune.models.mean`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, EXPOSURE_ID
from desisky_tune.errors import SearchError
from desisky_tune.search.hyperparameters import of_training
from desisky_tune.search.records import parameter_count

if TYPE_CHECKING:
    from desisky_tune.search.origin import SearchRun
    from desisky_tune.search.records import TrialRecord
    from desisky_tune.search.sections import TrainingSpec
    from desisky_tune.search.space import SearchSpec

#: Weights that the mean of several networks may have: 32 MiB of them.
MOST_WEIGHTS = 2**23


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
        Of the initial weights and the shuffles; of the first training, where several are made.
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


def final_seeds(spec: SearchSpec, configuration: Mapping[str, Any]) -> int:
    """Return with how many seeds a configuration is fitted.

    ``evaluation.final_seeds``, or fewer where their mean would have more than `MOST_WEIGHTS`
    weights, or than ``search.max_parameters``; one where the number of weights is an
    objective of the search.
    """
    if "parameters" in spec.search.objectives:
        return 1
    seeds = spec.evaluation.final_seeds
    while seeds > 1 and not mean_fits(spec, [configuration] * seeds):
        seeds -= 1
    return seeds


def mean_fits(spec: SearchSpec, configurations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the mean of so many networks has no more weights than it may have."""
    widest = {
        "width": sum(int(each["width"]) for each in configurations),
        "depth": max(int(each["depth"]) for each in configurations),
    }
    most = min(MOST_WEIGHTS, spec.search.max_parameters or MOST_WEIGHTS)
    return parameter_count(widest, len(spec.data.features)) <= most


def write_final_fit(run: SearchRun, fit: FinalFit, path: Path, seeds: int | None = None) -> Path:
    """Train on a run's training and validation rows, and write the checkpoint.

    One that diverges, of several trainings, is left out.

    Parameters
    ----------
    run
        The run. Its test rows are not looked at.
    fit
        What to fit.
    path
        The checkpoint to write, scaling folded in; it appears when it is complete.
    seeds
        How many trainings are made; by default as many as `final_seeds` says.

    Raises
    ------
    SearchError
        When every training diverged.
    """
    from desisky_tune.io import checkpoint_meta, save
    from desisky_tune.models.mean import mean_model
    from desisky_tune.search.origin import checkpoint_header
    from desisky_tune.search.pretraining import PretrainedWeights, open_pretraining
    from desisky_tune.training.scaling import Scaling, fold

    features = run.spec.data.features
    inputs, targets = run.table.arrays(fitted_rows(run), features)
    scaling = Scaling.fit(inputs, targets)
    start = PretrainedWeights(open_pretraining(run))

    def trained(seed: int) -> tuple[int, Any, float] | SearchError:
        once = replace(fit, seed=seed)
        initial = start.initial_model(fit.configuration, seed, scaling)
        try:
            model, curve = train_through(inputs, targets, scaling, once, run.spec.training, initial)
        except SearchError as diverged:
            return diverged
        return seed, model, float(curve.train_loss[-1])

    count = final_seeds(run.spec, fit.configuration) if seeds is None else seeds
    with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as threads:
        outcomes = list(threads.map(trained, range(fit.seed, fit.seed + count)))
    good = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    if not good:
        raise next(outcome for outcome in outcomes if isinstance(outcome, SearchError))
    folded = fold(mean_model([model for _, model, _ in good]), scaling)
    header = checkpoint_header(run)
    meta = checkpoint_meta(
        folded,
        features=features,
        scaling=scaling,
        training={
            "epoch": fit.epochs - 1,
            "test_loss": fit.test_loss,
            "train_loss": float(np.mean([loss for _, _, loss in good])),
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
            "mean_of": {
                "width": int(fit.configuration["width"]),
                "seeds": [each[0] for each in good],
            },
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
