"""Which rows a search trains and measures on, and what one trial of it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from desisky_tune.data.columns import EXPOSURE_ID, TARGETS
from desisky_tune.data.splits import make_folds
from desisky_tune.errors import DataError
from desisky_tune.search.arrays import SearchArrays
from desisky_tune.search.backend import Member

if TYPE_CHECKING:
    from desisky_tune.data.features import FeatureTable
    from desisky_tune.data.splits import Split
    from desisky_tune.search.origin import SearchRun
    from desisky_tune.search.space import SearchSpec

Rows = tuple[np.ndarray, np.ndarray]


def members_of(folds: int, seeds: int, seed: int) -> tuple[Member, ...]:
    """Return the trainings of a trial: every fold with each of the seeds `seed`, `seed` + 1, ...

    Empty for one fold and one seed: such a trial has weights of its own.
    """
    if folds == seeds == 1:
        return ()
    return tuple(Member(fold, seed + more) for more in range(seeds) for fold in range(folds))


def search_members(spec: SearchSpec) -> tuple[Member, ...]:
    """Return what each trial of a search trains."""
    return members_of(spec.evaluation.folds, spec.evaluation.seeds, spec.training.seed)


def finalist_members(spec: SearchSpec) -> tuple[Member, ...]:
    """Return what each finalist trains."""
    _, folds, seeds = spec.evaluation.final_plan
    return members_of(folds, seeds, spec.training.seed)


def run_folds(run: SearchRun, folds: int) -> list[Rows]:
    """Return the folds of a run: the split alone, or its training and validation rows divided.

    Parameters
    ----------
    run
        The run. Its test rows are in no fold.
    folds
        1 for the split as it is; else folds of whole groups, drawn with the split's seed.

    Returns
    -------
    list of (train, validation)
        Positions in the run's table.

    Raises
    ------
    DataError
        When there are fewer groups than folds.
    """
    return _divide(run.table, run.split, folds)


def require_folds(spec: SearchSpec, table: FeatureTable, split: Split) -> None:
    """See that a table can be divided as a search will ask, before it begins.

    Raises
    ------
    DataError
        When it has too few nights (or other groups) for the folds of the trials, or of the
        finalists.
    """
    asked = {"folds": spec.evaluation.folds}
    if spec.evaluation.finalists:
        asked["finalist_folds"] = spec.evaluation.finalist_folds
    for field, folds in asked.items():
        try:
            _divide(table, split, folds)
        except DataError as error:
            raise DataError(f"evaluation.{field}: {error}") from error


def _divide(table: FeatureTable, split: Split, folds: int) -> list[Rows]:
    if folds == 1:
        return [(split.train, split.validation)]
    rows = np.union1d(split.train, split.validation)
    return make_folds(table.frame, rows, by=split.by, folds=folds, seed=split.seed)


def search_arrays(run: SearchRun) -> SearchArrays:
    """Return the rows that a run's search sees, with the folds of its trials."""
    folds = run_folds(run, run.spec.evaluation.folds)
    return SearchArrays.from_folds(run.table, folds, run.spec.data.features)


def finalist_folds(run: SearchRun) -> list[Rows]:
    """Return the folds of a run's finalists; see `run_folds`."""
    return run_folds(run, run.spec.evaluation.final_plan[1])


def finalist_arrays(run: SearchRun) -> SearchArrays:
    """Return the training and validation rows of a run, with the folds of its finalists."""
    return SearchArrays.from_folds(run.table, finalist_folds(run), run.spec.data.features)


def observed(run: SearchRun, rows: np.ndarray) -> np.ndarray:
    """Return the magnitudes ``(n, 4)`` of rows of a run, float64."""
    return run.table.frame.iloc[rows][list(TARGETS)].to_numpy(dtype=float)


def folds_as_exposures(run: SearchRun, folds: list[Rows]) -> list[list[int]]:
    """Return the EXPIDs that each fold validates on, ascending."""
    exposures = run.table.frame[EXPOSURE_ID].to_numpy()
    return [np.sort(exposures[rows]).tolist() for _, rows in folds]
