"""The winner: written, read back, measured beside the baselines.

This is the only place that reads the test rows, and it reads them once: after the
winner's file stands. What was measured is kept in `evaluation.json`; a run that is
resumed after its end reads them no second time.

An evaluation is a JSON object::

    {"winner": 17, "v_derived": true, "validated_on": "split" | "folds",
     "rows": {"train": .., "validation": .., "test": ..}, "nights": {...},
     "figures": {MODEL: {"validation" | "test":
       {"V": .., "g": .., "r": .., "z": .., "mean": .., "mean_grz": ..}}},
     "intervals": {MODEL: {"validation" | "test": {"V": [low, high], ...}}},
     "against_default": {"test": {"mean": {"difference": .., "interval": [..]}, ...}}}

with every figure an RMSE in magnitudes, and every interval one of 95 % over resampled
nights. A MODEL is ``winner`` (what is exported), ``alone`` (the winner's configuration by
itself, where a committee is exported), ``default`` (the documented default, fitted as that
is), ``ensemble`` (the best finalists' members, with ``coverage_90`` under ``ensemble``),
``classical``, ``constant``, and ``trees`` where scikit-learn is installed.

``validated_on`` says what ``validation`` means. ``split``: the validation rows, by models
of the training rows. ``folds``: the training and validation rows, each by models of the
other folds (by the mean over the seeds, where what was then tested is one); the winner and
the baselines were then fitted to all of these rows before they met the test rows. There are
then also ``final_fit`` (epochs, seed, seeds, rows, and the RMSE on the rows that were fitted)
and ``finalists``, their board. Where a committee is exported, its ``validation`` is that of
the mean of its finalists' members, and ``final_fit`` has under ``committee`` how many
trainings it is of, the numbers of the finalists, and under ``classical`` the classical
model's share, where it has a voice; epochs and seeds are those of ``alone``.
``pretrain`` says what the trials began with, where their weights were not drawn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.errors import SearchError
from desisky_tune.inference import Predictor
from desisky_tune.inference.bootstrap import Floats
from desisky_tune.inference.ensemble import INDEX, EnsemblePredictor
from desisky_tune.io.header import read_header
from desisky_tune.search.accuracy import (
    difference,
    figures_of,
    intervals_of,
    squared_residuals,
)
from desisky_tune.search.baselines import Predict, fit_baselines
from desisky_tune.search.committee import Committee, form_committee, write_committee
from desisky_tune.search.ensemble import describe_ensemble, fit_ensemble, write_ensemble
from desisky_tune.search.export import export_trial, export_weights
from desisky_tune.search.final_fit import (
    fit_of,
    fitted_rows,
    write_final_fit,
)
from desisky_tune.search.finalists import (
    Final,
    Finalist,
    OutOfFold,
    baselines_out_of_fold,
    write_out_of_fold,
)
from desisky_tune.search.folder import write_json
from desisky_tune.search.hyperparameters import is_documented_default
from desisky_tune.search.pretraining import pretrain_sentence
from desisky_tune.search.trial_files import committee_path, final_path

if TYPE_CHECKING:
    from desisky_tune.search.origin import SearchRun
    from desisky_tune.search.records import TrialRecord

#: How far the RMSE of the file that was read back may lie from the trial's own (mag):
#: folding the scaling into the weights rounds them once more to float32.
FOLDING_TOLERANCE = 2e-3

#: Squared residuals (mag^2) by model, ``(n, 4)`` or ``(seeds, n, 4)``.
Errors = dict[str, Floats]


def crown(run: SearchRun, winner: TrialRecord, records: list[TrialRecord]) -> dict[str, Any]:
    """Write the winner of a search without finalists, read it back, measure it.

    Returns
    -------
    dict
        The evaluation, also in `evaluation.json`.

    Raises
    ------
    SearchError
        When the file read back does not give the figures that the trial reported.
    """
    known = _known(run, winner.number)
    if known is None or not run.folder.best.exists():
        export_trial(run.folder.path, run.folder.best, trial=winner.number)
    if known is not None:
        return known
    networks = {"winner": run.folder.best}
    default = next((each for each in records if _is_default(each)), None)
    if default is not None:
        networks["default"] = run.folder.trials / "default.eqx"
        export_trial(run.folder.path, networks["default"], trial=default.number)
    models = {name: Predictor.load(path).predict for name, path in networks.items()}
    models |= fit_baselines(run, run.split.train)
    rows = run.split.validation
    errors = {name: squared_residuals(run, model, rows) for name, model in models.items()}
    _check(run, figures_of(errors["winner"])["mean"], winner)
    return _conclude(run, winner.number, models, errors, rows, {"validated_on": "split"})


def crown_finalist(run: SearchRun, final: Final) -> dict[str, Any]:
    """Fit the finalists' winner to all rows but the test rows, write it, measure it.

    Returns
    -------
    dict
        The evaluation, also in `evaluation.json`.

    Raises
    ------
    SearchError
        When the files read back do not give the figures that the trials reported, or the
        final fit diverged.
    """
    winner, default = final.winner, final.default
    number = winner.number if winner.trial is None else winner.trial
    record = final.records[winner.number]
    known = _known(run, number)
    if known is not None and run.folder.best.exists() and _ensemble_is_whole(run):
        return known
    committee = form_committee(run, final)
    if committee is None:
        source = _write_fit(run, final, winner)
    else:
        source = write_committee(run, final, committee, committee_path(run.folder.trials))
    export_weights(run.folder, record, source, run.folder.best)
    ensemble = _write_ensemble(run, final)
    if known is not None:
        return known
    files = {"winner": run.folder.best}
    if committee is None:
        by_fold = {"winner": _promised(final, winner, source)}
    else:
        by_fold = {"winner": committee.unseen}
    alike = {"default": default} if committee is None else {"alone": winner, "default": default}
    for name, finalist in alike.items():
        if finalist is None:
            continue
        try:
            files[name] = _write_fit(run, final, finalist)
        except SearchError:
            continue  # it diverged; what is exported needs it for nothing
        by_fold[name] = _promised(final, finalist, files[name])
    models = {name: Predictor.load(path).predict for name, path in files.items()}
    if ensemble is not None:
        models["ensemble"] = EnsemblePredictor.load(run.folder.ensemble).predict
        by_fold["ensemble"] = ensemble
    models |= fit_baselines(run, fitted_rows(run))
    _check(run, figures_of(final.errors[winner.number].squared)["mean"], record)
    by_fold |= baselines_out_of_fold(run)
    errors: Errors = {name: each.squared for name, each in by_fold.items()}
    write_out_of_fold(run, by_fold)
    validated = {
        "validated_on": "folds",
        "finalists": final.as_dicts(),
        **_fit_figures(run, record, committee, models),
        **_ensemble_figures(run, ensemble),
    }
    rows = final.errors[winner.number].rows
    return _conclude(run, number, models, errors, rows, validated)


def _conclude(
    run: SearchRun,
    winner: int,
    models: Mapping[str, Predict],
    errors: Errors,
    rows: np.ndarray,
    validated: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure on the test rows, and write the evaluation."""
    tested = _measure_on_test(run, models)
    split, nights = run.split, run.table.frame["NIGHT"]
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    evaluation = {
        "winner": winner,
        "checkpoint": str(run.folder.best.relative_to(run.folder.path)),
        "v_derived": run.table.v_derived,
        "rows": {part: len(each) for part, each in parts.items()},
        "nights": {part: int(nights.iloc[each].nunique()) for part, each in parts.items()},
        "figures": {
            name: {"validation": figures_of(errors[name]), "test": figures_of(tested[name])}
            for name in models
        },
        "intervals": {
            name: {
                "validation": intervals_of(errors[name], nights.iloc[rows]),
                "test": intervals_of(tested[name], nights.iloc[split.test]),
            }
            for name in models
        },
        **(
            {
                "against_default": {
                    "test": difference(tested["winner"], tested["default"], nights.iloc[split.test])
                }
            }
            if "default" in tested
            else {}
        ),
        **validated,
        **_said_of_pretraining(run),
    }
    write_json(run.folder.evaluation, evaluation)
    return evaluation


def _said_of_pretraining(run: SearchRun) -> dict[str, str]:
    note = run.folder.read_search().get("pretrain")
    return {} if note is None else {"pretrain": pretrain_sentence(note)}


def _measure_on_test(run: SearchRun, models: Mapping[str, Predict]) -> Errors:
    """Read the test rows: once per run, after the winner was chosen and written."""
    return {name: squared_residuals(run, model, run.split.test) for name, model in models.items()}


def _known(run: SearchRun, winner: int) -> dict[str, Any] | None:
    """Return the evaluation that the run has already; None where it is another winner's."""
    path = run.folder.evaluation
    content = json.loads(path.read_text()) if path.exists() else {}
    return dict(content) if content.get("winner") == winner else None


def _is_default(record: TrialRecord) -> bool:
    return record.state == "COMPLETE" and is_documented_default(record.configuration)


def _check(run: SearchRun, reread: float, record: TrialRecord) -> None:
    """See that files read back give what their trial reported."""
    if not abs(reread - float(record.objective or np.nan)) <= FOLDING_TOLERANCE:
        raise SearchError(
            f"{run.folder.best}: read back, it has an RMSE of {reread:.5f} mag on the validation "
            f"rows; trial {record.number} reported {record.objective:.5f}"
        )


def _write_fit(run: SearchRun, final: Final, finalist: Finalist) -> Path:
    path = final_path(run.folder.trials, finalist.number)
    run.folder.fetched(path)
    if not path.exists():
        origin = {"trial": finalist.trial, "finalist": finalist.number}
        write_final_fit(run, fit_of(final.records[finalist.number], origin), path)
    return path


def _promised(final: Final, finalist: Finalist, path: Path) -> OutOfFold:
    """Return what the trainings of a finalist make of rows that they did not see.

    Their mean over the seeds, where the file is a mean over seeds, too.
    """
    unseen = final.errors[finalist.number]
    if len(read_header(path)["mean_of"]["seeds"]) == 1:
        return unseen
    return replace(unseen, predictions=unseen.predictions.mean(axis=0, keepdims=True))


def _ensemble_is_whole(run: SearchRun) -> bool:
    """Whether the run has all files of its ensemble, where it has one."""
    if not _asks_for_ensemble(run):
        return True
    index = run.folder.ensemble / INDEX
    if not index.exists():
        return False
    members = json.loads(index.read_text())["members"]
    return all((run.folder.ensemble / member).exists() for member in members)


def _asks_for_ensemble(run: SearchRun) -> bool:
    return bool(run.spec.evaluation.finalists and run.spec.evaluation.ensemble)


def _write_ensemble(run: SearchRun, final: Final) -> OutOfFold | None:
    """Write the ensemble; return what its members make of rows that they did not see."""
    if not _asks_for_ensemble(run):
        return None
    fit = fit_ensemble(run, final, run.spec.evaluation.ensemble)
    if not _ensemble_is_whole(run):
        shutil.rmtree(run.folder.ensemble, ignore_errors=True)
        write_ensemble(run, fit, run.folder.ensemble)
    return fit.mean


def _ensemble_figures(run: SearchRun, ensemble: OutOfFold | None) -> dict[str, Any]:
    if ensemble is None:
        return {}
    index = json.loads((run.folder.ensemble / INDEX).read_text())
    return {"ensemble": describe_ensemble(index)}


def _fit_figures(
    run: SearchRun, record: TrialRecord, committee: Committee | None, models: Mapping[str, Predict]
) -> dict[str, Any]:
    """Describe the winner's final fit, and what the export makes of the rows of the fit."""
    fitted = fitted_rows(run)
    assert record.best_epoch is not None
    alone = final_path(run.folder.trials, record.number)
    return {
        "final_fit": {
            "epochs": record.best_epoch + 1,
            "seed": record.seed,
            # Of a committee's winner alone, where that diverged, there are none.
            "seeds": list(read_header(alone)["mean_of"]["seeds"]) if alone.exists() else [],
            **({} if committee is None else {"committee": committee.as_dict()}),
            "rows": len(fitted),
            "rmse": figures_of(squared_residuals(run, models["winner"], fitted)),
        }
    }
