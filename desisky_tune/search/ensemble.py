"""The ensemble of a run: the members of its best finalists, calibrated on their folds."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import NIGHT
from desisky_tune.errors import InputError, RunError
from desisky_tune.files import atomic_folder
from desisky_tune.inference import Predictor
from desisky_tune.inference.ensemble import (
    INDEX,
    KIND,
    SCHEMA,
    Calibration,
    coverage_by_fold,
    scatter_of,
)
from desisky_tune.search.export import write_in_reference_order
from desisky_tune.search.final_fit import fitted_split
from desisky_tune.search.finalists import Final, OutOfFold
from desisky_tune.search.folder import write_json
from desisky_tune.search.folds import finalist_members
from desisky_tune.search.origin import checkpoint_header
from desisky_tune.search.trial_files import member_path

if TYPE_CHECKING:
    from desisky_tune.search.origin import SearchRun


def best_numbers(final: Final, count: int) -> list[int]:
    """Return the numbers of the best finalists, as the board has them."""
    return [standing.number for standing in final.standings[:count]]


def ensemble_out_of_fold(final: Final, numbers: Sequence[int]) -> OutOfFold:
    """Return what the members that did not see a row make of it, all finalists together."""
    first = final.errors[numbers[0]]
    predictions = np.concatenate([final.errors[number].predictions for number in numbers])
    return OutOfFold(first.rows, first.fold, predictions, first.observed)


def mean_out_of_fold(final: Final, numbers: Sequence[int]) -> OutOfFold:
    """Return the mean of what `ensemble_out_of_fold` returns."""
    unseen = ensemble_out_of_fold(final, numbers)
    return replace(unseen, predictions=unseen.predictions.mean(axis=0, keepdims=True))


def write_ensemble(run: SearchRun, final: Final, count: int, out: Path) -> Path:
    """Write an ensemble's folder: checkpoints as they lie in the run, and the index.

    Parameters
    ----------
    run
        The run.
    final
        Its finalists.
    count
        How many of the best of them are taken, with all their members.
    out
        The folder; it appears when it is whole.

    Raises
    ------
    StorageError
        When it cannot be written.
    """
    numbers = best_numbers(final, count)
    unseen = ensemble_out_of_fold(final, numbers)
    residual = unseen.predictions.mean(axis=0) - unseen.observed
    scatter = scatter_of(unseen.predictions)
    nights = run.table.frame[NIGHT].to_numpy()[unseen.rows]
    calibration = Calibration.fit(residual, scatter, nights)
    header = checkpoint_header(run)
    with atomic_folder(out) as folder:
        names = []
        for number in numbers:
            for member in finalist_members(run.spec):
                source = member_path(run.folder.trials, number, member)
                write_in_reference_order(source, folder / source.name, search={})
                names.append(source.name)
        features = list(Predictor.load(folder / names[0]).features)
        write_json(
            folder / INDEX,
            {
                "kind": KIND,
                "schema": SCHEMA,
                "members": names,
                "calibration": {
                    **calibration.as_dict(),
                    "coverage_90": coverage_by_fold(residual, scatter, unseen.fold, nights),
                    "rows": len(unseen.rows),
                    "nights": len(np.unique(nights)),
                },
                "meta": {
                    **header,
                    **_pretrained_note(run),
                    "features": features,
                    "split": fitted_split(run, header["split"]),
                    "search": {**header["search"], "finalists": numbers},
                },
            },
        )
    return out


def _pretrained_note(run: SearchRun) -> dict[str, Any]:
    note = run.folder.read_search().get("pretrain")
    return {} if note is None else {"pretrain": note}


def export_ensemble(run_dir: str | Path, out: str | Path) -> Path:
    """Copy a run's ensemble to a folder of its own.

    Raises
    ------
    RunError
        When the run has none.
    InputError
        When `out` exists.
    StorageError
        When it cannot be written.
    """
    from desisky_tune.search.folder import RunFolder

    folder = RunFolder.open(run_dir)
    if not (folder.ensemble / INDEX).exists():
        raise RunError(
            f"{folder.path}: has no ensemble (evaluation.ensemble, with evaluation.finalists)"
        )
    target = Path(out).expanduser().absolute()
    if target.exists():
        raise InputError(f"{target} exists: an ensemble is a folder of its own")
    with atomic_folder(target) as temporary:
        for source in sorted(folder.ensemble.iterdir()):
            shutil.copyfile(source, temporary / source.name)
    return target


def describe_ensemble(index: dict[str, Any]) -> dict[str, Any]:
    """Return what an evaluation says of an ensemble."""
    return {
        "members": len(index["members"]),
        "finalists": index["meta"]["search"]["finalists"],
        "coverage_90": index["calibration"]["coverage_90"],
    }
