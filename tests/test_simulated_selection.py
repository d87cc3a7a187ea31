"""The arithmetic of the benchmarks of the selection: regret, optimism, coverage, intervals."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Any:
    """The benchmark as a module; it finds its neighbours where it lies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("simulated_selection")
        for name in ("simulated_selection", "_simulated_tables", "_selecting", "_machine"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tables(script: Any) -> Any:
    """The module of its tables."""
    return sys.modules["_simulated_tables"]


def line(tables: Any, draw: int, better: float) -> dict[str, Any]:
    """A draw whose oracle is `better` (mag) than anything else in every band."""
    models = {name: [0.25, 0.25, 0.35, 0.35] for name in (*tables.LABELS, "winner_folds")}
    models |= {
        "default_folds": models["default"],
        "oracle": [0.25 - better] * 2 + [0.35 - better] * 2,
    }
    return {
        "draw": draw,
        "settings": {},
        "models": models,
        "promised": {promise: [0.2, 0.2, 0.3, 0.3] for _, promise, _, _ in tables.PROMISES},
        "covered": [0.85, 0.9, 0.95, 0.9],
        "stated": [0.9] * 4,
        "half_width": [0.4] * 4,
        "covered_by_rows": [0.8] * 4,
        "half_width_by_rows": [0.3] * 4,
        "noise": [0.1] * 4,
        "rows": {"exposures": 330, "nights": 26, "validation": 82}
        | {"validation_nights": 7, "truth": 4000, "truth_nights": 200},
        "seconds": 1.0,
    }


def test_regret_is_paired_by_draw(tables: Any) -> None:
    lines = [line(tables, draw, better) for draw, better in enumerate((0.01, 0.02, 0.03))]
    values = tables.differences(lines, "winner", "oracle")
    np.testing.assert_allclose(values, [0.01, 0.02, 0.03])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert f"| +0.0200 [{low:+.4f} to {high:+.4f}] |" in tables.regret_table(lines)


def test_optimism_is_what_came_minus_what_was_promised(tables: Any) -> None:
    lines = [line(tables, draw, 0.01) for draw in range(3)]
    for each in lines:
        each["promised"]["single"] = [0.1, 0.1, 0.2, 0.2]
    table = tables.optimism_table(lines)
    assert "| 0.2500 | 0.3000 | +0.0500 | +0.0500 to +0.0500 |" in table
    # The best single score promised 0.1 mag less than the default, and came to the same.
    chosen = "| 0.1500 | 0.3000 | +0.1500 | +0.1500 to +0.1500 | +0.1000 | +0.1000 to +0.1000 |"
    assert chosen in table


def test_coverage_counts_rows_by_band(script: Any, tables: Any) -> None:
    residual = np.array([[0.1, -0.1, 0.3, 0.0], [-0.3, 0.1, -0.3, 0.2]])
    assert script.covered(residual, np.full((2, 4), 0.2)) == [0.5, 1.0, 0.0, 1.0]
    table = tables.coverage_table([line(tables, draw, 0.01) for draw in range(2)])
    assert "| all | 90.0 |" in table


def test_the_oracle_and_the_middle_trial_go_by_the_mean_of_the_bands(script: Any) -> None:
    trials = {0: [0.4] * 4, 1: [0.1, 0.1, 0.1, 0.9], 2: [0.2] * 4, 3: [0.2] * 4, 4: [2.0] * 4}
    assert script.best_of(trials) == 2
    assert script.middle_of(trials) == trials[1]


def test_no_season_serves_twice(script: Any) -> None:
    seasons = [seed(draw) for draw in range(50) for seed in (script.sample_seed, script.truth_seed)]
    assert len(set(seasons)) == 100


def test_a_file_of_lines_survives_a_line_that_was_cut_off(
    script: Any, tables: Any, tmp_path: Path
) -> None:
    path = tmp_path / "lines.jsonl"
    whole = json.dumps(line(tables, 0, 0.01))
    path.write_text(f"{whole}\n{whole[:40]}")
    assert [each["draw"] for each in script.read_lines(path, {}, script.DRAW)] == [0]
    with pytest.raises(SystemExit, match="give another --out"):
        script.read_lines(path, {"trials": 5}, script.DRAW)
    assert script.report([], {}) == "no draw is complete yet"
