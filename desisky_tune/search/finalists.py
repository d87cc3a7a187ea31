"""Finalists: the best configurations of a search, trained once more where luck is smaller.

The lowest of many noisy figures is low by luck, too: a search on a handful of validation
nights promises more than it keeps. So the best few are trained again on folds of the
training and validation rows, with several seeds, and compared over all their nights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, EXPOSURE_ID, NIGHT
from desisky_tune.errors import SearchError
from desisky_tune.search.baselines import Predict, fit_baselines
from desisky_tune.search.folds import (
    finalist_folds,
    finalist_members,
    folds_as_exposures,
    observed,
)
from desisky_tune.search.hyperparameters import in_full, is_documented_default
from desisky_tune.search.records import Ledger, TrialRecord, parameter_count
from desisky_tune.search.space import SearchSpec, default_configuration
from desisky_tune.search.standing import Standing, rank
from desisky_tune.search.trial_files import member_path

if TYPE_CHECKING:
    from desisky_tune.inference.bootstrap import Floats
    from desisky_tune.search.origin import SearchRun


@dataclass(frozen=True)
class Finalist:
    """A configuration that is trained once more.

    Attributes
    ----------
    number
        Of its trial among the finalists: they go on after the search's.
    trial
        The trial of the search that it was; None for a documented default that the
        search did not try.
    configuration
        Hyperparameters.
    """

    number: int
    trial: int | None
    configuration: Mapping[str, Any]


def choose_finalists(spec: SearchSpec, records: Sequence[TrialRecord]) -> list[Finalist]:
    """Choose the finalists of a search.

    Parameters
    ----------
    spec
        Of the search, at the end of which there are finalists.
    records
        Its trials.

    Returns
    -------
    list of Finalist
        The complete trials with the lowest objectives, each configuration once; where they
        do not suffice, the pruned ones that got furthest. The documented default is one of
        them, unless it breaks a constraint of the search.
    """
    chosen: list[tuple[int | None, Mapping[str, Any]]] = []
    for record in sorted(records, key=_promise):
        known = any(in_full(record.configuration) == in_full(other) for _, other in chosen)
        if record.state != "FAIL" and not known:
            chosen.append((record.number, record.configuration))
    count = spec.evaluation.final_plan[0]
    best = chosen[:count]
    default = default_configuration(spec)
    if spec.broken_constraint(default) is None:
        own = next((each for each in chosen if is_documented_default(each[1])), (None, default))
        if own not in best:
            best = [*best[: count - 1], own]
    first = spec.search.trials
    return [Finalist(first + place, *each) for place, each in enumerate(best)]


def fixed_finalists(run: SearchRun, records: Sequence[TrialRecord]) -> list[Finalist]:
    """Return a run's finalists; they are chosen once, and written into `search.json`."""
    recorded = recorded_finalists(run)
    if recorded is not None:
        return recorded
    finalists = choose_finalists(run.spec, records)
    content = run.folder.read_search()
    run.folder.write_search(
        {
            **{key: value for key, value in content.items() if key != "schema"},
            "finalists": {
                "folds": folds_as_exposures(run, finalist_folds(run)),
                "seeds": sorted({member.seed for member in finalist_members(run.spec)}),
                "trials": [
                    {**asdict(each), "configuration": dict(each.configuration)}
                    for each in finalists
                ],
            },
        }
    )
    return finalists


def recorded_finalists(run: SearchRun) -> list[Finalist] | None:
    """Return the finalists that `search.json` names; None before they were chosen."""
    recorded = run.folder.read_search().get("finalists")
    return None if recorded is None else [Finalist(**each) for each in recorded["trials"]]


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of rows by trainings that did not see them.

    Attributes
    ----------
    rows
        Positions in the run's table, ascending, shape ``(n,)``.
    fold
        The fold that validated each row, shape ``(n,)``.
    predictions
        Magnitudes ``(seeds, n, 4)``.
    observed
        Magnitudes ``(n, 4)``.
    """

    rows: np.ndarray
    fold: np.ndarray
    predictions: Floats
    observed: Floats

    @property
    def squared(self) -> Floats:
        """Squared residuals ``(seeds, n, 4)``, mag^2."""
        return np.asarray((self.predictions - self.observed) ** 2)


def out_of_fold(run: SearchRun, number: int) -> OutOfFold:
    """Predict the training and validation rows by a finalist's kept members.

    Each member predicts the rows of its own fold, read back from its file.
    """
    from desisky_tune.inference import Predictor

    folds = finalist_folds(run)
    rows = np.sort(np.concatenate([validation for _, validation in folds]))
    members = finalist_members(run.spec)
    seeds = sorted({member.seed for member in members})
    fold = np.empty(len(rows), dtype=np.int64)
    predictions = np.empty((len(seeds), len(rows), len(BANDS)))
    for member in members:
        validation = folds[member.fold][1]
        places = np.searchsorted(rows, validation)
        source = member_path(run.folder.trials, number, member)
        run.folder.fetched(source)
        predictor = Predictor.load(source)
        frame = run.table.frame.iloc[validation]
        predictions[seeds.index(member.seed), places] = predictor.predict(frame)
        fold[places] = member.fold
    return OutOfFold(rows, fold, predictions, observed(run, rows))


def baselines_out_of_fold(run: SearchRun) -> dict[str, OutOfFold]:
    """Predict the same rows by the baselines, each fitted to the other folds."""
    return predict_out_of_fold(run, partial(fit_baselines, run))


def predict_out_of_fold(
    run: SearchRun, fit: Callable[[np.ndarray], Mapping[str, Predict]]
) -> dict[str, OutOfFold]:
    """Predict the training and validation rows by models fitted to the other folds.

    Parameters
    ----------
    run
        The run.
    fit
        Fits models to rows of it, given by their positions; returns their predictions by name.
    """
    folds = finalist_folds(run)
    rows = np.sort(np.concatenate([validation for _, validation in folds]))
    targets = observed(run, rows)
    fold = np.empty(len(rows), dtype=np.int64)
    predictions: dict[str, Floats] = {}
    for number, (train, validation) in enumerate(folds):
        places = np.searchsorted(rows, validation)
        fold[places] = number
        for name, predict in fit(train).items():
            table = predictions.setdefault(name, np.empty((1, *targets.shape)))
            table[0, places] = predict(run.table.frame.iloc[validation])
    return {name: OutOfFold(rows, fold, each, targets) for name, each in predictions.items()}


def write_out_of_fold(run: SearchRun, by_model: Mapping[str, OutOfFold]) -> None:
    """Write `out_of_fold.parquet`: a row per exposure that a fold validated on.

    Columns: EXPID, NIGHT, ``fold``, and for each model and band its prediction (mag, the
    mean over the seeds), as ``winner_V``.
    """
    import pandas as pd

    from desisky_tune.files import atomic_path

    first = next(iter(by_model.values()))
    frame = run.table.frame.iloc[first.rows]
    columns = {
        EXPOSURE_ID: frame[EXPOSURE_ID].to_numpy(),
        NIGHT: frame[NIGHT].to_numpy(),
        "fold": first.fold,
        **{
            f"{name}_{band}": each.predictions.mean(axis=0)[:, place]
            for name, each in by_model.items()
            for place, band in enumerate(BANDS)
        },
    }
    with atomic_path(run.folder.out_of_fold) as temporary:
        pd.DataFrame(columns).to_parquet(temporary)


@dataclass(frozen=True)
class Final:
    """The finalists' result.

    Attributes
    ----------
    finalists
        By number of the trial.
    records
        Likewise: what their trials gave, those that failed too.
    standings
        The winner first.
    errors
        By number: out-of-fold predictions.
    """

    finalists: Mapping[int, Finalist]
    records: Mapping[int, TrialRecord]
    standings: Sequence[Standing]
    errors: Mapping[int, OutOfFold]

    @property
    def winner(self) -> Finalist:
        """The finalist that is taken."""
        return self.finalists[self.standings[0].number]

    @property
    def default(self) -> Finalist | None:
        """The documented default; None where it failed."""
        placed = {standing.number for standing in self.standings}
        found = (each for each in self.finalists.values() if each.number in placed)
        return next((each for each in found if is_documented_default(each.configuration)), None)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the board of the finalists as JSON-able rows, the winner first."""
        return [
            {
                "rank": place,
                "number": standing.number,
                "trial": self.finalists[standing.number].trial,
                "configuration": dict(self.finalists[standing.number].configuration),
                "objective": standing.objective,
                "standard_error": standing.error,
                "difference": standing.difference,
                "difference_error": standing.difference_error,
                "tied": standing.tied,
                "parameters": standing.parameters,
                "seed_spread": self.records[standing.number].spread,
                "best_epoch": self.records[standing.number].best_epoch,
                "rmse": self.records[standing.number].rmse,
            }
            for place, standing in enumerate(self.standings, start=1)
        ]


def conclude_finalists(run: SearchRun) -> Final:
    """Rank the finalists whose trials have ended.

    Raises
    ------
    SearchError
        When none of them completed.
    """
    finalists = {each.number: each for each in recorded_finalists(run) or []}
    records = {each.number: each for each in Ledger(run.folder.finalists).records()}
    complete = [number for number, record in records.items() if record.state == "COMPLETE"]
    if not complete:
        raise SearchError(f"{run.folder.path}: none of {len(finalists)} finalists completed")
    errors = {number: out_of_fold(run, number) for number in sorted(complete)}
    standings = rank(
        {number: each.squared for number, each in errors.items()},
        run.table.frame[NIGHT].to_numpy()[next(iter(errors.values())).rows],
        {number: parameter_count(records[number].configuration) for number in complete},
    )
    return Final(finalists, records, standings, errors)


def unfinished_finalists(run: SearchRun, finalists: Sequence[Finalist]) -> int:
    """Return how many finalists have no record yet."""
    done = {record.number for record in Ledger(run.folder.finalists).records()}
    return sum(each.number not in done for each in finalists)


def _promise(record: TrialRecord) -> tuple[int, int, float, int, int]:
    """Complete trials first, then pruned ones by how far they got; then by objective."""
    objective = math.inf if record.objective is None else record.objective
    pruned = record.state != "COMPLETE"
    # A complete trial may have ended early, and is no worse for it.
    furthest = -record.epochs if pruned else 0
    return int(pruned), furthest, objective, record.parameters, record.number
