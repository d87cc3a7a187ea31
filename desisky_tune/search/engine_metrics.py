"""An engine's figures as metrics of Ray: Prometheus and the dashboard read them."""

from __future__ import annotations

from desisky_tune.search.figures import EngineFigures


class EngineMetrics:
    """Sets Ray's metrics of one engine.

    Prometheus sees them as ``ray_desisky_tune_engine_*``, with the tags ``run`` and
    ``engine``.

    Parameters
    ----------
    run, engine
        The tags.
    """

    def __init__(self, run: str, engine: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._tags = {"run": run, "engine": engine}
        keys = tuple(self._tags)
        self._slots = Gauge(
            "desisky_tune_engine_slots", "Trials that the engine trains at a time.", keys
        )
        self._busy = Gauge("desisky_tune_engine_busy", "Trials that it is training now.", keys)
        self._rate = Gauge(
            "desisky_tune_engine_trials_per_minute", "Trials finished in a minute.", keys
        )
        self._trials = Counter("desisky_tune_engine_trials", "Trials finished.", keys)
        self._seconds = Counter(
            "desisky_tune_engine_seconds",
            "Time of the engine's slots by what it went into (s).",
            (*keys, "spent"),
        )
        self._told = {"trials": 0.0}

    def tell(self, figures: EngineFigures) -> None:
        """Set the metrics to the figures."""
        self._slots.set(figures.slots, self._tags)
        self._busy.set(figures.busy, self._tags)
        self._rate.set(figures.trials_per_minute, self._tags)
        self._count("trials", figures.trials, self._trials, self._tags)
        for spent in ("compiling", "training", "keeping", "waiting"):
            value = getattr(figures, spent)
            self._count(spent, value, self._seconds, {**self._tags, "spent": spent})

    def _count(self, name: str, value: float, counter: object, tags: dict[str, str]) -> None:
        """Raise a counter to a value; what falls back by a moment is told when it has risen."""
        risen = value - self._told.get(name, 0.0)
        if risen > 0:
            counter.inc(risen, tags)  # type: ignore[attr-defined]
            self._told[name] = value
