"""What a search tells whoever watches it: small frozen records, one kind per event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from desisky_tune.search.figures import EngineFigures
    from desisky_tune.search.records import TrialRecord


@dataclass(frozen=True)
class DataReady:
    """The feature table stands and is split.

    Attributes
    ----------
    rows
        Rows by part of the split: ``{"train": n, "validation": n, "test": n}``.
    nights
        Distinct nights by part, likewise.
    v_derived
        True where the V magnitudes were derived from g and r, not observed.
    provenance
        Where the rows came from and what was dropped on the way.
    """

    rows: dict[str, int]
    nights: dict[str, int]
    v_derived: bool
    provenance: dict[str, Any]


@dataclass(frozen=True)
class SearchStarted:
    """Trials are about to run: those of the search, or (`stage`) its finalists."""

    name: str
    run_dir: Path | str
    trials: int
    epochs: int
    concurrency: int
    finished: int = 0
    dashboard_url: str | None = None
    stage: str = "search"
    trainings: int = 1


@dataclass(frozen=True)
class TrialReported:
    """A running trial reached a rung.

    `objective` is the best RMSE so far of that trial (mag, mean of the bands).
    """

    trial: int
    epochs: int
    objective: float


@dataclass(frozen=True)
class TrialFinished:
    """A trial ended; `best` is the record that leads the search now."""

    record: TrialRecord
    done: int
    total: int
    best: TrialRecord | None


@dataclass(frozen=True)
class EnginesReported:
    """What the engines did so far in this session: together, and each; every few seconds."""

    together: EngineFigures
    engines: tuple[EngineFigures, ...]


@dataclass(frozen=True)
class Note:
    """Something a person should know, in one line."""

    text: str


@dataclass(frozen=True)
class StorageChanged:
    """The run's storage begins to fail, or is back; `text` says so in one line."""

    text: str
    failing: bool


@dataclass(frozen=True)
class SearchFinished:
    """The winner is written and measured."""

    run_dir: Path
    checkpoint: Path
    seconds: float
    states: dict[str, int] = field(default_factory=dict)


Event = (
    DataReady
    | SearchStarted
    | TrialReported
    | TrialFinished
    | EnginesReported
    | Note
    | StorageChanged
    | SearchFinished
)
EventSink = Callable[[Event], None]
