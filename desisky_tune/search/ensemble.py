"""The ensemble of a run: its best finalists' members, the formula's voice, the calibration."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    mean_of,
    scatter_of,
)
from desisky_tune.search.classical_voice import Voice, hear_classical, write_voice
from desisky_tune.search.export import write_in_reference_order
from desisky_tune.search.final_fit import fitted_split
from desisky_tune.search.finalists import Final, OutOfFold
from desisky_tune.search.folder import write_json
from desisky_tune.search.folds import finalist_members
from desisky_tune.search.origin import checkpoint_header
from desisky_tune.search.trial_files import member_path

if TYPE_CHECKING:
    from desisky_tune.inference.bootstrap import Floats
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


@dataclass(frozen=True)
class EnsembleFit:
    """What the members of an ensemble make of rows that they did not see.

    Attributes
    ----------
    numbers
        Its finalists, the best first.
    voice
        The classical model's; None where it has none.
    unseen
        Predictions ``(members, n, 4)``: of each row by the trainings that did not see it, one
        for each finalist and seed, and by the classical model.
    weights
        How much each counts, ``(members, n)``.
    """

    numbers: Sequence[int]
    voice: Voice | None
    unseen: OutOfFold
    weights: Floats

    @property
    def mean(self) -> OutOfFold:
        """Predictions ``(1, n, 4)`` of the ensemble."""
        return replace(
            self.unseen, predictions=mean_of(self.unseen.predictions, self.weights)[None]
        )

    @property
    def scatter(self) -> Floats:
        """Standard deviation of the members (mag), ``(n, 4)``."""
        return scatter_of(self.unseen.predictions, self.weights)


def fit_ensemble(run: SearchRun, final: Final, count: int) -> EnsembleFit:
    """Return the ensemble of the best `count` finalists, on the rows of the folds."""
    numbers = best_numbers(final, count)
    networks = ensemble_out_of_fold(final, numbers)
    voice = hear_classical(run, mean_out_of_fold(final, numbers))
    members, rows = networks.predictions.shape[:2]
    weights = np.full((members, rows), 1 / members)
    if voice is None:
        return EnsembleFit(numbers, None, networks, weights)
    share = voice.on_folds(networks.fold)
    together = np.concatenate([networks.predictions, voice.unseen.predictions])
    return EnsembleFit(
        numbers,
        voice,
        replace(networks, predictions=together),
        np.concatenate([(1 - share) * weights, share[np.newaxis]]),
    )


def write_ensemble(run: SearchRun, fit: EnsembleFit, out: Path) -> Path:
    """Write an ensemble's folder: checkpoints as they lie in the run, and the index.

    Parameters
    ----------
    run
        The run.
    fit
        All members of its finalists are taken.
    out
        The folder; it appears when it is whole.

    Raises
    ------
    StorageError
        When it cannot be written.
    """
    mean, scatter = fit.mean, fit.scatter
    residual = mean.predictions[0] - mean.observed
    nights = run.table.frame[NIGHT].to_numpy()[mean.rows]
    calibration = Calibration.fit(residual, scatter, nights)
    header = checkpoint_header(run)
    share = 0.0 if fit.voice is None else fit.voice.share
    members = finalist_members(run.spec)
    sources = [
        member_path(run.folder.trials, number, member)
        for number in fit.numbers
        for member in members
    ]
    weights = [(1 - share) / len(sources)] * len(sources)
    if share:
        sources.append(write_voice(run))
        weights.append(share)
    with atomic_folder(out) as folder:
        for source in sources:
            write_in_reference_order(source, folder / source.name, search={})
        features = list(Predictor.load(folder / sources[0].name).features)
        write_json(
            folder / INDEX,
            {
                "kind": KIND,
                "schema": SCHEMA,
                "members": [source.name for source in sources],
                "weights": weights,
                "calibration": {
                    **calibration.as_dict(),
                    "coverage_90": coverage_by_fold(residual, scatter, mean.fold, nights),
                    "rows": len(mean.rows),
                    "nights": len(np.unique(nights)),
                },
                "meta": {
                    **header,
                    **_pretrained_note(run),
                    "features": features,
                    "split": fitted_split(run, header["split"]),
                    "search": {**header["search"], "finalists": list(fit.numbers)},
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
