"""Finished trials in other people's tools: TensorBoard, MLflow, Weights & Biases.

Ray Tune's own callbacks for them count reports where a reader wants epochs, write each
curve as a histogram at every rung, and (Weights & Biases) start a process per trial. Here
each finished trial is written once, epoch by epoch, from its record.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from desisky_tune.data.columns import BANDS
from desisky_tune.errors import InputError
from desisky_tune.search.events import Event, EventSink, Note, SearchStarted, TrialFinished

if TYPE_CHECKING:
    from desisky_tune.search.records import TrialRecord

#: MLflow takes so many metrics in one request.
_MLFLOW_BATCH = 1000
#: What the runs of a search are filed under in MLflow and Weights & Biases.
PROJECT = "desisky_tune"


class Tracker(Protocol):
    """A tool that is shown finished trials."""

    def begin(self, name: str, folder: Path) -> None:
        """Make ready for the run `name` in `folder`."""

    def show(self, record: TrialRecord) -> None:
        """Write one finished trial."""


class TensorBoardTracker:
    """Writes ``tensorboard/trial-00007`` in the run's folder."""

    def begin(self, name: str, folder: Path) -> None:
        """Note where the event files go."""
        self._folder = folder / "tensorboard"

    def show(self, record: TrialRecord) -> None:
        """Write losses and RMSE as scalars by epoch, the configuration as hparams."""
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        with SummaryWriter(str(self._folder / trial_name(record))) as writer:
            for epoch, values in epochs_of(record):
                for name, value in values.items():
                    writer.add_scalar(name, value, epoch)
            summaries = hparams(dict(record.configuration), summary_of(record))
            for summary in summaries:
                writer.file_writer.add_summary(summary)


class MlflowTracker:
    """Writes one MLflow run per trial, in an experiment that has the search's name.

    The server is that of ``MLFLOW_TRACKING_URI``; without one, ``mlflow.db`` in the run's
    folder (``mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db``).
    """

    def begin(self, name: str, folder: Path) -> None:
        """Find or make the experiment."""
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(where)
        known = self._client.get_experiment_by_name(f"{PROJECT}/{name}")
        self._experiment = (
            known.experiment_id
            if known
            else self._client.create_experiment(
                f"{PROJECT}/{name}", artifact_location=(folder / "mlflow").as_uri()
            )
        )

    def show(self, record: TrialRecord) -> None:
        """Write parameters, metrics by epoch, and the state."""
        from mlflow.entities import Metric, Param, RunTag

        started, ended = int(1000 * record.started), int(1000 * record.ended)
        tags = {"mlflow.runName": trial_name(record), "state": record.state}
        if record.reason:
            tags["reason"] = record.reason
        run = self._client.create_run(self._experiment, start_time=started).info.run_id
        self._client.log_batch(
            run,
            params=[Param(name, str(value)) for name, value in record.configuration.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        metrics = [
            Metric(name, value, ended, epoch)
            for epoch, values in epochs_of(record)
            for name, value in values.items()
        ]
        metrics += [Metric(name, value, ended, 0) for name, value in summary_of(record).items()]
        for first in range(0, len(metrics), _MLFLOW_BATCH):
            self._client.log_batch(run, metrics=metrics[first : first + _MLFLOW_BATCH])
        status = "FAILED" if record.state == "FAIL" else "FINISHED"
        self._client.set_terminated(run, status, end_time=ended)


class WandbTracker:
    """Writes one run per trial, grouped by search, in the project ``WANDB_PROJECT``.

    ``WANDB_MODE=offline`` keeps them in ``wandb`` of the run's folder, for ``wandb sync``.
    """

    def begin(self, name: str, folder: Path) -> None:
        """Note the group and the folder."""
        self._group, self._folder = name, folder

    def show(self, record: TrialRecord) -> None:
        """Write configuration, metrics by epoch, and the summary."""
        import wandb

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=self._group,
            name=trial_name(record),
            config=dict(record.configuration),
            tags=[record.state],
            notes=record.reason,
            dir=str(self._folder),
            reinit="create_new",
            # Nothing of the machine, of the console or of the code is wanted here.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,
            ),
        )
        for epoch, values in epochs_of(record):
            run.log(values, step=epoch)
        run.summary.update(summary_of(record))
        run.finish(exit_code=int(record.state == "FAIL"))


#: Option of the command -> the module it needs, how to come by it, and the tracker.
TOOLS: dict[str, tuple[str, str, Callable[[], Tracker]]] = {
    "tensorboard": ("tensorboardX", "tensorboardX", TensorBoardTracker),
    "mlflow": ("mlflow", "'desisky_tune[mlflow]'", MlflowTracker),
    "wandb": ("wandb", "'desisky_tune[wandb]'", WandbTracker),
}


def require_tools(names: Sequence[str]) -> None:
    """Refuse tools that are not installed, before anything is trained.

    Raises
    ------
    InputError
        When one is missing.
    """
    for name in names:
        module, package, _ = TOOLS[name]
        if find_spec(module) is None:
            raise InputError(f"--{name}: {module} is not installed; pip install {package}")


@contextmanager
def tracking(names: Sequence[str], emit: EventSink) -> Iterator[EventSink]:
    """Yield a sink that passes events on to `emit`, and finished trials to the tools.

    A tool that fails (its server is away, say) is let go of with a note: the search's own
    ledger has everything.

    Parameters
    ----------
    names
        Of `TOOLS`.
    emit
        Who else is told.
    """
    require_tools(names)
    trackers = {name: TOOLS[name][2]() for name in names}

    def told(event: Event) -> None:
        emit(event)
        for name, tracker in list(trackers.items()):
            try:
                if isinstance(event, SearchStarted):
                    place = event.run_dir
                    # What a run on a URL has here goes when it ends.
                    folder = place if isinstance(place, Path) else Path.cwd() / event.name
                    tracker.begin(event.name, folder)
                elif isinstance(event, TrialFinished):
                    tracker.show(event.record)
            except Exception as error:  # each tool has a tree of exceptions of its own
                del trackers[name]
                lines = str(error).splitlines() or [""]
                emit(Note(f"{name} is told nothing more: {type(error).__name__}: {lines[0]}"))

    yield told


def trial_name(record: TrialRecord) -> str:
    """Return what a trial is called there: ``trial-00007``."""
    return f"trial-{record.number:05d}"


def epochs_of(record: TrialRecord) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield each epoch (from 0) with its losses (mag²) and RMSE by band (mag) that are finite."""
    names = {"train_loss": "loss/train", "test_loss": "loss/validation"}
    names |= {band: f"rmse/{band}" for band in BANDS}
    for epoch in range(max(map(len, record.curve.values()), default=0)):
        values = {
            title: record.curve[name][epoch]
            for name, title in names.items()
            if epoch < len(record.curve.get(name, []))
        }
        yield epoch, {name: value for name, value in values.items() if math.isfinite(value)}


def summary_of(record: TrialRecord) -> dict[str, float]:
    """Return what a trial came to: objective (mag), best epoch, epochs, seconds, weights."""
    found = {
        "objective": record.objective,
        "best_epoch": record.best_epoch,
        "epochs": record.epochs,
        "seconds": record.seconds,
        "parameters": record.parameters,
    }
    return {name: float(value) for name, value in found.items() if value is not None}
