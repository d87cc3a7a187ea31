"""The exceptions of desisky_tune: one small tree, with the exit code of each branch.

A message is one line: what was given, what is allowed, and where.
"""

from __future__ import annotations

from pathlib import Path


class DesiskyTuneError(Exception):
    """A failure of ours: the command ends with exit code 1."""

    exit_code = 1


class InputError(DesiskyTuneError, ValueError):
    """Something the user gave cannot be used: exit code 2."""

    exit_code = 2


class DataError(InputError):
    """A catalogue, table or selection of rows cannot be used."""


class MissingFileError(DataError, FileNotFoundError):
    """A file that was named does not exist or cannot be read."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class SpaceError(InputError):
    """A search-space file, or an override of one, breaks a rule."""


class CheckpointError(InputError):
    """A checkpoint file cannot be trusted or does not fit."""


class RunError(InputError):
    """A run folder is missing, incomplete or of another kind."""


class ClusterError(InputError):
    """A cluster does not answer, refuses a request, or knows no such job: exit code 2."""


class DownloadError(DesiskyTuneError, OSError):
    """A file could not be fetched, or came with the wrong checksum: exit code 2."""

    exit_code = 2

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class StorageError(DesiskyTuneError, OSError):
    """A file could not be written (disk full, no permission): exit code 2."""

    exit_code = 2

    exit_code = 2

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class SearchError(DesiskyTuneError):
    """A search ended without a result."""


class EngineError(SearchError):
    """The processes that train are gone, and cannot be started again."""


class SearchInterrupted(KeyboardInterrupt):
    """A search was stopped before all its trials had run; it can be resumed."""

    def __init__(self, run_dir: Path, done: int, total: int) -> None:
        super().__init__(
            f"interrupted after {done} of {total} trials; "
            f"continue with 'desisky-tune resume {run_dir}'"
        )
        self.run_dir = run_dir
