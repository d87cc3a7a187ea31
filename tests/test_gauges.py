"""A search's metrics at a real Ray's Prometheus port, and its lines where there is no terminal."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path
from typing import Any

from desisky_tune.cli.progress import search_progress
from desisky_tune.search.events import (
    Event,
    Note,
    SearchStarted,
    StorageChanged,
    TrialFinished,
    TrialReported,
)
from desisky_tune.search.gauges import measured
from desisky_tune.search.records import TrialRecord, finish

CONFIGURATION = {
    "width": 8,
    "depth": 1,
    "learning_rate": 1e-2,
    "huber_delta": 0.25,
    "batch_size": 16,
}


def record(number: int, objective: float | None) -> TrialRecord:
    result = {"epochs": 9, "objective": objective, "best_epoch": 3, "rmse": {}, "seconds": 1.0}
    return finish(
        number=number,
        configuration=CONFIGURATION,
        result=result,
        max_epochs=9,
        reason=None if objective is not None else "killed",
    )


def scrape(ray: Any) -> dict[str, float]:
    """Our metrics at the Prometheus ports of a Ray: name and tags that matter -> value."""
    found = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        for line in text.splitlines():
            if not line.startswith("ray_desisky_tune_") or 'run="scraped"' not in line:
                continue
            name, tags, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
            state = re.search(r'state="(\w+)"', tags)
            found[name + (f" {state[1]}" if state else "")] = float(value)
    return found


def test_prometheus_has_the_trials_by_state_and_the_best_objective(ray_instance: Any) -> None:
    passed_on: list[Event] = []
    before = [record(0, 0.5), record(1, None)]
    with measured("scraped", 12, before, passed_on.append) as emit:
        best = record(2, 0.25)
        emit(TrialReported(3, 3, 0.4))
        emit(TrialFinished(best, 3, 12, best))
        emit(StorageChanged("storage fails", failing=True))
        expected = {
            "ray_desisky_tune_trials COMPLETE": 2.0,
            "ray_desisky_tune_trials PRUNED": 0.0,
            "ray_desisky_tune_trials FAIL": 1.0,
            "ray_desisky_tune_trials_running": 1.0,
            "ray_desisky_tune_trials_done": 3.0,
            "ray_desisky_tune_trials_total": 12.0,
            "ray_desisky_tune_best_objective": 0.25,
            "ray_desisky_tune_storage_failing": 1.0,
        }
        deadline = time.monotonic() + 60
        while (found := scrape(ray_instance)) != expected:
            assert time.monotonic() < deadline, found
            time.sleep(1.0)
    assert len(passed_on) == 3


def test_without_a_terminal_an_event_is_one_line_without_control_characters(
    capsys: Any, tmp_path: Path
) -> None:
    with search_progress() as emit:
        emit(SearchStarted("deep", tmp_path, trials=12, epochs=9, concurrency=2))
        emit(Note("a reason\x1b[31m with\tcontrols\r\nand a second line"))
        emit(TrialReported(3, 3, 0.4))
        emit(TrialFinished(record(2, 0.25), 1, 12, None))
        emit(StorageChanged("storage is back\r\nafter 3 s", failing=False))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 5
    assert err.endswith("\n")
    assert all(character.isprintable() for line in lines for character in line)
