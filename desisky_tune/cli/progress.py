"""What a terminal shows while a search runs.

In a terminal: one line that is redrawn, with the trials done, the best RMSE so far, the
time left and the trials that run. Elsewhere: one plain line per event.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from desisky_tune.cli.console import configuration_text, duration, number, one_line, printable, say
from desisky_tune.search.events import (
    DataReady,
    EnginesReported,
    Event,
    EventSink,
    Note,
    SearchFinished,
    SearchStarted,
    StorageChanged,
    TrialFinished,
    TrialReported,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from desisky_tune.search.figures import EngineFigures

#: Seconds between two plain lines of the engines' figures.
FIGURES_PERIOD = 60.0


@contextmanager
def search_progress() -> Iterator[EventSink]:
    """Yield what draws a search's events on standard error, as that allows."""
    if not _is_terminal():
        yield LineProgress(say)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("trials"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        console=Console(stderr=True, highlight=False),
        transient=True,
    ) as bar:
        yield LiveProgress(bar)


def _is_terminal() -> bool:
    from os import environ

    return sys.stderr.isatty() and environ.get("TERM", "dumb") != "dumb"


class Tally:
    """Where a search stands, from the events so far.

    Parameters
    ----------
    clock
        Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._finished_before = 0
        self.epochs = 0
        self.done = 0
        self.total = 0
        self.best: float | None = None
        self.best_trial: int | None = None
        self.running: dict[int, int] = {}
        self.engines: EngineFigures | None = None

    def see(self, event: Event) -> None:
        """Take an event into account."""
        if isinstance(event, SearchStarted):
            self._started = self._clock()
            if event.stage != "search":
                # Figures over folds are not those of the search: what leads starts anew.
                self.best = self.best_trial = None
                self.running.clear()
            self._finished_before = self.done = event.finished
            self.total, self.epochs = event.trials, event.epochs
        elif isinstance(event, TrialReported):
            self.running[event.trial] = event.epochs
        elif isinstance(event, EnginesReported):
            self.engines = event.together
        elif isinstance(event, TrialFinished):
            self.running.pop(event.record.number, None)
            self.done, self.total = event.done, event.total
            if event.best is not None:
                self.best, self.best_trial = event.best.objective, event.best.number

    @property
    def seconds_left(self) -> float | None:
        """Time that the remaining trials will take, at the pace of this session's (s)."""
        finished = self.done - self._finished_before
        if finished <= 0:
            return None
        return (self._clock() - self._started) / finished * (self.total - self.done)

    def summary(self) -> str:
        """Best so far, and the time left."""
        parts = []
        if self.best is not None:
            parts.append(f"best RMSE {self.best:.4f} mag (trial {self.best_trial})")
        left = self.seconds_left
        if left is not None and self.done < self.total:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts) or "no trial finished yet"

    def running_text(self) -> str:
        """The trials that run, with the epochs that they have reported."""
        trials = sorted(self.running.items())
        return ", ".join(f"trial {trial} at epoch {epochs}" for trial, epochs in trials)

    def engines_text(self) -> str:
        """What the engines do, and what their time goes into; empty before they say so."""
        if self.engines is None:
            return ""
        parts = [f"{self.engines.busy} of {self.engines.slots} slots busy"]
        if self.engines.trials:
            parts.append(f"{self.engines.trials_per_minute:.1f} trials/min")
        shares = self.engines.shares().items()
        parts += [f"{name} {100 * share:.0f} %" for name, share in shares if share >= 0.005]
        return ", ".join(parts)


class LineProgress:
    """Writes one plain line per event."""

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._tally = Tally(clock)
        self._clock = clock
        self._next_figures = clock() + FIGURES_PERIOD

    def __call__(self, event: Event) -> None:
        """Write the line of an event."""
        self._tally.see(event)
        if isinstance(event, EnginesReported):
            if self._clock() < self._next_figures:
                return
            self._next_figures = self._clock() + FIGURES_PERIOD
        for line in event_lines(event, self._tally):
            self._write(line)


class LiveProgress:
    """Redraws one line in a terminal; what must not be lost is printed above it."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tally = Tally()
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Redraw, and print what is to stay."""
        self._tally.see(event)
        passing = isinstance(event, TrialReported | EnginesReported)
        if not passing and not _went_well(event):
            for line in event_lines(event, self._tally):
                self._bar.console.print(
                    printable(line), markup=False, highlight=False, soft_wrap=True
                )
        if isinstance(event, SearchStarted):
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task("trials", total=event.trials, status="")
        if self._task is None:
            return
        tally = self._tally
        parts = [tally.summary(), tally.engines_text(), tally.running_text()]
        status = "; ".join(part for part in parts if part)
        self._bar.update(
            self._task, completed=self._tally.done, total=self._tally.total, status=status
        )


def _went_well(event: Event) -> bool:
    return isinstance(event, TrialFinished) and event.record.state != "FAIL"


def event_lines(event: Event, tally: Tally) -> list[str]:
    """Return what there is to say of an event, a line each; `tally` has seen it."""
    if isinstance(event, DataReady):
        return data_lines(event)
    if isinstance(event, SearchStarted):
        return _started_lines(event)
    if isinstance(event, TrialReported):
        if event.epochs >= tally.epochs:
            return []  # the line of the finished trial follows at once
        return [f"trial {event.trial} at epoch {event.epochs}: RMSE {event.objective:.4f} mag"]
    if isinstance(event, TrialFinished):
        return [_finished_line(event, tally)]
    if isinstance(event, EnginesReported):
        return [f"engines: {tally.engines_text()}"]
    if isinstance(event, Note | StorageChanged):
        return [f"note: {one_line(event.text)}"]
    assert isinstance(event, SearchFinished)
    states = ", ".join(f"{count} {state}" for state, count in event.states.items() if count)
    return [f"search finished in {duration(event.seconds)}: {states}"]


def data_lines(event: DataReady) -> list[str]:
    """Return what the data are, what was dropped of them, and how they are split."""
    provenance = event.provenance
    lines = [
        f"data: {provenance.get('source')}, subset {provenance.get('subset')}: "
        f"{sum(event.rows.values())} exposures{removed_text(provenance)}",
        "split: "
        + ", ".join(
            f"{part} {count} exposures in {event.nights[part]} nights"
            for part, count in event.rows.items()
        ),
    ]
    if event.v_derived:
        lines.append("note: V is derived from g and r in this table; see g, r and z alone")
    return lines


def removed_text(provenance: dict[str, Any]) -> str:
    """Return how many rows were read, and what removed the others, as a clause."""
    removed = {name: count for name, count in provenance.get("removed", {}).items() if count}
    if not removed:
        return ""
    reasons = "; ".join(f"{name} {count}" for name, count in removed.items())
    return f" of {provenance.get('rows_read')} (removed: {reasons})"


def _started_lines(event: SearchStarted) -> list[str]:
    before = f", {event.finished} of them finished before" if event.finished else ""
    if event.stage != "search":
        return [
            f"{event.stage}: {event.trials} configurations, each trained {event.trainings} times "
            f"for {event.epochs} epochs{before}, {event.concurrency} at a time"
        ]
    lines = [
        f"search {event.name}: {event.trials} trials of up to {event.epochs} epochs{before}, "
        f"{event.concurrency} at a time, in {event.run_dir}"
    ]
    if event.dashboard_url:
        lines.append(f"Ray's dashboard: {event.dashboard_url}")
    return lines


def _finished_line(event: TrialFinished, tally: Tally) -> str:
    record = event.record
    if record.objective is None:
        outcome = f"{record.state}: {record.reason or 'no reason given'}"
    else:
        outcome = (
            f"{record.state} after {record.epochs} epochs, RMSE {number(record.objective)} mag"
        )
    return (
        f"[{event.done}/{event.total}] trial {record.number} {outcome} "
        f"({configuration_text(record.configuration)}; {duration(record.seconds)}); "
        f"{tally.summary()}"
    )


@contextmanager
def counter_progress(unit: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield what counts `(done, total)` in a terminal, and nothing elsewhere."""
    if not _is_terminal():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn(unit),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    ) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
