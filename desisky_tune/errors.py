"""The exceptions of desisky_tune: one small tree, with the exit code of each branch.

A message is one line: what was given, what is allowed, and where.
"""

from __future__ import annotations

from pathlib import Path

#: Exit code of a search that was stopped by Ctrl-C.
INTERRUPTED = 130

#: Exit code of a search that cannot go on now and wants to be resumed (EX_TEMPFAIL).
RESUME_ME = 75


class DesiskyTuneError(Exception):
    """A failure of ours: the command ends with exit code 1."""

    exit_code = 1


class InputError(DesiskyTuneError, ValueError):
    """Something the user gave cannot be used: exit code 2."""

    exit_code = 2


class DataError(InputError):
    """A catalogue, table or selection of rows cannot be used."""


class _PlainOSError(OSError):
    """An `OSError` that is its message, not "[Errno ...]"."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingFileError(DataError, _PlainOSError, FileNotFoundError):
    """A file that was named does not exist or cannot be read."""


class SpaceError(InputError):
    """A search-space file, or an override of one, breaks a rule."""


class CheckpointError(InputError):
    """A checkpoint file cannot be trusted or does not fit."""


class RunError(InputError):
    """A run folder is missing, incomplete or of another kind."""


class ClusterError(InputError):
    """A cluster does not answer, refuses a request, or knows no such job: exit code 2."""


class DownloadError(DesiskyTuneError, _PlainOSError):
    """A file could not be fetched, or came with the wrong checksum: exit code 2."""

    exit_code = 2


class StorageError(DesiskyTuneError, _PlainOSError):
    """A file could not be written (disk full, no permission): exit code 2."""

    exit_code = 2


class StorageLostError(StorageError):
    """The files of a run that had begun could not be written for long: exit code 75."""

    exit_code = RESUME_ME


class SearchError(DesiskyTuneError):
    """A search ended without a result."""


class EngineError(SearchError):
    """The processes that train are gone, and cannot be started again."""


class DispatcherError(SearchError):
    """The process that spreads trials over engines is gone: a new session has to begin."""


class SearchInterrupted(KeyboardInterrupt):
    """A search was stopped before all its trials had run; it can be resumed.

    Parameters
    ----------
    run_dir
        The run; None where it had not begun, so that there is nothing to resume.
    done, total
        Trials with a record, and trials in all, where they are known.
    terminated
        True where it was asked to end from outside (SIGTERM), and wants to be resumed.
    """

    def __init__(
        self,
        run_dir: Path | str | None,
        done: int | None = None,
        total: int | None = None,
        *,
        terminated: bool = False,
    ) -> None:
        how = "stopped by SIGTERM" if terminated else "interrupted"
        after = "" if done is None else f" after {done} of {total} trials"
        then = (
            "nothing had begun"
            if run_dir is None
            else f"continue with 'desisky-tune resume {run_dir}'"
        )
        super().__init__(f"{how}{after}; {then}")
        self.run_dir = run_dir
        self.exit_code = RESUME_ME if terminated else INTERRUPTED
