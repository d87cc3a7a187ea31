"""A search becomes a job."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath

import desisky_tune
from desisky_tune.data.features import CATALOGUE, SHIPPED, load_features, needs_ray, source_path
from desisky_tune.data.remote import is_url, refuse_secrets
from desisky_tune.errors import ClusterError, InputError
from desisky_tune.files import sha256_file
from desisky_tune.jobs.client import MARK, Cluster
from desisky_tune.jobs.staging import SPACE_FILE, runtime_environment, working_directory
from desisky_tune.search.folder import valid_run_name
from desisky_tune.search.space import SearchSpec

#: Where runs are kept on a cluster: in the home of the account that Ray runs under.
DEFAULT_RUNS = "~/runs"

#: Metadata of a job whose package came with it.
SHIPPED_PACKAGE = "with the job"
INSTALLED_PACKAGE = "of the cluster"


def submit_search(
    cluster: Cluster,
    spec: SearchSpec,
    *,
    space: str,
    name: str | None = None,
    runs: str = DEFAULT_RUNS,
    ship: bool = True,
    pip: bool = False,
) -> tuple[str, dict[str, str]]:
    """Submit a search.

    Parameters
    ----------
    cluster
        Where to.
    spec
        The search. Its source of data is a URL, a path on the cluster's nodes, or
        ``sv1`` or ``vac``: data are never shipped.
    space
        What the space was called, for the job's metadata.
    name
        Of the run; by default the specification's with date and time (UTC), so that no
        two are alike.
    runs
        Folder on the cluster that holds the runs: absolute, or below ``~``. Where more
        than one node trains it must be one that all nodes share, or a URL.
    ship
        Whether this package travels with the job.
    pip
        Whether the nodes install the dependencies as they are installed here.

    Returns
    -------
    id, metadata
        The job's id, and what the cluster now knows of it.

    Raises
    ------
    InputError
        When something given cannot be used on a cluster.
    ClusterError
        When a job that has not ended has the same run, or the cluster does not take this one.
    """
    name = valid_run_name(default_name(spec) if name is None else name)
    runs = runs_folder(runs)
    check_source(spec.data.source)
    if spec.pretrain is not None and not spec.pretrain.simulated:
        check_source(spec.pretrain.source, "pretrain.source", "weights")
    _refuse_second(cluster, name, runs)
    metadata = {
        MARK: desisky_tune.__version__,
        "name": name,
        "space": space,
        "runs": runs,
        "package": SHIPPED_PACKAGE if ship else INSTALLED_PACKAGE,
        "data": spec.data.source,
        "subset": spec.data.subset,
        **data_fingerprint(spec),
    }
    return _start(cluster, entrypoint(name, runs), metadata, spec, ship=ship, pip=pip), metadata


def resume_job(
    cluster: Cluster,
    run: str,
    *,
    runs: str | None = None,
    ship: bool = True,
    pip: bool = False,
) -> tuple[str, dict[str, str]]:
    """Submit a job that finishes a run.

    Parameters
    ----------
    cluster
        Where to.
    run
        Name of the run, or id of the job that it was submitted as.
    runs
        Folder or URL on the cluster that holds the runs. By default that of the job, which the
        cluster forgets when its head is started anew.
    ship, pip
        As for `submit_search`.

    Returns
    -------
    id, metadata
        The job's id, and what the cluster now knows of it.

    Raises
    ------
    InputError
        When `runs` cannot be used on a cluster.
    ClusterError
        When the cluster knows no such run and `runs` is not given, when a job of the run has not
        ended, or when the cluster does not take the new one.
    """
    before = cluster.known(run)
    known: Mapping[str, str] = {} if before is None else before.metadata
    name = valid_run_name(known.get("name", run))
    if runs is None and "runs" not in known:
        raise ClusterError(
            f"{cluster.address} has no job {run!r}: say with --runs where the run is kept"
        )
    place = runs_folder(known["runs"] if runs is None else runs)
    _refuse_second(cluster, name, place)
    metadata = {
        **known,
        MARK: desisky_tune.__version__,
        "name": name,
        "runs": place,
        "package": SHIPPED_PACKAGE if ship else INSTALLED_PACKAGE,
    }
    where = f"{place.rstrip('/')}/{name}"
    command = ["python", "-m", "desisky_tune", "resume", where, "--address", "auto"]
    return _start(cluster, shlex.join(command), metadata, ship=ship, pip=pip), metadata


def _refuse_second(cluster: Cluster, name: str, runs: str) -> None:
    """Refuse a run that a job still writes: on a URL no lock would keep a second driver off.

    Raises
    ------
    ClusterError
        When a job that has not ended has that name and that folder or URL.
    """
    for job in cluster.jobs():
        there = job.metadata.get("runs", "")
        if not job.has_ended and job.name == name and there.rstrip("/") == runs.rstrip("/"):
            raise ClusterError(f"job {job.id} ({job.name}) is {job.status}: let it end first")


def _start(
    cluster: Cluster,
    command: str,
    metadata: Mapping[str, str],
    spec: SearchSpec | None = None,
    *,
    ship: bool,
    pip: bool,
) -> str:
    """Start a job with what it needs; return its id."""
    with working_directory(spec, ship=ship) as folder:
        environment = runtime_environment(folder, pip=pip)
        return cluster.submit(command, runtime_env=environment, metadata=metadata)


def default_name(spec: SearchSpec) -> str:
    """Return the specification's name with date and time."""
    return f"{spec.name[:80]}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def entrypoint(name: str, runs: str) -> str:
    """Return the shell command of a job."""
    search = ["python", "-m", "desisky_tune", "search", SPACE_FILE]
    return shlex.join([*search, "--name", name, "--runs", runs, "--address", "auto"])


def runs_folder(runs: str) -> str:
    """Return the folder or URL of the runs, checked.

    Raises
    ------
    InputError
        When it is relative (a job's working directory is thrown away after it), or a URL
        with a secret in it.
    """
    if is_url(runs):
        refuse_secrets(runs)
        return runs
    if not (PurePosixPath(runs).is_absolute() or re.match(r"~(/|$)", runs)):
        raise InputError(
            f"--runs {runs}: must be absolute or begin with ~/; a job's working directory is "
            "removed after it"
        )
    return runs


def check_source(source: str, field: str = "data.source", what: str = "data") -> None:
    """Refuse a source of data, or of weights, that the cluster's nodes cannot have.

    Raises
    ------
    InputError
        For a relative path, or a URL with a secret in it.
    """
    if source in (SHIPPED, CATALOGUE):
        return
    if is_url(source):
        refuse_secrets(source)
        return
    if not (PurePosixPath(source).is_absolute() or re.match(r"~(/|$)", source)):
        raise InputError(
            f"{field} = {source!r}: {what} do not travel with a job; give a URL, or the absolute "
            "path of a file that the cluster's nodes can read"
        )


def data_fingerprint(spec: SearchSpec) -> Mapping[str, str]:
    """Return what identifies the data, where their file is to be had here too.

    A table's fingerprint is the one that the run's ``search.json`` will have; for spectra,
    whose features are made on the cluster, it is the file's checksum.
    """
    if is_url(spec.data.source):
        return {}
    try:
        path = source_path(spec.data.source)
    except InputError:
        return {}  # on the cluster alone
    if needs_ray(spec.data.source):
        return {"data_sha256": sha256_file(path)}
    table = load_features(
        spec.data.source,
        spec.data.subset,
        eclipse=spec.data.eclipse,
        exclude_known_bad=spec.data.exclude_known_bad,
    )
    return {"data_fingerprint": table.fingerprint}
