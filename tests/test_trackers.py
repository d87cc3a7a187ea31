"""Finished trials in TensorBoard, MLflow, Weights & Biases and Optuna's dashboard."""

from __future__ import annotations

import io
import json
import struct
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import optuna
import pytest
from virtual_clock import FakeBackend, VirtualSearch

from desisky_tune.cli import main
from desisky_tune.errors import InputError
from desisky_tune.search import trackers
from desisky_tune.search.events import Event, Note, SearchStarted, TrialFinished
from desisky_tune.search.records import TrialRecord
from desisky_tune.search.space import spec_from_dict
from desisky_tune.search.study_storage import close_storage
from desisky_tune.search.trackers import tracking


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "small"


@pytest.fixture(scope="module")
def records(run_dir: Path) -> list[TrialRecord]:
    """Six trials of up to 27 epochs: one fails, some are pruned."""
    spec = spec_from_dict(
        {
            "space": {"depth": {"low": 1, "high": 6}, "width": {"low": 16, "high": 256}},
            "training": {"epochs": 27},
            "search": {"trials": 6, "sampler": "random", "grace": 3},
        }
    )
    backend = FakeBackend(nan_at={1: 2})
    records = VirtualSearch(spec, run_dir, backend=backend).run()
    assert {record.state for record in records} == {"COMPLETE", "PRUNED", "FAIL"}
    return records


def tell(names: list[str], folder: Path, records: list[TrialRecord]) -> list[Event]:
    """Tell the tools of a whole search; return what was said to others."""
    said: list[Event] = []
    with tracking(names, said.append) as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tools' own dependencies
        sink(SearchStarted("small", folder, len(records), 27, 1))
        for done, record in enumerate(records, start=1):
            sink(TrialFinished(record, done, len(records), None))
    assert not [event for event in said if isinstance(event, Note)]
    return said


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Read event files: records of (length, checksum, event, checksum)."""
    from tensorboardX.proto.event_pb2 import Event as Summary

    found: dict[str, dict[int, float]] = defaultdict(dict)
    for path in folder.glob("events.out.tfevents.*"):
        stream = io.BytesIO(path.read_bytes())
        while head := stream.read(12):
            event = Summary.FromString(stream.read(struct.unpack("<Q", head[:8])[0]))
            stream.read(4)
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found[value.tag][event.step] = value.simple_value
    return found


def test_tensorboard_has_every_epoch_of_every_trial(
    tmp_path: Path, records: list[TrialRecord]
) -> None:
    pytest.importorskip("tensorboardX", reason="comes with ray[tune]")
    tell(["tensorboard"], tmp_path, records)
    for record in records:
        found = scalars(tmp_path / "tensorboard" / f"trial-{record.number:05d}")
        expected = [value for value in record.curve["g"] if value == value]
        assert list(found["rmse/g"].values()) == pytest.approx(expected, rel=1e-6)
        assert list(found["rmse/g"]) == list(range(len(expected)))
        assert found.keys() >= {"loss/train", "loss/validation", "rmse/V", "rmse/r", "rmse/z"}


def test_mlflow_has_a_run_per_trial(
    tmp_path: Path, records: list[TrialRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # no network in a test
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
        tell(["mlflow"], tmp_path, records)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        [experiment] = client.search_experiments(filter_string="name LIKE 'desisky_tune/%'")
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert sorted(runs) == [f"trial-{record.number:05d}" for record in records]
        for record in records:
            run = runs[f"trial-{record.number:05d}"]
            assert run.data.tags["state"] == record.state
            assert run.data.params["width"] == str(record.configuration["width"])
            assert run.info.status == ("FAILED" if record.state == "FAIL" else "FINISHED")
            assert run.data.metrics.get("objective") == record.objective
            history = client.get_metric_history(run.info.run_id, "rmse/z")
            by_epoch = {each.step: each.value for each in history}
            expected = [value for value in record.curve["z"] if value == value]
            assert by_epoch == dict(enumerate(expected))


def test_wandb_keeps_its_runs_offline(
    tmp_path: Path, records: list[TrialRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wandb = pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
        tell(["wandb"], tmp_path, records[:2])
        wandb.teardown()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    assert b"trial-00000" in b"".join(path.read_bytes() for path in runs)


@pytest.mark.parametrize("tool", ["tensorboard", "mlflow", "wandb"])
def test_a_tool_that_is_missing_is_refused_in_one_line_before_the_search(
    tmp_path: Path, tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda module: None)
    with pytest.raises(InputError, match=f"--{tool}: .* is not installed; pip install"):
        trackers.require_tools([tool])
    assert main(["search", "--runs", str(tmp_path / "runs"), f"--{tool}"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"desisky-tune: error: --{tool}")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_tool_that_fails_is_let_go_of_and_the_search_goes_on(
    tmp_path: Path, records: list[TrialRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away:
        asked = 0

        def begin(self, name: str, folder: Path) -> None:
            """Its server answers."""

        def show(self, record: TrialRecord) -> None:
            Away.asked += 1
            raise ConnectionError("no route to host\nand more")

    monkeypatch.setitem(trackers.TOOLS, "wandb", ("json", "", Away))
    said: list[Event] = []
    with tracking(["wandb"], said.append) as sink:
        sink(SearchStarted("small", tmp_path, 2, 27, 1))
        for record in records[:2]:
            sink(TrialFinished(record, 1, 2, None))
    assert Away.asked == 1
    notes = [event.text for event in said if isinstance(event, Note)]
    assert notes == ["wandb is told nothing more: ConnectionError: no route to host"]
    assert sum(isinstance(event, TrialFinished) for event in said) == 2


def test_the_study_is_read_as_optunas_dashboard_reads_it(
    run_dir: Path, records: list[TrialRecord]
) -> None:
    storage = optuna.storages.RDBStorage(f"sqlite:///{run_dir / 'study.db'}")
    try:
        [study] = optuna.get_all_study_summaries(storage)
        trials = storage.get_all_trials(study._study_id)
        assert [trial.state.name for trial in trials] == [record.state for record in records]
        assert [trial.intermediate_values for trial in trials] == [r.rungs for r in records]
        assert [trial.value for trial in trials] == [record.objective for record in records]
    finally:
        close_storage(storage)


def test_optunas_dashboard_shows_every_trial(run_dir: Path, records: list[TrialRecord]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dashboard = pytest.importorskip(
            "optuna_dashboard", reason="the extra 'dashboard' is not installed"
        )
        storage = optuna.storages.RDBStorage(f"sqlite:///{run_dir / 'study.db'}")
        try:
            page = answer(dashboard.wsgi(storage), "/api/studies/1")
        finally:
            close_storage(storage)
    shown = {trial["number"]: trial for trial in page["trials"]}
    names = {"COMPLETE": "Complete", "PRUNED": "Pruned", "FAIL": "Fail"}
    assert {n: trial["state"] for n, trial in shown.items()} == {
        record.number: names[record.state] for record in records
    }
    for record in records:
        told = {each["step"]: each["value"] for each in shown[record.number]["intermediate_values"]}
        assert told == record.rungs


def answer(application: Any, path: str) -> Any:
    """Ask a WSGI application, with no server between."""
    status: list[str] = []
    environment = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
    }
    body = b"".join(application(environment, lambda code, headers, *_: status.append(code)))
    assert status == ["200 OK"], body
    return json.loads(body)
