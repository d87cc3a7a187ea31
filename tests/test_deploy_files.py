"""The files for Slurm and Kubernetes: read by their own parsers, and run as far as that goes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import typer
import yaml

from desisky_tune.cli.app import app

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "deploy" / "slurm.sh"
RAYJOB = ROOT / "deploy" / "rayjob.yaml"


def options_of(command: str) -> set[str]:
    """The options that a command of desisky-tune has."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {option for param in commands[command].params for option in param.opts}


# ------------------------------------------------------------------------------ Kubernetes


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    _, job = yaml.safe_load_all(RAYJOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    return dict(job)


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [
        group["template"]["spec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


def test_the_rayjob_asks_for_the_token_and_opens_no_port(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    # A token in a file that is committed would be none.
    assert "RAY_AUTH_TOKEN" not in yaml.safe_dump(rayjob)


def test_the_rayjob_runs_a_search_that_the_command_understands(rayjob: dict[str, Any]) -> None:
    python, flag, package, command, _, *rest = shlex.split(rayjob["spec"]["entrypoint"])
    assert (python, flag, package) == ("python", "-m", "desisky_tune")
    assert {word for word in rest if word.startswith("--")} <= options_of(command)
    assert rest[rest.index("--address") + 1] == "auto"


def test_all_pods_share_the_image_and_the_volume_of_the_runs(rayjob: dict[str, Any]) -> None:
    claim, _ = yaml.safe_load_all(RAYJOB.read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    runs = shlex.split(rayjob["spec"]["entrypoint"])
    folder = runs[runs.index("--runs") + 1]
    images = set()
    for pod in pods(rayjob):
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": folder}]
        assert pod["securityContext"]["runAsNonRoot"] is True
        images.add(container["image"])
    assert len(images) == 1


def test_the_rayjob_names_the_ray_that_was_tested(rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert f"rayproject/ray:{ray.__version__}-" in RAYJOB.read_text()


@pytest.mark.parametrize(("path", "marks"), [(SLURM, 2), (RAYJOB, 3)])
def test_the_lines_to_edit_are_marked(path: Path, marks: int) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# Edit")]
    for mark in range(1, marks + 1):
        assert sum(f"({mark})" in line for line in lines) == 1


# ----------------------------------------------------------------------------------- Slurm

#: What stands in for Slurm and Ray: each call is a line of the log, with the token's settings, and
#: a step with the CPUs that it has.
STUBS = {
    "scontrol": """
        if [[ $1 == requeue ]]; then echo "scontrol $*" >> "$CALLS"; exit "${REQUEUE_EXIT:-0}"; fi
        printf "node1\\nnode2\\nnode3\\n"
    """,
    "srun": """
        if [[ "$*" == *" hostname "* ]]; then echo "10.0.0.7 fe80::1"; exit; fi
        mode=$(stat -c %a "$RAY_AUTH_TOKEN_PATH")
        echo "srun $* [${SRUN_CPUS_PER_TASK:-1} CPUs, $RAY_AUTH_MODE $mode]" >> "$CALLS"
        exec sleep 60
    """,
    "desisky-tune": """
        while [[ $(grep -c "ray start" "$CALLS") -lt 2 ]]; do sleep 0.05; done
        echo "desisky-tune $* [$(wc -c < "$RAY_AUTH_TOKEN_PATH")]" >> "$CALLS"
        if [[ -n ${NOTICE:-} ]]; then
            trap 'sleep 0.2; echo "rungs finished" >> "$CALLS"; exit 75' TERM
            kill -TERM "$PPID"
            while :; do sleep 0.05; done
        fi
        exit "${SEARCH_EXIT:-0}"
    """,
    # Makes the token; the wait for the nodes (a script on standard input) is over at once.
    "python": f'[[ $1 == - ]] && exit 0; exec "{sys.executable}" "$@"',
}


def run_slurm(
    folder: Path, *words: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script with everything around it replaced; return what it called."""
    stubs = folder / "base" / "venv" / "bin"
    stubs.mkdir(parents=True)
    for name, body in STUBS.items():
        path = stubs / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (stubs / "activate").write_text(f'PATH="{stubs}:$PATH"\n')
    calls = folder / "calls"
    calls.touch()
    environment = {
        "PATH": os.environ["PATH"],
        "CALLS": str(calls),
        "SCRATCH": "/nowhere",
        "DESISKY_TUNE_BASE": str(folder / "base"),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "128",
        "SLURM_GPUS_PER_TASK": "a100:4",
    }
    done = subprocess.run(
        ["bash", str(SLURM), *words],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, calls.read_text().splitlines()


def test_slurm_starts_a_head_and_workers_with_the_token_then_searches(tmp_path: Path) -> None:
    done, calls = run_slurm(tmp_path, "broadband", "--name", "first")
    assert done.returncode == 0, done.stderr
    head, workers = sorted((c for c in calls if "ray start" in c), key=lambda c: "--head" not in c)
    assert "--nodelist=node1" in head
    assert "--node-ip-address=10.0.0.7 --port=6967" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--nodes=2 --ntasks=2 --exclude=node1" in workers
    assert "--address=10.0.0.7:6967" in workers
    for call in (head, workers):
        assert "--num-cpus=128 --num-gpus=4" in call
        # Of the step, without which all of its Ray would be on one CPU.
        assert "[128 CPUs, " in call
        # The file of the token is its owner's alone; its content is in no argument.
        assert call.endswith("token 600]")
    (search,) = [c for c in calls if c.startswith("desisky-tune")]
    runs = tmp_path / "base" / "runs"
    assert search == (
        f"desisky-tune search broadband --name first --address 10.0.0.7:6967 --runs {runs} [64]"
    )
    assert not list((tmp_path / "base" / "secrets").iterdir())


def test_the_exit_code_of_the_slurm_job_is_the_searchs(tmp_path: Path) -> None:
    done, calls = run_slurm(tmp_path, "runs/first", SEARCH_EXIT="3", DESISKY_TUNE_COMMAND="resume")
    assert done.returncode == 3
    assert any(c.startswith("desisky-tune resume runs/first --address") for c in calls)
    assert not list((tmp_path / "base" / "secrets").iterdir())


def test_before_the_time_limit_the_search_finishes_its_rungs_and_is_requeued(
    tmp_path: Path,
) -> None:
    done, calls = run_slurm(tmp_path, "broadband", "--name", "first", NOTICE="1")
    assert done.returncode == os.EX_TEMPFAIL, done.stderr
    assert calls[-2:] == ["rungs finished", "scontrol requeue 1234567"]
    assert re.search(r"^#SBATCH --signal=B:TERM@120$", SLURM.read_text(), re.MULTILINE)


def test_a_requeued_job_goes_on_with_its_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "slurm-1234567"
    run.mkdir(parents=True)
    (run / "search.json").touch()
    again = {"RUNS": str(run.parent), "SLURM_RESTART_COUNT": "1"}
    done, calls = run_slurm(tmp_path, "broadband", "--gpus", "0.25", **again)
    assert done.returncode == 0, done.stderr
    assert any(c.startswith(f"desisky-tune resume {run} --address 10.0.0.7:6967") for c in calls)


def test_a_job_without_a_name_for_its_run_gives_it_one(tmp_path: Path) -> None:
    done, calls = run_slurm(tmp_path, "broadband", SEARCH_EXIT="75", DESISKY_TUNE_REQUEUE="0")
    assert done.returncode == os.EX_TEMPFAIL
    assert any("search broadband --name slurm-1234567 --address" in c for c in calls)
    assert not any("requeue" in c for c in calls)


def test_a_slurm_job_that_is_taken_up_again_tells_the_same_tools(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "search.json").write_text("{}")
    words = ("broadband", "--name", "first", "--wandb", "--trials", "9", "--mlflow")
    again = {"RUNS": str(run.parent), "SLURM_RESTART_COUNT": "1"}
    done, calls = run_slurm(tmp_path, *words, **again)
    assert done.returncode == 0, done.stderr
    assert any(f"resume {run} --wandb --mlflow --address" in call for call in calls)


@pytest.mark.parametrize("word", ["--runs", "--runs=s3://bucket/runs", "--address"])
def test_what_is_slurms_own_is_refused_before_anything_starts(tmp_path: Path, word: str) -> None:
    done, calls = run_slurm(tmp_path, "broadband", word, "elsewhere")
    assert done.returncode == 2
    assert f"{word} is this script's" in done.stderr
    assert not any("ray start" in call for call in calls)


def test_where_slurm_does_not_requeue_it_is_said(tmp_path: Path) -> None:
    done, _ = run_slurm(tmp_path, "broadband", SEARCH_EXIT="75", REQUEUE_EXIT="1")
    assert done.returncode == os.EX_TEMPFAIL
    assert "does not requeue" in done.stderr


def test_the_options_in_slurms_script_exist() -> None:
    text = SLURM.read_text()
    for command, words in re.findall(r"desisky-tune (search|resume) (.*)", text):
        given = set(re.findall(r"(?<=\s)--[a-z-]+", words.split("`")[0]))
        assert given <= options_of(command)


def test_shell_scripts_are_clean() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SLURM)], check=True)
