"""One configuration trained alone, by the arithmetic of a search's trials.

The same backend, rows, seed and program as in a search: trained again with its trial's
configuration, a model repeats the trial's curve bit for bit on the same machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desisky_tune.errors import SearchError
from desisky_tune.search.backend import Assignment, Progress
from desisky_tune.search.export import trial_record, write_in_reference_order
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.origin import SearchRun, checkpoint_header, open_run
from desisky_tune.search.pretraining import open_pretraining
from desisky_tune.search.space import SearchSpec, resolved_dict, spec_from_dict

if TYPE_CHECKING:
    from desisky_tune.data.features import FeatureTable
    from desisky_tune.data.splits import Split
    from desisky_tune.search.pretraining import Pretraining


@dataclass(frozen=True)
class SingleTraining:
    """What to train, on which rows.

    Attributes
    ----------
    spec
        Data, split and training; its space is not looked at.
    configuration
        width, depth, learning_rate, huber_delta, batch_size, and optional ones.
    seed
        Of the initial weights and the shuffles.
    table, split
        The exposures. The test rows are not looked at.
    origin
        For the checkpoint's header under ``search``: the run and trial it repeats.
    pretraining
        What the run's trials began with; None where weights are drawn.
    """

    spec: SearchSpec
    configuration: Mapping[str, Any]
    seed: int
    table: FeatureTable
    split: Split
    origin: Mapping[str, Any] | None = None
    pretraining: Pretraining | None = None


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C: the best weights so far are in `checkpoint`."""

    def __init__(self, checkpoint: Path, epochs: int) -> None:
        super().__init__(f"interrupted after {epochs} epochs; the best so far is in {checkpoint}")
        self.checkpoint = checkpoint


def new_training(content: Mapping[str, Any]) -> SingleTraining:
    """Describe a training of its own.

    Parameters
    ----------
    content
        Sections as in a space file: ``data``, ``split``, ``training``, and under
        ``space`` one value per hyperparameter (the documented default's where absent).

    Raises
    ------
    InputError
        When a value breaks a rule, or the data cannot be used.
    """
    from desisky_tune.data.features import load_features
    from desisky_tune.data.splits import make_split

    spec = spec_from_dict({"name": "train", **content}, where="train")
    table = load_features(
        spec.data.source,
        spec.data.subset,
        eclipse=spec.data.eclipse,
        exclude_known_bad=spec.data.exclude_known_bad,
    )
    split = make_split(
        table.frame, by=spec.split.by, fractions=spec.split.fractions, seed=spec.split.seed
    )
    return SingleTraining(spec, spec.fixed_configuration(), spec.training.seed, table, split)


def repeated_training(
    run_dir: str | Path,
    trial: int | None = None,
    *,
    space: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> SingleTraining:
    """Describe the training of a run's trial once more.

    Parameters
    ----------
    run_dir
        The run; its exposures and its split are used.
    trial
        Number of the trial; the winner by default.
    space, training
        Hyperparameters, and fields of the section ``training``, to take instead of its own.

    Raises
    ------
    InputError
        When there is no such run or trial, or a value breaks a rule.
    """
    run = open_run(run_dir)
    folder = run.folder
    record = trial_record(folder, trial)
    sections = resolved_dict(run.spec)
    seed = (training or {}).get("seed", record.seed)
    sections["training"] = {**sections["training"], **(training or {}), "seed": seed}
    sections["space"] = {**record.configuration, **(space or {})}
    spec = spec_from_dict(sections, where="train")
    origin = {"run": folder.name, "trial": record.number}
    configuration = spec.fixed_configuration()
    start = open_pretraining(run)
    return SingleTraining(spec, configuration, seed, run.table, run.split, origin, start)


def train_single(
    plan: SingleTraining,
    out: str | Path,
    *,
    every: int = 50,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train, and write the best epoch's weights as a checkpoint that desisky loads.

    Parameters
    ----------
    plan
        What to train.
    out
        The checkpoint to write; it appears when it is complete.
    every
        Epochs between two calls of `on_progress`.
    on_progress
        Told where the training stands.

    Returns
    -------
    Progress
        After the last epoch, early stopping's or the settings', with the whole curve.

    Raises
    ------
    SearchError
        When the training diverged; nothing is written then.
    TrainingInterrupted
        On Ctrl-C after the first ten epochs; the best weights so far are written.
    """
    from desisky_tune.search.local import LocalBackend, SearchArrays

    arrays = SearchArrays.from_table(
        plan.table, plan.split.train, plan.split.validation, plan.spec.data.features
    )
    number = int((plan.origin or {}).get("trial", 0))
    assignment = Assignment(number, dict(plan.configuration), plan.seed)
    progress: Progress | None = None
    with tempfile.TemporaryDirectory(prefix="desisky-tune-train-") as scratch:
        folder = Path(scratch)
        backend = LocalBackend(
            arrays, plan.spec.training, folder, _header(plan), pretraining=plan.pretraining
        )
        try:
            last = plan.spec.training.epochs
            for epochs in _stops(last, every):
                progress = backend.advance(assignment, epochs)
                if progress.failed:
                    raise SearchError(f"training failed: {progress.reason}")
                told = epochs % every == 0 or epochs == last or progress.stopped
                if on_progress is not None and told:
                    on_progress(progress)
                if progress.stopped:
                    break
        except KeyboardInterrupt:
            if progress is None:
                raise
            _write(backend, assignment, folder, out, plan)
            raise TrainingInterrupted(Path(out), progress.epochs) from None
        _write(backend, assignment, folder, out, plan)
    assert progress is not None
    return progress


def _stops(epochs: int, every: int) -> list[int]:
    """Return where Ctrl-C is seen: every tenth epoch, and at each report."""
    return sorted({*range(10, epochs, 10), *range(every, epochs, every), epochs})


def _header(plan: SingleTraining) -> dict[str, Any]:
    header = checkpoint_header(
        SearchRun(RunFolder(Path("train")), plan.spec, plan.table, plan.split)
    )
    return {**header, "seed": plan.seed}


def _write(
    backend: Any, assignment: Assignment, folder: Path, out: str | Path, plan: SingleTraining
) -> None:
    from desisky_tune.search.local import checkpoint_path

    backend.release(assignment)
    source = checkpoint_path(folder, assignment.number)
    write_in_reference_order(source, out, search=dict(plan.origin) if plan.origin else None)
