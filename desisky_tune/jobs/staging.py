"""What travels with a job: the resolved space, this package, and nothing of the data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

import desisky_tune
from desisky_tune.errors import InputError
from desisky_tune.search.space import SearchSpec, resolved_dict
from desisky_tune.search.space_file import spaces_folder
from desisky_tune.search.stopping import GRACE_SECONDS

#: The space file in a job's working directory.
SPACE_FILE = "space.yaml"

#: How long a job that is stopped has to finish its rungs, write and go (s); then it is killed.
STOP_SECONDS = round(GRACE_SECONDS) + 60

#: Set for the processes of a job: plain lines in its log, whatever it thinks of its output, and
#: what the one that stops it reads, which waits 3 s by default.
JOB_ENVIRONMENT: Mapping[str, str] = {
    "NO_COLOR": "1",
    "TERM": "dumb",
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
}

_HEADER = "# The search of this job, every field resolved by desisky-tune submit.\n"


@contextmanager
def working_directory(spec: SearchSpec | None, *, ship: bool) -> Iterator[Path]:
    """Yield a temporary folder with what a job needs, to be uploaded by Ray.

    Parameters
    ----------
    spec
        Written as `SPACE_FILE`; None for a job that searches nothing.
    ship
        Whether this package goes along. It then comes before one that the cluster's nodes
        have, so that the job runs the code that checked it.
    """
    with TemporaryDirectory(prefix="desisky-tune-") as name:
        folder = Path(name)
        if spec is not None:
            text = yaml.safe_dump(resolved_dict(spec), sort_keys=False)
            (folder / SPACE_FILE).write_text(_HEADER + text)
        if ship:
            _copy_package(folder / "desisky_tune")
        yield folder


def runtime_environment(folder: Path, *, pip: bool) -> dict[str, Any]:
    """Return the runtime environment of a job whose working directory is `folder`.

    Parameters
    ----------
    folder
        From `working_directory`.
    pip
        Let the nodes install the dependencies, at the versions that are installed here.

    Raises
    ------
    InputError
        When `pip` is asked for and this package is not installed here.
    """
    environment: dict[str, Any] = {
        "working_dir": str(folder),
        "env_vars": dict(JOB_ENVIRONMENT),
    }
    if pip:
        environment["pip"] = pinned_requirements()
    return environment


def pinned_requirements() -> list[str]:
    """Return the dependencies of this package as ``name==version``, as installed here.

    Ray is left out: a job runs on the Ray that its cluster runs on.

    Raises
    ------
    InputError
        When the package, or one of its dependencies, is not installed here.
    """
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in requires("desisky_tune") or []]
        wanted = [
            each
            for each in needed
            if each.name != "ray" and (each.marker is None or each.marker.evaluate({"extra": ""}))
        ]
        return [f"{each.name}=={version(each.name)}" for each in wanted]
    except PackageNotFoundError as error:
        raise InputError(
            f"--pip pins the versions installed here, and {error.name} is not installed: "
            "'pip install' this project first"
        ) from error


def _copy_package(target: Path) -> None:
    source = Path(desisky_tune.__file__).parent
    unwanted = shutil.ignore_patterns("__pycache__", "*.py[co]", ".*")
    shutil.copytree(source, target, ignore=unwanted)
    # In a checkout the space files stand beside the package, not in it.
    if not (target / "search_spaces").is_dir():
        shutil.copytree(spaces_folder(), target / "search_spaces", ignore=unwanted)
