"""The main job, and the table that it ends with: SV1 exposures, split by night.

Prints, in Markdown, the RMSE of the winner, of the documented default trained alike, of the
ensemble, the classical model and the constant, on the finalists' folds (or the validation rows,
without finalists) and the test rows, for one search or for several seeds of the split:

    python benchmarks/sv1_search.py
    python benchmarks/sv1_search.py --split-seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from typing import Any

from _machine import describe

from desisky_tune.data.columns import BANDS
from desisky_tune.ray_session import ray_session
from desisky_tune.search.run import run_search
from desisky_tune.search.space import load_spec

LABELS = {
    "winner": "winner",
    "alone": "winner's configuration alone",
    "default": "documented default",
    "ensemble": "ensemble of the finalists",
    "classical": "classical model",
    "constant": "constant",
}


def main() -> None:
    """Run the searches and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="quick")
    parser.add_argument("--split-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    print(describe(["desisky_tune", "ray", "jax", "equinox", "optuna"]), end="\n\n", flush=True)
    evaluations = []
    with tempfile.TemporaryDirectory() as runs, ray_session():
        for seed in options.split_seeds:
            spec = load_spec(options.space, (*options.set, f"split.seed={seed}"))
            began = time.perf_counter()
            result = run_search(spec, runs=runs, name=f"split-{seed}")
            seconds = time.perf_counter() - began
            evaluations.append(result.evaluation)
            print(summary(seed, result, seconds), end="\n\n", flush=True)
    if len(evaluations) > 1:
        print(across_splits(evaluations))


def summary(seed: int, result: Any, seconds: float) -> str:
    """Return the table of one search."""
    evaluation, winner = result.evaluation, result.winner
    states = Counter(record.state for record in result.records)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    chosen = ", ".join(f"{name} {value:.4g}" for name, value in winner.configuration.items())
    rows = ", ".join(
        f"{part} {evaluation['rows'][part]} rows in {evaluation['nights'][part]} nights"
        for part in ("train", "validation", "test")
    )
    v = "V (derived)" if evaluation["v_derived"] else "V"
    lines = [
        f"Split seed {seed}: {rows}. {len(result.records)} trials ({counts}), {seconds:.0f} s "
        f"beside a Ray that runs already. Winner: trial {winner.number} ({chosen}).",
        "",
        f"| RMSE (mag) | on | {v} | g | r | z | mean V g r z | mean g r z |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part in ("validation", "test"):
        for name, label in LABELS.items():
            figures = evaluation["figures"].get(name)
            if figures is not None:
                columns = (*BANDS, "mean", "mean_grz")
                values = " | ".join(f"{figures[part][column]:.3f}" for column in columns)
                where = evaluation["validated_on"] if part == "validation" else part
                lines.append(f"| {label} | {where} | {values} |")
    return "\n".join(lines)


def across_splits(evaluations: list[dict[str, Any]]) -> str:
    """Return mean and spread over the splits of the mean RMSE in g, r, z."""
    lines = [
        f"Mean (standard deviation) over {len(evaluations)} splits of the mean RMSE in g r z, mag:",
        "",
        f"| | {evaluations[0]['validated_on']} | test | test - {evaluations[0]['validated_on']} |",
        "|---|---|---|---|",
    ]
    for name, label in LABELS.items():
        if name not in evaluations[0]["figures"]:
            continue
        parts = {
            part: [each["figures"][name][part]["mean_grz"] for each in evaluations]
            for part in ("validation", "test")
        }
        parts["difference"] = [
            test - validation
            for test, validation in zip(parts["test"], parts["validation"], strict=True)
        ]
        cells = [f"{statistics.mean(v):.3f} ({statistics.stdev(v):.3f})" for v in parts.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
