"""A run on disk: which file lies where, and the specification that opens it.

::

    runs/<name>/
      search.json        the resolved specification, data, split (EXPIDs), versions
      features.parquet   the feature table that the run was made with
      ledger.jsonl       one line per finished trial: the truth that a resume goes by
      finalists.jsonl    likewise, of the finalists
      started.jsonl      one line per trial handed out, so that a resume repeats it
      study.db           the Optuna study
      trials/            a checkpoint per trial (and its state while it is unfinished)
      trials.parquet  curves.parquet  evaluation.json
      out_of_fold.parquet  predictions of the finalists' folds, where there are finalists
      best/<name>.eqx    what the search exports: the winner, or the finalists' committee
      pretrained/        the weights that trials began with, where they were not drawn
      ensemble/          the best finalists' members and their index
      tune/              what Ray Tune writes
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desisky_tune.data.remote import is_url, refuse_secrets
from desisky_tune.errors import RunError
from desisky_tune.files import append_line, atomic_open
from desisky_tune.search.storage import RunMirror, split_run_url
from desisky_tune.search.trial_files import committee_path, final_paths, voice_path

if TYPE_CHECKING:
    from desisky_tune.search.records import TrialRecord

#: Version of the layout and of `search.json`.
SCHEMA = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def valid_run_name(name: str) -> str:
    """Return `name` when it can name a run, that is, one folder and nothing above it.

    Raises
    ------
    RunError
        When it holds anything but letters, digits, '.', '_' and '-', starts with one
        of the last three, or is longer than 100 characters.
    """
    if not _NAME.fullmatch(name):
        raise RunError(
            f"run name {name!r}: allowed are letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit, at most 100 characters"
        )
    return name


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes
    ----------
    path
        The folder.
    mirror
        Where the run lies on a URL, of which the folder is a copy; None for a folder.
    """

    path: Path
    mirror: RunMirror | None = None

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.path.name

    @property
    def search_json(self) -> Path:
        """The resolved specification."""
        return self.path / "search.json"

    @property
    def features(self) -> Path:
        """The feature table."""
        return self.path / "features.parquet"

    @property
    def ledger(self) -> Path:
        """One line per finished trial."""
        return self.path / "ledger.jsonl"

    @property
    def finalists(self) -> Path:
        """One line per finalist that was trained once more."""
        return self.path / "finalists.jsonl"

    @property
    def started(self) -> Path:
        """One line per trial that was handed out."""
        return self.path / "started.jsonl"

    @property
    def study(self) -> Path:
        """The Optuna study (sqlite)."""
        return self.path / "study.db"

    @property
    def trials(self) -> Path:
        """The folder of the trials' checkpoints and states."""
        return self.path / "trials"

    @property
    def tune(self) -> Path:
        """Where Ray Tune writes."""
        return self.path / "tune"

    @property
    def pretrained(self) -> Path:
        """The folder of the weights that trials began with."""
        return self.path / "pretrained"

    @property
    def evaluation(self) -> Path:
        """The winner's and the baselines' figures."""
        return self.path / "evaluation.json"

    @property
    def out_of_fold(self) -> Path:
        """Predictions of the winner and the baselines on the finalists' folds."""
        return self.path / "out_of_fold.parquet"

    @property
    def ensemble(self) -> Path:
        """The folder of the ensemble."""
        return self.path / "ensemble"

    @property
    def best(self) -> Path:
        """The winner's checkpoint."""
        return self.path / "best" / f"{self.name}.eqx"

    @classmethod
    def create(cls, runs: str | Path, name: str, *, exact: bool) -> RunFolder:
        """Make the folder of a new run.

        Parameters
        ----------
        runs
            The folder that holds the runs.
        name
            The run's name.
        exact
            True: a run of that name must not exist yet. False: `name-2`, `name-3`, ...
            is taken where it does.

        Raises
        ------
        RunError
            When the name is not allowed, taken (`exact`), or the folder cannot be made.
        """
        valid_run_name(name)
        if is_url(runs):
            return cls._create_on(str(runs), name, exact=exact)
        root = Path(runs).expanduser().absolute()
        attempt = 1
        while True:
            path = root / (name if attempt == 1 else f"{name}-{attempt}")
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                if path.is_dir() and not cls(path)._begun():
                    return cls(path)
                if exact:
                    raise RunError(
                        f"{path} exists: choose another --name, or continue it with "
                        f"'desisky-tune resume {path}'"
                    ) from None
                attempt += 1
            except OSError as error:
                raise RunError(f"cannot make {path}: {error.strerror or error}") from error

    @classmethod
    def _create_on(cls, runs: str, name: str, *, exact: bool) -> RunFolder:
        attempt = 1
        while True:
            chosen = name if attempt == 1 else f"{name}-{attempt}"
            mirror = RunMirror.of(runs, chosen)
            if mirror.read("search.json") is None:
                return cls(mirror.folder, mirror)
            if exact:
                raise RunError(
                    f"{mirror.url} exists: choose another --name, or continue it with "
                    f"'desisky-tune resume {mirror.url}'"
                )
            attempt += 1

    @property
    def place(self) -> Path | str:
        """How the run is called in a command: its folder, or its URL."""
        return self.path if self.mirror is None else self.mirror.url

    def kept(self, *paths: Path) -> None:
        """Put files of the folder to where the run lies, where that is a URL."""
        if self.mirror is not None:
            for path in paths:
                self.mirror.put(path)

    def publish(self, records: Iterable[TrialRecord]) -> None:
        """Put what a finished search has made to where the run lies, where that is a URL."""
        if self.mirror is None:
            return
        made = [self.ledger, self.search_json, *self.path.glob("*.parquet"), self.finalists]
        made += [committee_path(self.trials), voice_path(self.trials)]
        made += final_paths(self.trials)
        made += [*self.path.glob("best/*"), *self.path.glob("ensemble/*")]
        # The evaluation last: where it is, all is.
        self.kept(*(path for path in (*made, self.evaluation) if path.is_file()))
        self.mirror.forget_states(record.number for record in records)

    def fetched(self, *paths: Path) -> None:
        """Bring files into the folder, where the run lies on a URL that has them."""
        if self.mirror is not None:
            for path in paths:
                self.mirror.fetch(path)

    def _begun(self) -> bool:
        """Whether more stands here than a search leaves that is killed at its start."""
        early = (".lock", self.pretrained.name)
        return any(
            entry.name not in early and entry.suffix != self.features.suffix
            for entry in self.path.iterdir()
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the lock goes with the process.

        Raises
        ------
        RunError
            When another process holds it.
        """
        with open(self.path / ".lock", "a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path} is in use by another process") from None
            except OSError:
                pass  # a file system without locks
            yield

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run.

        Raises
        ------
        RunError
            When there is no run at `path`.
        DataError
            When it is a URL that holds a secret, or that nothing opens.
        """
        if is_url(path):
            refuse_secrets(str(path))
            runs, name = split_run_url(str(path))
            mirror = RunMirror.of(runs, valid_run_name(name))
            mirror.pull()
            return cls(mirror.folder, mirror)
        folder = cls(Path(path).expanduser().absolute())
        if not folder.search_json.is_file():
            what = "no such folder" if not folder.path.is_dir() else "it has no search.json"
            raise RunError(f"{folder.path} is not a run of desisky-tune: {what}")
        return folder

    def read_search(self) -> dict[str, Any]:
        """Return the content of `search.json`.

        Raises
        ------
        RunError
            When it is not JSON, or of a schema that this version does not know.
        """
        try:
            content = json.loads(self.search_json.read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"{self.search_json} cannot be read: {error}") from error
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise RunError(
                f"{self.search_json}: schema {schema!r} is not known; this version reads {SCHEMA}"
            )
        missing = [key for key in ("spec", "data", "split") if key not in content]
        if missing:
            raise RunError(f"{self.search_json}: lacks {', '.join(missing)}")
        return content

    def write_search(self, content: Mapping[str, Any]) -> None:
        """Write `search.json` whole; on a URL first, so that the copy is never ahead of it."""
        whole = {"schema": SCHEMA, **content}
        if self.mirror is not None:
            text = json.dumps(whole, indent=1, allow_nan=False)
            self.mirror.put_json(self.search_json.name, text)
        write_json(self.search_json, whole)

    def note_started(self, number: int, configuration: Mapping[str, Any]) -> None:
        """Remember that a trial was handed out."""
        line = json.dumps({"number": number, "configuration": dict(configuration)})
        if self.mirror is not None:
            self.mirror.put_json(f"started/{number:05d}.json", line)
        append_line(self.started, line)

    def read_started(self) -> dict[int, dict[str, Any]]:
        """Return the trials that were handed out: number -> configuration.

        A last line that was cut off by a kill counts as not written.
        """
        if not self.started.exists():
            return {}
        started: dict[int, dict[str, Any]] = {}
        for line in self.started.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                started[int(entry["number"])] = dict(entry["configuration"])
            except (ValueError, KeyError, TypeError):
                continue
        return started


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole, indented, with a final newline."""
    with atomic_open(path, "w") as stream:
        json.dump(content, stream, indent=1, allow_nan=False)
        stream.write("\n")
