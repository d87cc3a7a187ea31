"""The files of a trial: states while it is unfinished, and its best weights.

Whatever trains reads and writes them here, so that storage that fails for a while is waited for,
and a run on a URL has them too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desisky_tune.errors import CheckpointError, MissingFileError
from desisky_tune.search.backend import Assignment, Member
from desisky_tune.search.patience import (
    TRIAL_PATIENCE,
    Result,
    StorageWatch,
    patiently,
    require_run,
)

if TYPE_CHECKING:
    from desisky_tune.search.records import TrialRecord
    from desisky_tune.search.storage import RunMirror

#: A state, and the notes that were written with it.
Left = tuple[Any, dict[str, Any]]


class TrialFiles:
    """The files of a run's trials.

    Parameters
    ----------
    folder
        Where they lie.
    mirror
        Where a run on a URL has them: each is put there, and fetched when it is wanted.
    watch
        Told where storage fails, and when it is back.
    of_run
        Whether the folder lies in a run's, which all nodes share: without the run's `search.json`
        nothing is written. A run on a URL has its own folder on each node.
    """

    def __init__(
        self,
        folder: Path,
        mirror: RunMirror | None = None,
        watch: StorageWatch | None = None,
        *,
        of_run: bool = False,
    ) -> None:
        self._folder = folder
        self._mirror = mirror
        self._watch = None if watch is None else _Remembering(watch)
        self._search_json = folder.with_name("search.json") if of_run and mirror is None else None

    def discard_weights(self, trial: Assignment) -> None:
        """Remove the weights of an unfinished trial, which an interrupt left: not its last."""
        stale = checkpoint_path(self._folder, trial.number)
        self._patiently(functools.partial(stale.unlink, missing_ok=True))

    def write_weights(self, trial: Assignment, write: Callable[[Path], None]) -> None:
        """Keep the best weights of a trial."""
        self._put(checkpoint_path(self._folder, trial.number), write)

    def write_member(
        self, trial: Assignment, member: Member, write: Callable[[Path], None]
    ) -> None:
        """Keep the weights of one training of a trial."""
        self._put(member_path(self._folder, trial.number, member), write)

    def read_state(
        self, trial: Assignment, member: Member, read: Callable[[Path], Left]
    ) -> Left | None:
        """Return the state that a training left, with its notes; None without a whole one."""
        path = self._state(trial, member)

        def attempt() -> Left | None:
            if self._mirror is not None:
                self._mirror.fetch(path)
            try:
                return read(path)
            except (MissingFileError, CheckpointError):
                return None

        return self._patiently(attempt)

    def write_state(self, trial: Assignment, member: Member, write: Callable[[Path], None]) -> None:
        """Keep the state of a training."""
        self._put(self._state(trial, member), write)

    def _state(self, trial: Assignment, member: Member) -> Path:
        return state_path(self._folder, trial.number, member if trial.members else None)

    def _put(self, path: Path, write: Callable[[Path], None]) -> None:
        if self._mirror is not None:
            self._patiently(self._mirror.prepare)
        self._patiently(functools.partial(write, path))
        if self._mirror is not None:
            self._patiently(functools.partial(self._mirror.put, path))
        if self._watch is not None:
            self._watch.worked()

    def _patiently(self, action: Callable[[], Result]) -> Result:
        def attempt() -> Result:
            if self._search_json is not None:
                require_run(self._search_json)
            return action()

        return patiently(attempt, watch=self._watch, limit=TRIAL_PATIENCE)


class _Remembering:
    """Passes on that storage fails, and once that it works again: also after one gave up."""

    def __init__(self, watch: StorageWatch) -> None:
        self._watch = watch
        self._fails = False

    def failed(self, why: str) -> None:
        """Hear of an attempt that failed."""
        self._fails = True
        self._watch.failed(why)

    def worked(self) -> None:
        """Hear of one that succeeded."""
        if self._fails:
            self._fails = False
            self._watch.worked()


def state_path(folder: Path, number: int, member: Member | None = None) -> Path:
    """Where the state of an unfinished trial lies; of one of its members, where it has some."""
    which = "" if member is None else f"-fold{member.fold}-seed{member.seed}"
    return folder / f"{number:05d}{which}.state"


def checkpoint_path(folder: Path, number: int) -> Path:
    """Where the best weights of a trial lie."""
    return folder / f"{number:05d}.eqx"


def member_path(folder: Path, number: int, member: Member) -> Path:
    """Where the weights of one member of a trial lie, where they are kept."""
    return folder / f"{number:05d}-fold{member.fold}-seed{member.seed}.eqx"


def final_path(folder: Path, number: int) -> Path:
    """Where the weights of a trial's configuration lie that were fitted to all its folds' rows."""
    return folder / f"{number:05d}-final.eqx"


def final_paths(folder: Path) -> list[Path]:
    """Return the files of `final_path` that there are."""
    return sorted(folder.glob("*-final.eqx"))


def committee_path(folder: Path) -> Path:
    """Where the mean of the finalists' committee lies."""
    return folder / "committee.eqx"


def voice_path(folder: Path) -> Path:
    """Where the network lies that speaks for the classical model."""
    return folder / "classical.eqx"


def sweep(folder: Path, records: Collection[TrialRecord]) -> None:
    """Remove the states of finished trials: their weights have been kept, or are of no use."""
    # By the states that lie there, which are few; the records may be thousands.
    states = {record.number: record.state for record in records}
    for path in folder.glob("*.state"):
        number, _, member = path.stem.partition("-")
        if not number.isdigit() or int(number) not in states:
            continue
        kept = checkpoint_path(folder, int(number)).exists()
        if member or kept or states[int(number)] == "FAIL":
            path.unlink(missing_ok=True)
