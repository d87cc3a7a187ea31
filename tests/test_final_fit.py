"""The final fit: several seeds, one checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from desisky_tune.data.features import load_features
from desisky_tune.data.splits import make_split
from desisky_tune.inference import Predictor
from desisky_tune.io.header import read_header
from desisky_tune.search.final_fit import (
    MOST_WEIGHTS,
    FinalFit,
    final_seeds,
    write_final_fit,
)
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.origin import SearchRun, write_run
from desisky_tune.search.space import default_configuration, load_spec

SMALL = {**default_configuration(), "width": 8, "depth": 2, "learning_rate": 1e-2}


def a_run(tmp_path: Path, name: str, seeds: int) -> SearchRun:
    table = load_features()
    spec = load_spec("quick", (f"evaluation.final_seeds={seeds}",))
    folder = RunFolder.create(tmp_path, name, exact=True)
    run = SearchRun(folder, spec, table, make_split(table.frame))
    write_run(run)
    return run


def test_the_checkpoint_is_the_mean_of_the_seeds(tmp_path: Path) -> None:
    fit = FinalFit(SMALL, 3, 5, {"V": 0.2}, 0.1, {})
    alone = a_run(tmp_path, "alone", 1)
    single = [
        write_final_fit(alone, replace(fit, seed=seed), tmp_path / f"{seed}.eqx")
        for seed in (5, 6, 7)
    ]
    together = write_final_fit(a_run(tmp_path, "together", 3), fit, tmp_path / "mean.eqx")
    frame = alone.table.frame
    expected = np.mean([Predictor.load(path).predict(frame) for path in single], axis=0)
    np.testing.assert_allclose(Predictor.load(together).predict(frame), expected, atol=1e-4)
    header = read_header(together)
    assert header["arch"]["width_size"] == 3 * SMALL["width"]
    assert header["mean_of"] == {"width": 8, "seeds": [5, 6, 7]}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 5),
        (("evaluation.final_seeds=2",), 2),
        # One hidden layer of w units: 11 w + 4 weights and biases, so 356 of 4 x 8, 444 of 5 x 8.
        (("search.max_parameters=400",), 4),
        (("search.max_parameters=100",), 1),
        (("search.objectives=[rmse, parameters]", "search.scheduler=none"), 1),
    ],
)
def test_the_mean_is_no_larger_than_wanted(overrides: tuple[str, ...], expected: int) -> None:
    # The documented default itself breaks these limits.
    spec = load_spec("quick", (*overrides, "search.default_first=false"))
    assert final_seeds(spec, {**SMALL, "width": 8, "depth": 1}) == expected


def test_a_large_network_is_fitted_with_fewer_seeds() -> None:
    largest = {**SMALL, "width": 512, "depth": 8}
    # 7 x (2 x 512)^2 alone are 7.3 million, 7 x (3 x 512)^2 are 16.5 million.
    assert 7 * 1024**2 < MOST_WEIGHTS < 7 * 1536**2
    assert final_seeds(load_spec("broadband"), largest) == 2
