"""Searches as jobs: what travels, what comes back, and a real head with its token."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import pytest
from headless import Browser, find_browser

import desisky_tune.ray_session as session_module
from desisky_tune.cli import main
from desisky_tune.cli.parcel import main as print_parcel
from desisky_tune.data.features import load_features
from desisky_tune.errors import ClusterError, InputError, RunError
from desisky_tune.jobs.client import Cluster, Job, dashboard_address
from desisky_tune.jobs.fetch import fetch_from_storage
from desisky_tune.jobs.parcel import MARK, is_result, pack, unpack
from desisky_tune.jobs.staging import (
    JOB_ENVIRONMENT,
    SPACE_FILE,
    pinned_requirements,
    runtime_environment,
    working_directory,
)
from desisky_tune.jobs.submit import (
    check_source,
    entrypoint,
    resume_job,
    runs_folder,
    submit_search,
)
from desisky_tune.ray_session import LOOPBACK_VARIABLE, WORKER_ENVIRONMENT, ray_session
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.leaderboard import leaderboard
from desisky_tune.search.records import Ledger, finish
from desisky_tune.search.space import load_spec

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")

# ------------------------------------------------------------------------- what travels


def test_a_job_carries_the_resolved_space_and_the_package_and_no_more(tmp_path: Path) -> None:
    spec = load_spec("quick", ["search.trials=7", "space.width=48", "search.time_limit=90s"])
    with working_directory(spec, ship=True) as folder:
        assert {path.name for path in folder.iterdir()} == {SPACE_FILE, "desisky_tune"}
        assert load_spec(str(folder / SPACE_FILE)) == spec
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert not [p for p in files if p.suffix == ".pyc" or p.name.startswith(".")]
        assert sum(path.stat().st_size for path in files) < 5e6
        # It runs from there, with its spaces and its shipped exposures, and from nowhere else.
        script = (
            "import desisky_tune, pathlib; from desisky_tune.search.space import load_spec;"
            "from desisky_tune.data.features import source_path;"
            "print(pathlib.Path(desisky_tune.__file__).parent, load_spec('broadband').name,"
            "source_path('sv1').is_relative_to(pathlib.Path.cwd()))"
        )
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [str(folder / "desisky_tune"), "broadband", "True"]
    assert not folder.exists()


def test_without_the_package_only_the_space_travels() -> None:
    with working_directory(load_spec("quick"), ship=False) as folder:
        assert [path.name for path in folder.iterdir()] == [SPACE_FILE]


def test_the_environment_of_a_job_holds_no_secret_and_no_key_of_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "never-to-be-seen")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-to-be-seen")
    environment = runtime_environment(tmp_path, pip=True)
    assert "never-to-be-seen" not in json.dumps(environment)
    # Ray refuses a key that both a job and `ray.init` in it set.
    assert not set(JOB_ENVIRONMENT) & set(WORKER_ENVIRONMENT)


def test_a_variable_that_its_job_sets_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.runtime_env.runtime_env import _merge_runtime_env

    its_own = {"env_vars": {"PYTHONWARNINGS": "error", "TERM": "dumb"}, "working_dir": "gcs://x"}
    job_config = json.dumps({"runtime_env": its_own, "metadata": {}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job_config)
    given: dict[str, Any] = {}

    def init(**options: Any) -> None:
        given.update(options)
        raise ConnectionError

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError, match="no Ray cluster answers"), ray_session(address="auto"):
        pass
    # As Ray does; None where it would refuse.
    merged = _merge_runtime_env(its_own, given["runtime_env"])
    assert merged is not None
    assert merged["env_vars"] == {**WORKER_ENVIRONMENT, **its_own["env_vars"]}


@pytest.mark.parametrize("alone", [True, False])
def test_a_ray_on_loopback_alone_is_joined_there(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.delenv(LOOPBACK_VARIABLE, raising=False)
    monkeypatch.setattr(session_module, "_own_address", lambda: "127.0.0.2")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    found: list[str | None] = []

    def init(**options: Any) -> None:
        found.append(os.environ.get(LOOPBACK_VARIABLE))
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1" if alone else "", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        # It answers: so it is the token, or something else that is not silence.
        with (
            pytest.raises(InputError, match=f"cannot join the Ray at '{address}'.*RAY_AUTH_TOKEN"),
            ray_session(address=address),
        ):
            pass
    assert found == ["0" if alone else None]


def test_a_ray_that_wants_a_token_says_how_to_send_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    def init(**options: Any) -> None:
        raise AuthenticationError("no authentication token was found")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError, match="RAY_AUTH_MODE=token"), ray_session(address="auto"):
        pass


def test_ctrl_c_while_a_log_is_followed_is_only_that() -> None:
    closed = []

    async def log() -> AsyncIterator[str]:
        try:
            yield "one\n"
            asyncio.get_running_loop().call_soon(interrupt)
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    def interrupt() -> None:
        raise KeyboardInterrupt

    cluster = object.__new__(Cluster)
    cluster.address = "http://h:1"
    cluster._client = SimpleNamespace(tail_job_logs=lambda id: log())
    lines = cluster.follow("a job")
    assert next(lines) == "one"
    with pytest.raises(KeyboardInterrupt):
        next(lines)
    assert closed == [True]


def test_pip_pins_every_dependency_but_ray() -> None:
    import jax

    pinned = pinned_requirements()
    assert all(re.fullmatch(r"[\w.-]+==[0-9][\w.+]*", line) for line in pinned)
    assert f"jax=={jax.__version__}" in pinned
    assert not [line for line in pinned if line.startswith(("ray=", "pytest=", "ruff="))]


def test_a_name_or_folder_cannot_become_a_second_command() -> None:
    command = entrypoint("a", "/mnt/$(touch x); rm -rf ~")
    assert "'/mnt/$(touch x); rm -rf ~'" in command


@pytest.mark.parametrize("runs", ["runs", "./runs", "~other/runs", ""])
def test_a_runs_folder_that_would_be_lost_is_refused(runs: str) -> None:
    with pytest.raises(InputError, match="--runs"):
        runs_folder(runs)


@pytest.mark.parametrize("runs", ["/mnt/runs", "~/runs", "~", "s3://bucket/runs"])
def test_a_runs_folder_of_the_cluster_is_taken(runs: str) -> None:
    assert runs_folder(runs) == runs


@pytest.mark.parametrize("source", ["exposures.csv", "data/vac.fits"])
def test_data_that_are_here_alone_are_refused(source: str) -> None:
    with pytest.raises(InputError, match=r"data do not travel with a job"):
        check_source(source)
    with pytest.raises(InputError, match=r"pretrain.source = .*weights do not travel with a job"):
        check_source(source, "pretrain.source", "weights")


@pytest.mark.parametrize(
    "source", ["sv1", "vac", "/mnt/exposures.csv", "~/vac.fits", "s3://bucket/vac.fits"]
)
def test_data_of_the_cluster_are_taken(source: str) -> None:
    check_source(source)


def test_a_url_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(InputError, match=r"s3://bucket/x\.csv: a URL with a user") as refused:
        check_source("s3://key:never-to-be-seen@bucket/x.csv")
    assert "never-to-be-seen" not in str(refused.value)
    with pytest.raises(InputError) as refused:
        runs_folder("s3://key:never-to-be-seen@bucket/runs")
    assert "never-to-be-seen" not in str(refused.value)
    for check in (check_source, runs_folder):
        with pytest.raises(InputError, match=r"abfs://runs/x: .*parameter 'sig'") as refused:
            check("abfs://runs/x?sig=never-to-be-seen")
        assert "never-to-be-seen" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("https://head:8265/", "https://head:8265"),
        ("10.0.0.1:8265", "http://10.0.0.1:8265"),
    ],
)
def test_address_of_a_dashboard(given: str, url: str) -> None:
    assert dashboard_address(given) == url


@pytest.mark.parametrize("given", ["ray://head:10001", "auto", "http://head", "http://u:p@h:1"])
def test_what_is_no_address_of_a_dashboard_is_said(given: str) -> None:
    with pytest.raises(ClusterError, match=r"the dashboard's is wanted"):
        dashboard_address(given)


def test_the_address_falls_back_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://other:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://first:1")
    assert dashboard_address(None) == "http://first:1"
    assert dashboard_address("http://given:1") == "http://given:1"
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name)
    assert dashboard_address(None) == "http://127.0.0.1:8265"


def test_a_cluster_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert main(["status", "--address", address]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"desisky-tune: error: no Ray dashboard answers at {address}")


# ------------------------------------------------------------------ several jobs of a run


class Listed(Cluster):
    """A cluster that has these jobs, the newest first, and takes any other."""

    def __init__(self, *jobs: Job) -> None:
        self.address = "http://head:8265"
        self.listed = list(jobs)

    def jobs(self) -> list[Job]:
        return self.listed

    def submit(self, entrypoint: str, **_: Any) -> str:
        return "another"


def job(id: str, status: str, runs: str = "s3://bucket/runs") -> Job:
    return Job(id, status, "", {"name": "deep", "runs": runs})


def test_a_name_is_that_of_the_job_that_goes_on() -> None:
    cluster = Listed(job("new", "FAILED"), job("old", "RUNNING"), job("first", "STOPPED"))
    assert cluster.find("deep").id == "old"
    assert cluster.find("new").id == "new"
    assert Listed(job("new", "FAILED"), job("old", "STOPPED")).find("deep").id == "new"


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
@pytest.mark.parametrize("how", ["submit", "resume", "resume by the id of another job"])
def test_a_run_has_one_job_at_a_time(how: str, status: str) -> None:
    cluster = Listed(job("new", "FAILED"), job("old", status))
    refused = pytest.raises(
        ClusterError, match=rf"^job old \(deep\) is {status}: let it end first$"
    )
    if how == "submit":
        spec = load_spec("quick")
        with refused:
            submit_search(cluster, spec, space="quick", name="deep", runs="s3://bucket/runs/")
    else:
        with refused:
            resume_job(cluster, "deep" if how == "resume" else "new", ship=False)


def test_a_run_of_that_name_in_another_place_is_another_run() -> None:
    cluster = Listed(job("old", "RUNNING"))
    assert resume_job(cluster, "deep", runs="/mnt/runs", ship=False)[0] == "another"
    ended = Listed(job("new", "FAILED"), job("old", "STOPPED"))
    assert resume_job(ended, "deep", ship=False)[1]["runs"] == "s3://bucket/runs"


# -------------------------------------------------------------------------- what returns


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run as far as fetching goes: a record, a checkpoint, an evaluation."""
    folder = RunFolder.create(tmp_path / "there", "deep", exact=True)
    folder.write_search({"name": "deep", "data": {}})
    record = finish(
        number=0,
        configuration={"width": 8, "depth": 1},
        result={
            "epochs": 3,
            "objective": 0.25,
            "best_epoch": 2,
            "rmse": dict.fromkeys("Vgrz", 0.25),
        },
        max_epochs=3,
    )
    Ledger(folder.ledger).append(record)
    folder.evaluation.write_text("{}")
    folder.best.parent.mkdir()
    folder.best.write_bytes(bytes(range(256)) * 40)
    folder.trials.mkdir()
    (folder.trials / "00000.eqx").write_bytes(b"not fetched")
    (folder.path / "study.db").write_bytes(b"not fetched")
    return folder


def test_a_parcel_brings_every_result_byte_by_byte(run: RunFolder) -> None:
    log = "a line of Ray's\n" + "\n".join(pack(run.path)) + "\nanother\n"
    files = unpack(log)
    assert set(files) == {"search.json", "ledger.jsonl", "evaluation.json", "best/deep.eqx"}
    for path, content in files.items():
        assert content == (run.path / path).read_bytes()
    assert not CONTROL.search(log)


def test_a_search_that_has_not_finished_cannot_be_fetched(run: RunFolder) -> None:
    run.evaluation.unlink()
    with pytest.raises(RunError, match="no winner yet"):
        list(pack(run.path))
    assert print_parcel([str(run.path)]) == 2


def forged(path: str, content: bytes = b"x", digest: str | None = None) -> str:
    """A line of a parcel that `pack` would not write."""
    import hashlib

    entry = {
        "path": path,
        "sha256": digest or hashlib.sha256(content).hexdigest(),
        "content": base64.b64encode(zlib.compress(content)).decode(),
    }
    return f"{MARK}{json.dumps(entry)}\n{MARK}{json.dumps({'files': 1})}\n"


@pytest.mark.parametrize(
    "path",
    ["../evil", "/etc/passwd", "best/../../x.eqx", "best//x.eqx", "best/.x.eqx", "trials/0.eqx"],
)
def test_a_parcel_cannot_write_outside_the_run(path: str) -> None:
    assert not is_result(path)
    with pytest.raises(RunError, match="is no result of a run"):
        unpack(forged(path))


@pytest.mark.parametrize(
    "log",
    [
        "",
        forged("search.json", digest="0" * 64),
        forged("search.json").splitlines()[0],
        f"{MARK}{{not json\n",
        f"{MARK}[]\n",
        forged("search.json").replace('"content": "', '"content": "AAAA'),
    ],
    ids=["empty", "checksum", "cut off", "no JSON", "no object", "content"],
)
def test_a_damaged_parcel_is_refused(log: str) -> None:
    with pytest.raises(RunError, match="arrived damaged"):
        unpack(log)


@pytest.mark.parametrize("kind", ["folder", "file URL", "fsspec URL"])
def test_results_are_fetched_from_shared_storage(
    kind: str, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = run.path.parent
    place = {"folder": str(runs), "file URL": runs.as_uri(), "fsspec URL": "memory://bucket/runs"}
    if kind == "fsspec URL":
        import fsspec

        fsspec.filesystem("memory").put(str(runs), "/bucket/runs", recursive=True)
    here = tmp_path / "here"
    assert main(["fetch", "deep", str(here), "--runs", place[kind]]) == 0
    shown = capsys.readouterr().out
    assert f"checkpoint: {here}/deep/best/deep.eqx" in shown
    assert (here / "deep" / "best" / "deep.eqx").read_bytes() == run.best.read_bytes()
    assert not (here / "deep" / "trials").exists()
    pd.testing.assert_frame_equal(leaderboard(here / "deep"), leaderboard(run.path))
    board = pd.read_csv(here / "deep" / "leaderboard.csv")
    assert board["objective"].tolist() == [0.25]
    # A second time it would overwrite what is there.
    assert main(["fetch", "deep", str(here), "--runs", place[kind]]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../deep", "/deep", "a/b", ".", ""])
def test_a_name_cannot_lead_out_of_the_runs_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run name"):
        fetch_from_storage(str(tmp_path), name, tmp_path / "here")


@pytest.mark.parametrize("place", ["nowhere", "unknown://bucket", "memory://not-there"])
def test_nothing_is_left_of_a_fetch_that_failed(place: str, tmp_path: Path) -> None:
    given = place if "://" in place else str(tmp_path / place)
    with pytest.raises(InputError):
        fetch_from_storage(given, "deep", tmp_path / "here")
    assert not (tmp_path / "here").exists()


# --------------------------------------------------------------------------- a real head


@dataclass(frozen=True)
class Head:
    """A Ray head with its dashboard and a token, on loopback."""

    address: str
    token: str
    folder: Path

    def environment(self, token: str | None) -> dict[str, str]:
        """The environment of a user's shell: without Ray's variables, but for the token."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        clean["HOME"] = str(self.folder)
        return clean if token is None else clean | {"RAY_AUTH_TOKEN": token}

    def command(
        self, *words: str, token: str | None = "its own"
    ) -> subprocess.CompletedProcess[str]:
        """Run desisky-tune as a user does."""
        return subprocess.run(
            [sys.executable, "-m", "desisky_tune", *words, "--address", self.address],
            capture_output=True,
            text=True,
            timeout=300,
            env=self.environment(self.token if token == "its own" else token),
            cwd=self.folder,
        )


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
    except urllib.error.HTTPError:
        return True  # it wants a token
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head of this test's own, with ports of its own, ended by its own processes."""
    # Ray's sockets lie in it, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="dt-"))
    gcs, dashboard, agent, grpc, metrics, client = free_ports(6)
    head = Head(f"http://127.0.0.1:{dashboard}", secrets.token_hex(32), folder)
    scripts = str(Path(sys.executable).parent)
    environment = head.environment(head.token) | {
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    options = {
        "node-ip-address": "127.0.0.1",
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": grpc,
        "metrics-export-port": metrics,
        "ray-client-server-port": client,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": 2,
        "num-gpus": 0,
        "object-store-memory": 100_000_000,
        "temp-dir": folder / "ray",
    }
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    # The nodes of a cluster do not have this checkout: it must come with the job.
    environment.pop("PYTHONPATH", None)
    with open(folder / "head.log", "wb") as log:
        process = subprocess.Popen(
            [*start, *(f"--{name}={value}" for name, value in options.items())],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
    try:
        deadline = time.monotonic() + 120
        while not answers(head.address):
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield head
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs(children, timeout=15)
        for child in left:
            child.kill()
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


TINY = (
    "search.trials=2",
    "search.scheduler=none",
    "resources.workers=1",
    "training.epochs=2",
    "evaluation.finalists=0",
    "space={width: 8, depth: {low: 1, high: 2}, batch_size: 64}",
)


@pytest.fixture(scope="module")
def submitted(head: Head) -> dict[str, Any]:
    """A tiny search and one that fails, submitted over HTTP."""
    runs = head.folder / "runs"
    words = ["--runs", str(runs), "--json"]
    for field in TINY:
        words += ["--set", field]
    tiny = head.command("submit", "quick", "--name", "tiny", *words)
    assert tiny.returncode == 0, tiny.stderr
    bad = head.command("submit", "quick", "--name", "bad", "--data", "/no/such/file.csv", *words)
    assert bad.returncode == 0, bad.stderr
    return {"runs": runs, "tiny": json.loads(tiny.stdout), "bad": json.loads(bad.stdout)}


@pytest.fixture(scope="module")
def followed(head: Head, submitted: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """The log of the tiny search, followed to its end."""
    return head.command("logs", "tiny", "--follow")


@pytest.mark.parametrize("token", [None, "f" * 64], ids=["no token", "a wrong token"])
def test_without_the_token_a_job_is_refused_in_one_line(head: Head, token: str | None) -> None:
    done = head.command("submit", "quick", token=token)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"desisky-tune: error: {head.address} ")
    assert ("401" if token is None else "403") in line
    assert "RAY_AUTH_TOKEN" in line
    assert head.token not in line


def test_submit_tells_the_job_and_what_was_recorded_of_it(submitted: dict[str, Any]) -> None:
    tiny = submitted["tiny"]
    metadata = tiny["metadata"]
    assert metadata["name"] == "tiny"
    assert metadata["space"] == "quick"
    # What the data are is known before the search runs: it is what the run will record.
    assert metadata["data_fingerprint"] == load_features("sv1", "moon").fingerprint
    assert "data_fingerprint" not in submitted["bad"]["metadata"]


def test_a_search_that_succeeds_is_followed_to_its_end(
    head: Head, submitted: dict[str, Any], followed: subprocess.CompletedProcess[str]
) -> None:
    assert followed.returncode == 0, followed.stdout + followed.stderr
    lines = followed.stdout.splitlines()
    for number in (0, 1):
        assert sum(f"] trial {number} COMPLETE" in line for line in lines) == 1
    assert sum(line.startswith("search finished in") for line in lines) == 1
    status = head.command("status", "tiny", "--json")
    state = json.loads(status.stdout)
    assert (state["job"], state["status"]) == (submitted["tiny"]["job"], "SUCCEEDED")
    assert state["metadata"] == submitted["tiny"]["metadata"]


@pytest.mark.usefixtures("followed")
def test_the_raw_log_has_no_control_characters_and_no_secret(
    head: Head, submitted: dict[str, Any]
) -> None:
    (path,) = (head.folder / "ray").glob(
        f"session_2*/logs/job-driver-{submitted['tiny']['job']}.log"
    )
    log = path.read_text()
    ours = [line for line in log.splitlines() if "job_manager.py" not in line]
    assert len(ours) > 10
    assert not [line for line in ours if CONTROL.search(line)]
    assert head.token not in log


@pytest.mark.usefixtures("followed")
def test_the_result_is_fetched_over_the_same_connection(
    head: Head, submitted: dict[str, Any], tmp_path: Path
) -> None:
    done = head.command("fetch", "tiny", str(tmp_path))
    assert done.returncode == 0, done.stderr
    there, here = submitted["runs"] / "tiny", tmp_path / "tiny"
    for name in ("search.json", "ledger.jsonl", "evaluation.json", "best/tiny.eqx"):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert len(pd.read_csv(here / "leaderboard.csv")) == 2
    recorded = RunFolder.open(here).read_search()["data"]["fingerprint"]
    assert recorded == submitted["tiny"]["metadata"]["data_fingerprint"]
    # The packing job is gone from the list.
    jobs = json.loads(head.command("status", "--json").stdout)
    assert {job["name"] for job in jobs} == {"tiny", "bad"}


@pytest.mark.usefixtures("followed")
def test_a_run_is_resumed_by_another_job(head: Head, submitted: dict[str, Any]) -> None:
    evaluation = submitted["runs"] / "tiny" / "evaluation.json"
    before = evaluation.read_bytes()
    done = head.command("submit", "--resume", "tiny", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["job"] != submitted["tiny"]["job"]
    assert told["metadata"] == submitted["tiny"]["metadata"]
    followed = head.command("logs", told["job"], "--follow")
    assert followed.returncode == 0, followed.stdout
    assert "search finished in" in followed.stdout
    assert evaluation.read_bytes() == before
    # Where the head has forgotten the job, the place has to be said.
    unknown = head.command("submit", "--resume", "nobody")
    assert unknown.returncode == 2
    assert "has no job 'nobody': say with --runs where the run is kept" in unknown.stderr


def test_what_is_resumed_is_resumed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--resume", "deep", "--trials", "9"]) == 2
    assert "--resume goes on with the run as it is" in capsys.readouterr().err


def test_a_search_that_fails_is_a_failed_job(head: Head, submitted: dict[str, Any]) -> None:
    done = head.command("logs", submitted["bad"]["job"], "--follow")
    assert done.returncode == 1
    assert "desisky-tune: error: /no/such/file.csv: no such file" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "FAILED: /no/such/file.csv: no such file" in line
    listed = head.command("status").stdout
    assert re.search(rf"^bad +{submitted['bad']['job']} +FAILED", listed, re.MULTILINE)


@pytest.mark.usefixtures("followed")
def test_what_is_over_or_unknown_cannot_be_stopped(head: Head) -> None:
    done = head.command("stop", "tiny")
    assert done.returncode == 2
    assert "is SUCCEEDED: nothing to stop" in done.stderr
    unknown = head.command("stop", "nobody")
    assert unknown.returncode == 2
    assert "has no job 'nobody'; it has" in unknown.stderr


@pytest.fixture(scope="module")
def running(head: Head, submitted: dict[str, Any]) -> str:
    """The job of a search that would go on for hours, of trials of seconds."""
    started = head.command(
        "submit", "quick", "--name", "long", "--runs", str(submitted["runs"]),
        "--trials", "100000", "--epochs", "3000", "--set", "search.scheduler=none",
        "--set", "space={width: 64, depth: 2, batch_size: 32}",
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    assert f"run: long in {submitted['runs']} on the cluster" in started.stdout
    (job,) = re.findall(rf"dashboard: {head.address}/#/jobs/(raysubmit_\w+)", started.stdout)
    return str(job)


@pytest.mark.skipif(find_browser() is None, reason="no Chromium here")
def test_the_dashboard_shows_a_running_search(head: Head, running: str, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(head.address, 1280)
        browser.await_text("Token authentication is enabled")
        # As the page's own dialog does it: the token is then a cookie that no script can read.
        login = (
            "fetch('/api/authenticate', {method: 'POST', headers:"
            f" {{Authorization: 'Bearer {head.token}'}}}}).then(answer => answer.status)"
        )
        assert browser.value_of(login) == 200
        browser.open(f"{head.address}/?in#/jobs", 1280)
        browser.await_text(running)
        browser.await_text("RUNNING")
        shown = browser.value_of("document.body.innerText")
        assert "desisky_tune search" in shown
        if folder := os.environ.get("DESISKY_TUNE_SCREENSHOTS"):
            browser.screenshot(Path(folder) / "dashboard.png", height=700)
        browser.value_of("location.hash = '#/metrics'")
        browser.await_text("Prometheus")
        assert not [each for each in browser.complaints if each.startswith("Uncaught")]


def follow(head: Head, job: str) -> Iterator[str]:
    """Yield the lines of a job's log until it ends, or nobody wants more."""
    process = subprocess.Popen(
        [sys.executable, "-m", "desisky_tune", "logs", job, "--follow", "--address", head.address],
        stdout=subprocess.PIPE,
        text=True,
        env=head.environment(head.token),
        cwd=head.folder,
    )
    assert process.stdout is not None
    with process:
        try:
            yield from process.stdout
        finally:
            process.terminate()


def test_a_running_search_is_stopped(head: Head, submitted: dict[str, Any], running: str) -> None:
    early = head.command("fetch", "long")
    assert early.returncode == 2
    assert "fetch it when it has ended" in early.stderr
    again = head.command("submit", "--resume", "long")
    assert again.returncode == 2
    assert "is RUNNING: let it end first" in again.stderr
    assert any(" at epoch " in line for line in follow(head, running))
    done = head.command("stop", "long")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("STOPPED")
    # It had the time to finish what ran, and to say how it ended.
    log = head.command("logs", "long").stdout.rstrip()
    assert re.search(r"stopped by SIGTERM after \d+ of 100000 trials; continue with", log), log
    elsewhere = head.folder / "elsewhere"
    late = head.command("fetch", "long", str(elsewhere))
    assert late.returncode == 2
    assert len(late.stderr.splitlines()) == 1
    assert not (elsewhere / "long").exists()


def test_nothing_but_loopback_is_listened_on(head: Head) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads another process's sockets")
    port = int(head.address.rpartition(":")[2])
    connections = psutil.net_connections("tcp")
    (owner,) = {c.pid for c in connections if c.status == "LISTEN" and c.laddr.port == port}
    assert {c.laddr.ip for c in connections if c.status == "LISTEN" and c.pid == owner} == {
        "127.0.0.1"
    }


def test_ray_takes_the_address_that_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Ray alone would let its variable overrule the argument.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ClusterError, match=re.escape(address)):
        Cluster(address)
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
