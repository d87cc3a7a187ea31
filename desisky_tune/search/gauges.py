"""How a search stands, as metrics of the Ray that it runs on.

Ray serves them at each node's Prometheus port with ``ray_`` before their names::

    ray_desisky_tune_trials{run="deep", state="COMPLETE"}     trials by state
    ray_desisky_tune_trials_running{run="deep"}               trials that run now
    ray_desisky_tune_trials_done{run="deep"}                  trials with a record
    ray_desisky_tune_trials_total{run="deep"}                 trials in all
    ray_desisky_tune_best_objective{run="deep"}               lowest RMSE so far (mag)
    ray_desisky_tune_storage_failing{run="deep"}              1 while the run's storage fails
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from desisky_tune.search.events import (
    Event,
    EventSink,
    StorageChanged,
    TrialFinished,
    TrialReported,
)
from desisky_tune.search.records import STATES, TrialRecord, best_record

#: Ray drops a gauge that nobody has set for 20 s.
REFRESH_SECONDS = 5.0

PREFIX = "desisky_tune_"


class SearchGauges:
    """Keeps the metrics of one search up to date.

    Parameters
    ----------
    run
        Its name, the tag of every metric.
    total
        Trials in all.
    records
        Trials that finished in earlier sessions.
    """

    def __init__(self, run: str, total: int, records: Iterable[TrialRecord] = ()) -> None:
        from ray.util.metrics import Gauge

        self._states = dict.fromkeys(STATES, 0)
        self._running: set[int] = set()
        self._best: float | None = None
        self._failing = False
        self._total = total
        known = list(records)
        for record in known:
            self._states[record.state] += 1
        if (best := best_record(known)) is not None:
            self._best = best.objective
        self._lock = threading.Lock()
        self._by_state = Gauge(
            f"{PREFIX}trials", description="Finished trials by state", tag_keys=("run", "state")
        )
        self._plain = {
            name: Gauge(f"{PREFIX}{name}", description=text, tag_keys=("run",))
            for name, text in (
                ("trials_running", "Trials that have reported and not ended"),
                ("trials_done", "Trials with a record"),
                ("trials_total", "Trials of the whole search"),
                ("best_objective", "Lowest validation RMSE of a complete trial (mag)"),
                ("storage_failing", "1 while the run's storage fails, else 0"),
            )
        }
        for gauge in (self._by_state, *self._plain.values()):
            gauge.set_default_tags({"run": run})

    def __call__(self, event: Event) -> None:
        """Take an event into account."""
        with self._lock:
            if isinstance(event, TrialReported):
                self._running.add(event.trial)
            elif isinstance(event, TrialFinished):
                self._running.discard(event.record.number)
                self._states[event.record.state] += 1
                self._best = None if event.best is None else event.best.objective
            elif isinstance(event, StorageChanged):
                self._failing = event.failing
            else:
                return
        self.refresh()

    def refresh(self) -> None:
        """Set every metric to what it is."""
        with self._lock:
            for state, count in self._states.items():
                self._by_state.set(count, tags={"state": state})
            values = {
                "trials_running": len(self._running),
                "trials_done": sum(self._states.values()),
                "trials_total": self._total,
                "best_objective": self._best,
                "storage_failing": int(self._failing),
            }
            for name, value in values.items():
                if value is not None:
                    self._plain[name].set(value)


@contextmanager
def measured(
    run: str, total: int, records: Iterable[TrialRecord], emit: EventSink
) -> Iterator[EventSink]:
    """Yield a sink that passes events on to `emit` and to the metrics of the run.

    The metrics stand until the way out, also while nothing happens for a long time.
    """
    gauges = SearchGauges(run, total, records)
    over = threading.Event()

    def keep() -> None:
        gauges.refresh()
        while not over.wait(REFRESH_SECONDS):
            gauges.refresh()

    keeper = threading.Thread(target=keep, name="desisky-tune-metrics", daemon=True)
    keeper.start()

    def both(event: Event) -> None:
        gauges(event)
        emit(event)

    try:
        yield both
    finally:
        over.set()
        keeper.join()
