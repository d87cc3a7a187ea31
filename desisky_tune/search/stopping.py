"""Signals that end a search early: what has begun is written, and a resume goes on from it.

The first SIGTERM (a spot machine's or Slurm's notice) or SIGINT (Ctrl-C) lets each running
trial finish the rung that it is in, for a while; a second one ends the search at once. Either
way the run can be resumed. Before the first trial and after the last there is no rung to wait
for, and the first signal ends the search at once too.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from desisky_tune.errors import DesiskyTuneError, SearchInterrupted
from desisky_tune.ray_session import cancel_abort

#: How long trials may take to finish their rungs (s): less than the notice of two minutes that
#: a spot machine gives, and that ``deploy/slurm.sh`` asks for.
GRACE_SECONDS = 60.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class StopRequest:
    """What signals have asked of a search so far.

    Attributes
    ----------
    asked
        Number of the first signal that came; None while none has.
    run_dir
        The run (its folder or URL), once there is something to resume.
    grace
        How long trials may take to finish their rungs after the first signal (s).
    """

    asked: int | None = None
    run_dir: Path | str | None = None
    grace: float = GRACE_SECONDS
    _waits: bool = False
    _deadline: float = 0.0
    _running: set[int] = field(default_factory=set)
    _awaited: set[int] = field(default_factory=set)

    @property
    def terminated(self) -> bool:
        """Whether the machine's owner, not the search's, wants it to end: SIGTERM."""
        return self.asked == signal.SIGTERM

    @property
    def name(self) -> str:
        """What came, as a person says it."""
        return "SIGTERM" if self.terminated else "Ctrl-C"

    def listen(self) -> None:
        """Take the signals, also from who has taken them since: `ray.init` takes SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._receive)

    @contextmanager
    def finishing_rungs(self) -> Iterator[None]:
        """Let the first signal inside wait for the rungs of the trials that run."""
        self._waits, self._running = True, set()
        try:
            yield
        finally:
            self._waits = False

    def began(self, number: int) -> None:
        """Take note that a trial runs."""
        self._running.add(number)

    def reported(self, number: int) -> None:
        """Take note that a trial has come to the end of a rung."""
        self._awaited.discard(number)

    def ended(self, number: int) -> None:
        """Take note that a trial runs no longer."""
        self._running.discard(number)
        self._awaited.discard(number)

    @property
    def is_due(self) -> bool:
        """Whether the search was asked to end, and has nothing to wait for any more."""
        return self.asked is not None and (not self._awaited or time.monotonic() >= self._deadline)

    def interruption(self, done: int | None = None, total: int | None = None) -> SearchInterrupted:
        """Return what the search is to raise."""
        return SearchInterrupted(self.run_dir, done, total, terminated=self.terminated)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        cancel_abort()
        first = self.asked is None
        if first:
            self.asked = number
            self._deadline = time.monotonic() + self.grace
            self._awaited = set(self._running)
        if not (first and self._waits):
            raise self.interruption()


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Yield what SIGTERM and SIGINT ask for; the handlers before come back on the way out.

    Outside the main thread nothing is taken: Python gives signals to that one alone.

    Raises
    ------
    SearchInterrupted
        In place of a bare KeyboardInterrupt from inside, of the SystemExit that Ray's own
        handler of SIGTERM raises while Ray starts, and of what a library makes of a signal that
        came while it was at work.
    """
    request = StopRequest()
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS} if in_main else {}
    try:
        request.listen()
        yield request
    except (SearchInterrupted, DesiskyTuneError):
        raise
    except KeyboardInterrupt as stop:
        raise request.interruption() from stop
    except Exception as fault:
        if request.asked is None:
            raise
        raise request.interruption() from fault
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        cancel_abort()
        request.asked = request.asked or signal.SIGTERM
        raise request.interruption() from end
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python, and cannot be set from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
