"""What the engines' time goes into: measured where it is spent, added up for a person."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

Spending = Literal["compiling", "training"]


class Meter:
    """Adds up what a backend spends its time on; any thread may write to it.

    Parameters
    ----------
    lanes
        Places for what is counted, as in `EngineFigures`.
    clock
        Seconds, monotonic.
    """

    def __init__(self, lanes: int = 1, clock: Callable[[], float] = time.perf_counter) -> None:
        self._lanes = lanes
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds = {"compiling": 0.0, "training": 0.0}
        self._under_way: dict[object, tuple[Spending, float]] = {}
        self._calls = 0
        self._keeping = 0.0
        self._kept_until = clock()

    @contextmanager
    def spending(self, what: Spending) -> Iterator[None]:
        """Count the time that the body takes, from its first moment on."""
        token = object()
        with self._lock:
            self._under_way[token] = what, self._keep()
        try:
            yield
        finally:
            with self._lock:
                now = self._keep()
                _, began = self._under_way.pop(token)
                self._seconds[what] += now - began

    @contextmanager
    def working(self) -> Iterator[None]:
        """Mark a trial as being in the backend's hands, whatever is done for it."""
        with self._lock:
            self._keep()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._keep()
                self._calls -= 1

    def keeping(self) -> float:
        """Return how long places stood empty while something else was done for a trial (s).

        What is done for one trial while others train in every place costs none of their time.
        """
        with self._lock:
            self._keep()
            return self._keeping

    def _keep(self) -> float:
        """Count the time since the last change; return the time."""
        now, busy = self._clock(), len(self._under_way)
        empty, beside = max(0, self._lanes - busy), max(0, self._calls - busy)
        self._keeping += min(empty, beside) * (now - self._kept_until)
        self._kept_until = now
        return now

    def add(self, what: Spending, seconds: float) -> None:
        """Count time that was measured elsewhere (s)."""
        with self._lock:
            self._seconds[what] += seconds

    def seconds(self) -> dict[str, float]:
        """Return what was counted so far (s), by name."""
        with self._lock:
            found, now = dict(self._seconds), self._clock()
            for what, began in self._under_way.values():
                found[what] += now - began
        return found


@dataclass(frozen=True)
class EngineFigures:
    """What one engine, or several together, did.

    Attributes
    ----------
    engine
        Its name.
    slots
        Trials that it trains at a time.
    busy
        How many it is training now.
    trials
        Trials that it has finished.
    lanes
        Places whose time is counted: threads of a CPU, 1 for a GPU that runs all its slots
        in one program.
    seconds
        Time that those places had (s): `lanes` times the time since it was ready.
    compiling, training
        What of it went into either (s).
    keeping
        What of it a place stood empty for while states, checkpoints or something else were
        made for a trial (s).
    """

    engine: str
    slots: int
    busy: int
    trials: int
    lanes: int
    seconds: float
    compiling: float
    training: float
    keeping: float

    @property
    def waiting(self) -> float:
        """Time in which a place had no trial (s)."""
        return max(0.0, self.seconds - self.compiling - self.training - self.keeping)

    @property
    def elapsed(self) -> float:
        """Time since it was ready (s)."""
        return self.seconds / self.lanes if self.lanes else 0.0

    @property
    def trials_per_minute(self) -> float:
        """Trials finished in a minute, since it was ready."""
        return 60 * self.trials / self.elapsed if self.elapsed > 0 else 0.0

    def shares(self) -> dict[str, float]:
        """Return the share of time compiling, training, keeping and waiting; they add up to 1."""
        parts = {name: getattr(self, name) for name in ("compiling", "training", "keeping")}
        # Work that began before the clock was read may exceed it by a moment.
        whole = max(self.seconds, sum(parts.values()))
        if whole <= 0:
            return {**dict.fromkeys(parts, 0.0), "waiting": 1.0}
        shares = {name: value / whole for name, value in parts.items()}
        return {**shares, "waiting": max(0.0, 1 - sum(shares.values()))}

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-able values."""
        content = asdict(self)
        for name, value in content.items():
            if isinstance(value, float):
                content[name] = round(value, 3)
        shares = {name: round(share, 4) for name, share in self.shares().items()}
        return {**content, "waiting": round(self.waiting, 3), "shares": shares}


def added(figures: Iterable[EngineFigures], name: str = "all") -> EngineFigures:
    """Return the figures of several engines together."""
    found = list(figures)

    def total(field: str) -> Any:
        return sum(getattr(each, field) for each in found)

    return EngineFigures(
        engine=name,
        slots=total("slots"),
        busy=total("busy"),
        trials=total("trials"),
        lanes=total("lanes"),
        seconds=float(total("seconds")),
        compiling=float(total("compiling")),
        training=float(total("training")),
        keeping=float(total("keeping")),
    )


@dataclass(frozen=True)
class SessionFigures:
    """What the engines of a session did, for `search.json`.

    Attributes
    ----------
    engines
        By engine.
    processes
        Processes that were started, by kind: ``engines``, ``trials``, ``dispatcher``.
    trials
        Trials that ended in the session.
    outages
        Outages of storage that ended in the session or just before it, and their time (s).
    """

    engines: tuple[EngineFigures, ...]
    processes: Mapping[str, int]
    trials: int
    outages: tuple[int, float] = (0, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-able values."""
        return {
            "trials": self.trials,
            "processes": dict(self.processes),
            "storage": {"outages": self.outages[0], "seconds": round(self.outages[1], 3)},
            "all": added(self.engines).as_dict(),
            "engines": [each.as_dict() for each in self.engines],
        }
