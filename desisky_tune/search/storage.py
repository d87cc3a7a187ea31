"""A run on a URL (``s3://``, ``gs://``, ``file://``): its files there, and a copy to work in.

Storage of objects can neither append to a file nor lock one. So a finished trial is an object
of its own, and so is a trial that was handed out::

    URL/<name>/
      search.json  features.parquet
      ledger/00017.json      the record of a finished trial: the truth that a resume goes by
      finalists/00040.json   likewise, of a finalist
      started/00017.json     the configuration of a trial that was handed out
      trials/                states and checkpoints, put there by whoever trains
      ledger.jsonl  trials.parquet  curves.parquet  evaluation.json  best/  ...   at the end

Everything else (the study, what Ray Tune writes) is made anew from these wherever the run is
taken up. The copy is a folder of one process, on its own machine, and goes with it.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desisky_tune.data.remote import open_storage, refuse_secrets
from desisky_tune.errors import RunError, StorageError
from desisky_tune.files import atomic_path, leads_inside

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

#: What a run is opened with; states and checkpoints are fetched when they are wanted.
_OPENED_WITH = (
    "search.json",
    "features.parquet",
    "trials.parquet",
    "curves.parquet",
    "evaluation.json",
    "best/",
    "report/",
    "ensemble/",
    "out_of_fold",
    "pretrained/given",
    "pretrained/simulated",
)


#: An object that is put and removed again; no listing has it, as none has unfinished files.
_PROBE = ".storage-probe.part"


@dataclass(frozen=True)
class RunMirror:
    """The files of a run on a URL.

    Attributes
    ----------
    url
        Of the run.
    folder
        Of its copy on this machine.
    """

    url: str
    folder: Path

    @classmethod
    def of(cls, runs: str, name: str) -> RunMirror:
        """Return the mirror of a run, by the URL that holds the runs and its name.

        Raises
        ------
        DataError
            When the URL holds a secret, or nothing opens it.
        """
        refuse_secrets(runs)
        url = f"{runs.rstrip('/')}/{name}"
        key = hashlib.sha256(url.encode()).hexdigest()[:16]
        base = Path(tempfile.gettempdir()) / f"desisky-tune-{os.getuid()}"
        _make_private(base)
        root = base / f"{key}-{secrets.token_hex(4)}"
        (root / name).mkdir(parents=True)
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        return cls(url, root / name)

    def prepare(self) -> None:
        """Make the place of the copy on this machine, which may be another than the search's.

        Raises
        ------
        RunError
            When it is not this user's alone.
        StorageError
            When it cannot be made.
        """
        _make_private(self.folder.parents[1])

    def put(self, path: Path) -> None:
        """Copy a file of the folder to its place on the URL, where it appears whole.

        Raises
        ------
        StorageError
            When it cannot be written.
        """
        self.put_bytes(path.relative_to(self.folder).as_posix(), path.read_bytes())

    def put_json(self, place: str, content: Mapping[str, Any] | str) -> None:
        """Write a JSON object."""
        text = content if isinstance(content, str) else json.dumps(dict(content), allow_nan=False)
        self.put_bytes(place, f"{text}\n".encode())

    def put_bytes(self, place: str, content: bytes) -> None:
        """Write an object whole."""
        with self._opened(place, "written") as (files, target):
            if _has_folders(files):
                files.create_dir(target.rpartition("/")[0], recursive=True)
                with files.open_output_stream(f"{target}.part") as stream:
                    stream.write(content)
                files.move(f"{target}.part", target)
            else:
                # An object appears when it is closed.
                with files.open_output_stream(target) as stream:
                    stream.write(content)

    def fetch(self, path: Path) -> bool:
        """Copy a file from the URL to its place in the folder, unless it is there already.

        Returns
        -------
        bool
            Whether it is in the folder now.
        """
        self.prepare()
        if path.exists():
            return True
        place = path.relative_to(self.folder).as_posix()
        content = self.read(place)
        if content is None:
            return False
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        return True

    def read(self, place: str) -> bytes | None:
        """Return the content of an object; None where there is none."""
        from pyarrow.fs import FileType

        with self._opened(place, "read") as (files, source):
            if files.get_file_info(source).type != FileType.File:
                return None
            with files.open_input_stream(source) as stream:
                return bytes(stream.read())

    def places(self, under: str = "") -> list[str]:
        """Return the objects of the run, sorted; those below a folder of it.

        Whoever may write there chooses the names: one that leads out of the run is left out.
        """
        from pyarrow.fs import FileSelector, FileType

        with self._opened(under, "listed") as (files, root):
            selector = FileSelector(root.rstrip("/"), recursive=True, allow_not_found=True)
            found = [info.path for info in files.get_file_info(selector)
                     if info.type == FileType.File]  # fmt: skip
            start = len(root.rstrip("/")) + 1
        prefix = f"{under.rstrip('/')}/" if under else ""
        return sorted(
            prefix + path[start:]
            for path in found
            if not path.endswith(".part") and leads_inside(path[start:])
        )

    def remove(self, place: str) -> None:
        """Remove an object."""
        with self._opened(place, "removed") as (files, target):
            files.delete_file(target)

    def check(self) -> None:
        """See whether objects can be written where the run is.

        Raises
        ------
        StorageError
            When they cannot, or the run is not there.
        """
        from pyarrow.fs import FileType

        with self._opened("search.json", "read") as (files, source):
            there = files.get_file_info(source).type == FileType.File
        if not there:
            raise StorageError(f"{self.url}/search.json is gone")
        self.put_bytes(_PROBE, b"can be written\n")
        self.remove(_PROBE)

    def forget_states(self, finished: Iterable[int]) -> None:
        """Remove, when a search has ended, the states that no weights will be made from."""
        places = set(self.places("trials"))
        numbers = {f"{number:05d}" for number in finished}
        for place in sorted(places):
            number, _, member = Path(place).stem.partition("-")
            kept = number in numbers and f"trials/{number}.eqx" in places
            # Of trials of several members, and of finalists, no weights are made from states.
            if place.endswith(".state") and (member or kept):
                self.remove(place)

    def pull(self) -> None:
        """Fill the folder with what a run is opened with; the ledger is made from its objects.

        Raises
        ------
        RunError
            When there is no run.
        StorageError
            When it cannot be read.
        """
        places = self.places()
        if "search.json" not in places:
            raise RunError(f"{self.url} is not a run of desisky-tune: it has no search.json")
        for place in places:
            if place.startswith(_OPENED_WITH):
                self.fetch(self.folder / place)
        for kind in ("ledger", "finalists", "started"):
            lines = [self.read(place) or b"" for place in places if place.startswith(f"{kind}/")]
            if kind != "started":
                lines.sort(key=_ended)
            with atomic_path(self.folder / f"{kind}.jsonl") as temporary:
                temporary.write_bytes(b"".join(lines))

    @contextmanager
    def _opened(self, place: str, done: str) -> Iterator[tuple[FileSystem, str]]:
        try:
            files, root = open_storage(self.url)
            yield files, f"{root.rstrip('/')}/{place}".rstrip("/")
        except Exception as error:  # each kind of storage has exceptions of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise StorageError(f"{self.url}/{place} cannot be {done}: {reason}") from error


def _make_private(folder: Path) -> None:
    """Make a folder that only this user may write, or see that what is there is one.

    Raises
    ------
    RunError
        When it is another user's, others may write it, or it is a link.
    StorageError
        When it cannot be made.
    """
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        found = folder.lstat()
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror or error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RunError(
            f"{folder} must be a folder that only you can write: remove it, or set TMPDIR to "
            "have another"
        )


def split_run_url(url: str) -> tuple[str, str]:
    """Return the URL that holds the runs, and the name of the run."""
    runs, _, name = url.rstrip("/").rpartition("/")
    return runs, name


def _has_folders(files: FileSystem) -> bool:
    """Whether a file that is being written can be seen before it is whole."""
    kind = str(files.type_name)
    return kind in ("local", "hdfs") or kind.startswith(("py::fsspec+file", "py::fsspec+('file"))


def _ended(line: bytes) -> float:
    return float(json.loads(line)["ended"])
