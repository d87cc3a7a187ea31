"""No secret of the environment comes into a run's files, metrics or lines, nor a job's metadata."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import pytest

from desisky_tune.cli.progress import search_progress
from desisky_tune.jobs.staging import runtime_environment, working_directory
from desisky_tune.search.run import run_search
from desisky_tune.search.space import load_spec

SECRETS = {
    "RAY_AUTH_TOKEN": "never-to-be-seen-ray",
    "AWS_SECRET_ACCESS_KEY": "never-to-be-seen-aws",
}

SMALL = (
    "search.default_first=false",
    "search.trials=2",
    "evaluation.finalists=0",
    "search.grace=5",
    "training.epochs=10",
    "resources.workers=1",
    "space.width=8",
    "space.depth=1",
    "space.batch_size=32",
)


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_a_search_writes_no_secret(
    ray_instance: Any, tmp_path: Path, secrets: None, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = load_spec("quick", overrides=SMALL)
    with search_progress() as on_event:
        run_search(spec, runs=tmp_path / "runs", name="run", on_event=on_event)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 8
    leaked = [path for path in files if b"never-to-be-seen" in path.read_bytes()]
    assert leaked == []
    out, err = capsys.readouterr()
    assert "never-to-be-seen" not in out + err
    for node in ray_instance.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b"never-to-be-seen" not in answer.read()


def test_a_job_takes_no_secret_along(secrets: None) -> None:
    with working_directory(load_spec("quick"), ship=False) as folder:
        environment = runtime_environment(folder, pip=False)
        shipped = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert "never-to-be-seen" not in repr(environment)
    assert b"never-to-be-seen" not in shipped
