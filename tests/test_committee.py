"""Who is in a committee: a training on each fold, as many as one checkpoint may hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from desisky_tune.data.features import load_features
from desisky_tune.data.splits import make_split
from desisky_tune.search.backend import Member
from desisky_tune.search.committee import choose_seats, numbers_of
from desisky_tune.search.final_fit import MOST_WEIGHTS
from desisky_tune.search.finalists import Final, Finalist, OutOfFold
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.origin import SearchRun, write_run
from desisky_tune.search.space import default_configuration, load_spec
from desisky_tune.search.standing import Standing


def a_run(tmp_path: Path, *overrides: str) -> SearchRun:
    table = load_features()
    # The documented default itself breaks some of the limits here.
    spec = load_spec("broadband", ("search.default_first=false", *overrides))
    folder = RunFolder.create(tmp_path, "run", exact=True)
    run = SearchRun(folder, spec, table, make_split(table.frame))
    write_run(run)
    return run


def final_of(*shapes: tuple[int, int]) -> Final:
    """Finalists of given widths and depths, the best first, numbered from 10."""
    configurations = [
        {**default_configuration(), "width": width, "depth": depth} for width, depth in shapes
    ]
    by_number = dict(enumerate(configurations, start=10))
    rows, observed = np.arange(6), np.full((6, 4), 20.0)
    return Final(
        finalists={n: Finalist(n, n - 10, each) for n, each in by_number.items()},
        records={},
        standings=[Standing(n, 0.2, 0.01, 0.0, 0.01, 1000) for n in by_number],
        errors={n: OutOfFold(rows, rows % 2, observed[None], observed) for n in by_number},
    )


SMALL = ((8, 1), (16, 2), (8, 3), (4, 1), (4, 2), (4, 3))


@pytest.mark.parametrize(
    ("overrides", "shapes", "expected"),
    [
        ((), SMALL, [10, 11, 12, 10, 11]),
        (("evaluation.committee=2",), SMALL, [10, 11, 10, 11, 10]),
        (("evaluation.committee=1",), SMALL, []),
        (("evaluation.finalist_folds=2",), SMALL, [10, 11, 12]),
        (("evaluation.finalist_folds=2", "evaluation.finalist_seeds=1"), SMALL, [10, 11]),
        (("evaluation.committee=9",), SMALL, [10, 11, 12, 13, 14, 15]),
        (("evaluation.finalists=0",), SMALL, []),
        (("search.objectives=[rmse, parameters]", "search.scheduler=none"), SMALL, []),
        # Five are 7 x (5 x 256)^2 = 11.5 million weights, four 7.3 million.
        ((), ((256, 8),) * 3, [10, 11, 12, 10]),
        ((), ((512, 8),) * 3, [10, 11]),
        # One hidden layer of w units has 11 w + 4 weights and biases: 268 of 3 x 8, 180 of 2 x 8.
        (("search.max_parameters=268",), ((8, 1),) * 3, [10, 11, 12]),
        (("search.max_parameters=267",), ((8, 1),) * 3, [10, 11]),
        (("search.max_parameters=179",), ((8, 1),) * 3, []),
    ],
)
def test_a_training_on_each_fold_of_the_best_in_turn(
    overrides: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...],
    expected: list[int],
    tmp_path: Path,
) -> None:
    assert 7 * 1024**2 < MOST_WEIGHTS < 7 * 1280**2
    run = a_run(tmp_path, *overrides)
    seats = choose_seats(run, final_of(*shapes))
    assert [seat.number for seat in seats] == expected
    assert numbers_of(seats) == sorted(set(expected))
    # On different folds as far as they go, then with another seed.
    folds = run.spec.evaluation.finalist_folds
    assert [seat.member for seat in seats] == [
        Member(place % folds, place // folds) for place in range(len(seats))
    ]
