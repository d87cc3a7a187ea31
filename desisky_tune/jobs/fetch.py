"""A run's results, from storage that both sides see or through the cluster itself."""

from __future__ import annotations

import secrets
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import desisky_tune
from desisky_tune.data.remote import is_url, open_storage
from desisky_tune.errors import ClusterError, DesiskyTuneError, RunError, StorageError
from desisky_tune.jobs.client import MARK, Cluster, Job
from desisky_tune.jobs.parcel import require_finished, unpack
from desisky_tune.jobs.staging import runtime_environment, working_directory
from desisky_tune.jobs.submit import SHIPPED_PACKAGE
from desisky_tune.search.folder import valid_run_name
from desisky_tune.search.leaderboard import leaderboard, to_csv

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

#: The leaderboard that a fetched run has beside its ledger.
LEADERBOARD = "leaderboard.csv"

#: Time that packing a run on the cluster may take (s), a slow start of the job included.
PACKING_S = 600.0


def fetch_from_cluster(cluster: Cluster, job: Job, into: str | Path) -> Path:
    """Fetch the results of a search over the connection to its cluster.

    A second, small job on the cluster's head prints the files, packed and with their
    checksums, into its log; it is taken off the list afterwards.

    Parameters
    ----------
    cluster, job
        Where the search ran, and which it was.
    into
        Folder that will hold the run's folder.

    Returns
    -------
    Path
        The run's folder here.

    Raises
    ------
    ClusterError
        When the job has not ended, or the cluster cannot read the run.
    RunError
        When what arrives is damaged.
    """
    name = valid_run_name(job.name)
    if not job.has_ended:
        raise ClusterError(f"job {job.id} ({name}) is {job.status}: fetch it when it has ended")
    target = _free_folder(into, name)
    return _keep(target, unpack(_pack_there(cluster, job)).items())


def fetch_from_storage(runs: str, name: str, into: str | Path) -> Path:
    """Fetch the results of a run from where the runs are kept.

    Parameters
    ----------
    runs
        A folder, or a URL that pyarrow or fsspec opens (``s3://``, ``gs://``, ...).
    name
        Of the run.
    into
        Folder that will hold the run's folder.

    Raises
    ------
    RunError
        When there is no finished run of that name, or it cannot be read.
    DataError
        When nothing opens such a URL.
    """
    from pyarrow.fs import FileSelector, FileType

    target = _free_folder(into, valid_run_name(name))
    files, root = _open_storage(runs)
    run = f"{root.rstrip('/')}/{name}"
    try:
        found = files.get_file_info(FileSelector(run, recursive=True, allow_not_found=True))
        inside = [info.path[len(run) :].lstrip("/") for info in found if info.type == FileType.File]
        wanted = require_finished(inside, f"{runs.rstrip('/')}/{name}")
        contents = {}
        for path in wanted:
            with files.open_input_stream(f"{run}/{path}") as source:
                contents[path] = bytes(source.read())
    except OSError as error:
        raise RunError(f"{runs.rstrip('/')}/{name} cannot be read: {error}") from error
    return _keep(target, contents.items())


def _pack_there(cluster: Cluster, job: Job) -> str:
    """Run the packing job; return its log."""
    run = f"{job.metadata['runs'].rstrip('/')}/{job.name}"
    command = shlex.join(["python", "-m", "desisky_tune.cli.parcel", run])
    ship = job.metadata.get("package") == SHIPPED_PACKAGE
    with working_directory(None, ship=ship) as folder:
        packing = cluster.submit(
            command,
            runtime_env=runtime_environment(folder, pip=False),
            metadata={MARK: desisky_tune.__version__, "fetches": job.id},
        )
    ended = cluster.wait(packing, timeout=PACKING_S)
    log = cluster.log(packing)
    cluster.forget(packing)
    if ended.status != "SUCCEEDED":
        said = [line for line in log.splitlines() if line.startswith("desisky-tune: ")]
        reason = said[-1].removeprefix("desisky-tune: error: ") if said else ended.message
        raise ClusterError(f"the cluster cannot give {run}: {reason}")
    return log


def _open_storage(runs: str) -> tuple[FileSystem, str]:
    """Return the file system of a folder or URL, and the path in it."""
    from pyarrow.fs import LocalFileSystem

    if not is_url(runs):
        return LocalFileSystem(), str(Path(runs).expanduser().absolute())
    return open_storage(runs)


def _free_folder(into: str | Path, name: str) -> Path:
    """Return the folder that a run will be in, which must not be there yet."""
    target = Path(into).expanduser().absolute() / name
    if target.exists():
        raise RunError(f"{target} exists: give another folder, or move it away")
    return target


def _keep(target: Path, contents: Iterable[tuple[str, bytes]]) -> Path:
    """Write a run's files and its leaderboard to a folder that appears when it is whole."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        for path, content in contents:
            file = temporary / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (temporary / LEADERBOARD).write_text(to_csv(leaderboard(temporary)))
        temporary.rename(target)
    except OSError as error:
        if isinstance(error, DesiskyTuneError):
            raise
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
