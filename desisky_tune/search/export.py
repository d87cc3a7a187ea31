"""Export: the weights of a trial as a checkpoint that desisky loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from desisky_tune.data.columns import FEATURES
from desisky_tune.errors import RunError
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.records import Ledger, TrialRecord, best_record
from desisky_tune.search.trial_files import (
    checkpoint_path,
    final_path,
    state_path,
)


def export_trial(run_dir: str | Path, out: str | Path, trial: int | None = None) -> Path:
    """Write a trial's best weights as a checkpoint in desisky's format.

    A trial that was measured on folds has no weights of its own: its configuration is
    fitted to all training and validation rows (`desisky_tune.search.final_fit`). By default it
    is what the search has exported (of finalists their committee, `desisky_tune.search.committee`);
    before it has, the best trial so far.

    The inputs are put into the reference order, in which desisky feeds them, wherever
    they are those of the reference model.

    Parameters
    ----------
    run_dir
        The run.
    out
        The file to write.
    trial
        Number of the trial, of the search or of the finalists, by itself; by default see above.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    RunError
        When the run has no such trial, or no weights of it.
    StorageError
        When `out` cannot be written.
    """
    folder = RunFolder.open(run_dir)
    if trial is None:
        folder.fetched(folder.best)
        if folder.best.exists():
            # Not made anew: of a run that was fetched, this is all that there is.
            return write_in_reference_order(folder.best, out, search={})
    record = trial_record(folder, trial)
    return export_weights(folder, record, _weights(folder, record), out)


def export_weights(folder: RunFolder, record: TrialRecord, source: Path, out: str | Path) -> Path:
    """Copy weights of a run as `export_trial` does, the header naming the trial of a record."""
    stage = "finalist" if _is_finalist(folder, record.number) else "trial"
    origin = {
        "run": folder.name,
        stage: record.number,
        "state": record.state,
        "objective": record.objective,
    }
    return write_in_reference_order(source, out, search=origin)


def write_in_reference_order(
    source: Path, out: str | Path, *, search: Mapping[str, Any] | None
) -> Path:
    """Copy a checkpoint with its inputs in the order in which desisky feeds them.

    Parameters
    ----------
    source, out
        The checkpoints. Inputs that are not those of the reference model keep their order.
    search
        To add under ``search`` in the header; None removes that key.
    """
    from desisky_tune.io import feature_names, load_model, save
    from desisky_tune.models import permute_inputs

    model, meta = load_model("broadband", path=source)
    names = feature_names(meta)
    if set(names) == set(FEATURES) and tuple(names) != FEATURES:
        model = permute_inputs(model, names, FEATURES)
        meta = _reordered(meta, list(names))
    origin = meta.pop("search", {})
    if search is not None:
        meta["search"] = {**origin, **search}
    return save(out, model, meta)


def trial_record(folder: RunFolder, trial: int | None) -> TrialRecord:
    """Return the record of a trial that has weights; of the winner where `trial` is None.

    The trials of the finalists go on after the search's; where there were some, the winner
    is one of them.

    Raises
    ------
    RunError
        When there is no winner, no such trial, or it failed.
    """
    records = Ledger(folder.ledger).records()
    finalists = Ledger(folder.finalists).records()
    if trial is None:
        taken = finalist_taken(folder)
        winner = next((each for each in finalists if each.number == taken), best_record(records))
        if winner is None:
            raise RunError(f"{folder.path}: no trial has completed, so there is no winner")
        return winner
    known_records = [*records, *finalists]
    found = next((record for record in known_records if record.number == trial), None)
    if found is None:
        numbers = sorted(record.number for record in known_records)
        known = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
        raise RunError(f"{folder.path}: trial {trial} has not finished; finished: {known}")
    if found.state == "FAIL":
        raise RunError(f"{folder.path}: trial {trial} failed ({found.reason}): it has no weights")
    return found


def finalist_taken(folder: RunFolder) -> int | None:
    """Return the number of the finalist that won; None where no finalists were ranked."""
    if not folder.evaluation.exists():
        return None
    board = json.loads(folder.evaluation.read_text()).get("finalists") or [{}]
    return board[0].get("number")


def _is_finalist(folder: RunFolder, number: int) -> bool:
    trials = folder.read_search().get("finalists", {}).get("trials", [])
    return any(each["number"] == number for each in trials)


def _weights(folder: RunFolder, record: TrialRecord) -> Path:
    """Return the checkpoint of a trial; make it where it is not there."""
    if record.members > 1:
        path = final_path(folder.trials, record.number)
        folder.fetched(path)
        if not path.exists():
            from desisky_tune.search.final_fit import fit_of, write_final_fit
            from desisky_tune.search.origin import open_run

            write_final_fit(open_run(folder.path), fit_of(record, {"trial": record.number}), path)
        return path
    path = checkpoint_path(folder.trials, record.number)
    folder.fetched(path)
    if not path.exists():
        folder.fetched(state_path(folder.trials, record.number))
        _write_missing(folder, record)
    return path


def _write_missing(folder: RunFolder, record: TrialRecord) -> None:
    """Make the checkpoint of a trial whose process was killed before it could."""
    from desisky_tune.search.backend import Assignment
    from desisky_tune.search.folds import search_arrays
    from desisky_tune.search.local import LocalBackend
    from desisky_tune.search.origin import checkpoint_header, open_run
    from desisky_tune.search.pretraining import open_pretraining

    if not state_path(folder.trials, record.number).exists():
        raise RunError(f"{folder.trials}: the weights of trial {record.number} are missing")
    run = open_run(folder.path)
    backend = LocalBackend(
        search_arrays(run),
        run.spec.training,
        folder.trials,
        checkpoint_header(run),
        pretraining=open_pretraining(run),
    )
    assignment = Assignment(record.number, record.configuration, record.seed)
    # Asking for the epochs that it has trains nothing, and brings its state into memory.
    backend.advance(assignment, record.epochs)
    backend.release(assignment)


def _reordered(meta: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Put what the header says by feature into the reference order."""
    order = [names.index(name) for name in FEATURES]
    scaling = dict(meta.get("scaling", {}))
    for key in ("input_mean", "input_sd", "constant"):
        if key in scaling:
            scaling[key] = [scaling[key][index] for index in order]
    moved = {**meta, "features": list(FEATURES)}
    if scaling:
        moved["scaling"] = scaling
    if "constant_features" in meta:
        moved["constant_features"] = [n for n in FEATURES if n in meta["constant_features"]]
    return moved
