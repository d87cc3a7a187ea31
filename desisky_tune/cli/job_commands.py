"""`submit`, `status`, `logs`, `stop`, `fetch`: a search as a job on a Ray cluster."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from desisky_tune.cli.console import ABSENT, duration, say, show, show_json, table
from desisky_tune.cli.options import (
    AsJson,
    Debug,
    Deterministic,
    Epochs,
    Gpus,
    Overrides,
    Seed,
    Slots,
    Space,
    Subset,
    TimeLimit,
    Trials,
    Workers,
    as_overrides,
)
from desisky_tune.errors import ClusterError, InputError, SearchError

if TYPE_CHECKING:
    from desisky_tune.jobs import Job

Dashboard = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Dashboard of the cluster's head. Default: RAY_API_SERVER_ADDRESS, or "
        "http://127.0.0.1:8265, the near end of an SSH tunnel.",
    ),
]
JobName = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="Id of the job, or the name of its run.", show_default=False
    ),
]


def submit(
    space: Space = "quick",
    address: Dashboard = None,
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="sv1 (shipped), vac (where the nodes have it), a URL, or the absolute path of "
            "a file that the nodes can read.",
        ),
    ] = None,
    subset: Subset = None,
    trials: Trials = None,
    epochs: Epochs = None,
    seed: Seed = None,
    workers: Workers = None,
    gpus: Gpus = None,
    slots: Slots = None,
    time_limit: TimeLimit = None,
    deterministic: Deterministic = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="NAME",
            help="Finish a run that was submitted before, instead of starting one.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the run. Default: the space's, with date and time."),
    ] = None,
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs",
            metavar="DIR",
            help="Folder on the cluster, shared by its nodes, or URL, that holds the runs. "
            "Default: ~/runs.",
        ),
    ] = None,
    installed: Annotated[
        bool,
        typer.Option(
            "--installed", help="Use the desisky_tune that the nodes have; ship none with the job."
        ),
    ] = False,
    pip: Annotated[
        bool,
        typer.Option(
            "--pip", help="Let the nodes install the dependencies, at the versions used here."
        ),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Start a search as a job on a Ray cluster, and leave it there."""
    from desisky_tune.search.space import load_spec

    given = as_overrides(
        data=data,
        subset=subset,
        trials=trials,
        epochs=epochs,
        seed=seed,
        workers=workers,
        gpus=gpus,
        slots=slots,
        time_limit=time_limit,
        deterministic=deterministic,
    )
    if resume is not None and (given or overrides or name is not None or space != "quick"):
        raise InputError("--resume goes on with the run as it is: leave the space's options out")
    spec = None if resume is not None else load_spec(space, [*(overrides or []), *given])

    from desisky_tune.jobs import Cluster, resume_job, submit_search
    from desisky_tune.jobs.submit import DEFAULT_RUNS

    cluster = Cluster(address)
    if spec is None:
        assert resume is not None
        job, metadata = resume_job(cluster, resume, runs=runs, ship=not installed, pip=pip)
    else:
        job, metadata = submit_search(
            cluster,
            spec,
            space=Path(space).name,
            name=name,
            runs=runs or DEFAULT_RUNS,
            ship=not installed,
            pip=pip,
        )
    if as_json:
        show_json({"job": job, "address": cluster.address, "metadata": metadata})
        return
    show(f"job: {job}")
    show(f"run: {metadata['name']} in {metadata['runs']} on the cluster")
    show(f"dashboard: {cluster.address}/#/jobs/{job}")
    where = "" if address is None else f" --address {address}"
    say(
        f"it runs without us now; 'desisky-tune logs {metadata['name']} --follow{where}' shows it, "
        f"'desisky-tune fetch {metadata['name']}{where}' brings the result"
    )


def status(
    job: Annotated[
        str | None,
        typer.Argument(
            metavar="JOB",
            help="Id of a job, or the name of its run. Default: all searches.",
            show_default=False,
        ),
    ] = None,
    address: Dashboard = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show how the searches of a cluster stand, or one of them."""
    from desisky_tune.jobs import Cluster

    cluster = Cluster(address)
    found = cluster.jobs() if job is None else [cluster.find(job)]
    if as_json:
        rows = [job_json(each) for each in found]
        show_json(rows if job is None else rows[0])
    elif job is not None:
        show("\n".join(details(found[0])))
    elif found:
        headings = ["run", "job", "state", "space", "data", "since", "took"]
        show(table(headings, [_row(each) for each in found], left=6))
    else:
        say(f"no search was submitted to {cluster.address}")


def logs(
    job: JobName,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Go on until the job ends; fail where it did not succeed."
        ),
    ] = False,
    address: Dashboard = None,
    debug: Debug = False,
) -> None:
    """Print what a job has written."""
    from desisky_tune.jobs import Cluster

    cluster = Cluster(address)
    found = cluster.find(job)
    if not follow:
        text = cluster.log(found.id).rstrip("\n")
        if text:
            show(text.expandtabs(1))
        return
    for line in cluster.follow(found.id):
        show(line.expandtabs(1))
        sys.stdout.flush()
    # The log ends a moment before the job's state is written.
    ended = cluster.wait(found.id, timeout=60)
    if ended.status != "SUCCEEDED":
        raise SearchError(f"job {ended.id} ({ended.name}) {ended.status}: {_reason(ended)}")


def stop(job: JobName, address: Dashboard = None, debug: Debug = False) -> None:
    """Stop a job: its trials finish their rungs, and what is finished stays in its run's folder."""
    from desisky_tune.jobs import Cluster
    from desisky_tune.jobs.staging import STOP_SECONDS

    cluster = Cluster(address)
    found = cluster.find(job)
    if found.has_ended or not cluster.stop(found.id):
        raise ClusterError(f"job {found.id} ({found.name}) is {found.status}: nothing to stop")
    ended = cluster.wait(found.id, timeout=STOP_SECONDS + 30)
    show(f"job {found.id} ({found.name}) {ended.status}")


def fetch(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Name of the run, or its job.", show_default=False),
    ],
    into: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder here that will hold the run's folder."),
    ] = Path("runs"),
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs",
            metavar="PLACE",
            help="Copy from this folder or URL (s3://, gs://) that holds the runs, instead of "
            "over the connection to the cluster.",
        ),
    ] = None,
    address: Dashboard = None,
    debug: Debug = False,
) -> None:
    """Fetch a run's results: checkpoint, leaderboard, evaluation."""
    from desisky_tune.jobs import Cluster, fetch_from_cluster, fetch_from_storage

    if runs is not None and address is not None:
        raise InputError("--runs and --address exclude each other: one place to fetch from")
    if runs is not None:
        folder = fetch_from_storage(runs, name, into)
    else:
        cluster = Cluster(address)
        folder = fetch_from_cluster(cluster, cluster.find(name), into)
    for path in sorted(folder.glob("best/*.eqx")):
        show(f"checkpoint: {path}")
    show(f"leaderboard: {folder / 'leaderboard.csv'}")
    show(f"evaluation: {folder / 'evaluation.json'}")


def job_json(job: Job) -> dict[str, Any]:
    """Return a job as JSON-able values."""
    return {
        "job": job.id,
        "name": job.name,
        "status": job.status,
        "message": job.message,
        "started": job.started,
        "ended": job.ended,
        "metadata": dict(job.metadata),
    }


def details(job: Job) -> list[str]:
    """Return what there is to say of a job, a line each."""
    lines = [f"job: {job.id}", f"state: {job.status}"]
    if job.status == "FAILED":
        lines.append(f"reason: {_reason(job)}")
    lines += [f"{key}: {value}" for key, value in sorted(job.metadata.items())]
    if job.started is not None:
        lines.append(f"since: {_when(job.started)}, {_took(job)}")
    return lines


def _row(job: Job) -> list[str]:
    meta = job.metadata
    return [
        job.name,
        job.id,
        job.status,
        meta.get("space", ABSENT),
        meta.get("data", ABSENT),
        ABSENT if job.started is None else _when(job.started),
        _took(job),
    ]


def _took(job: Job) -> str:
    if job.started is None:
        return ABSENT
    return duration((job.ended or time.time()) - job.started)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="seconds")


def _reason(job: Job) -> str:
    """The last thing of substance in what Ray says of a job's end."""
    lines = [line.strip() for line in job.message.splitlines() if line.strip()]
    ours = [line for line in lines if "desisky-tune: " in line]
    chosen = (ours or lines or ["no reason given"])[-1]
    return chosen.partition("desisky-tune: error: ")[2] or chosen
