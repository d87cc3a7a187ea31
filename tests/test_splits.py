"""Splits and folds: whole groups, every row once, the same whatever the order of rows."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.data.splits import Split, make_folds, make_split
from desisky_tune.errors import DataError, InputError

PARTS = ("train", "validation", "test")


def exposures(nights: int = 12, seed: int = 0) -> pd.DataFrame:
    """Exposures of nights of very different length."""
    draw = np.random.default_rng(seed)
    night = np.repeat(20210101 + np.arange(nights), draw.integers(1, 40, nights))
    number = 70000 + draw.permutation(len(night))
    frame = pd.DataFrame({"EXPID": number, "NIGHT": night, "FIELD": night % 4})
    return frame.sort_values("EXPID", ignore_index=True)


def parts_of(split: Split, frame: pd.DataFrame) -> dict[str, set[int]]:
    return {name: set(frame["EXPID"].iloc[getattr(split, name)]) for name in PARTS}


@settings(max_examples=30, deadline=None)
@given(
    nights=st.integers(4, 30),
    seed=st.integers(0, 2**31),
    by=st.sampled_from(["NIGHT", "row", "FIELD"]),
)
def test_parts_are_disjoint_exhaustive_and_of_whole_groups(nights: int, seed: int, by: str) -> None:
    frame = exposures(nights, seed % 1000)
    split = make_split(frame, by=by, seed=seed)
    rows = np.concatenate([split.train, split.validation, split.test])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(frame)))
    assert all(len(getattr(split, name)) > 0 for name in PARTS)
    assert all(getattr(split, name).dtype == np.int64 for name in PARTS)
    if by != "row":
        groups = [set(frame[by].iloc[getattr(split, name)]) for name in PARTS]
        assert sum(map(len, groups)) == frame[by].nunique()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), by=st.sampled_from(["NIGHT", "row", "FIELD"]))
def test_a_split_does_not_depend_on_the_order_of_rows(seed: int, by: str) -> None:
    frame = exposures()
    shuffled = frame.sample(frac=1, random_state=seed, ignore_index=True)
    one, other = make_split(frame, by=by, seed=seed), make_split(shuffled, by=by, seed=seed)
    assert parts_of(one, frame) == parts_of(other, shuffled)


def test_seeds_draw_different_splits_and_one_seed_the_same() -> None:
    frame = exposures()
    drawn = [tuple(make_split(frame, seed=seed).train) for seed in (0, 1, 2, 0)]
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


def test_single_rows_meet_the_fractions_to_one_row() -> None:
    frame = exposures(40)
    split = make_split(frame, by="row", fractions=(0.7, 0.2, 0.1))
    for name, share in zip(PARTS, (0.7, 0.2, 0.1), strict=True):
        assert abs(len(getattr(split, name)) - share * len(frame)) <= 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999))
def test_nights_meet_the_fractions_to_the_longest_night(seed: int) -> None:
    frame = exposures(30, seed)
    longest = frame["NIGHT"].value_counts().max()
    split = make_split(frame, seed=seed)
    for name, share in zip(PARTS, (0.6, 0.2, 0.2), strict=True):
        assert abs(len(getattr(split, name)) - share * len(frame)) <= longest


def test_three_nights_make_three_parts_even_when_one_holds_nearly_all() -> None:
    frame = pd.DataFrame({"NIGHT": [1] * 100 + [2, 3], "EXPID": np.arange(102)})
    for seed in range(6):
        split = make_split(frame, seed=seed)
        assert min(len(split.train), len(split.validation), len(split.test)) == 1


def test_groups_may_be_text() -> None:
    frame = exposures().assign(PROGRAM=lambda f: np.where(f["NIGHT"] % 3 == 0, "dark", "bright"))
    frame.loc[frame["NIGHT"] % 5 == 0, "PROGRAM"] = "backup"
    split = make_split(frame, by="PROGRAM")
    assert all(frame["PROGRAM"].iloc[getattr(split, name)].nunique() == 1 for name in PARTS)


def test_a_split_is_recorded_by_exposure_and_found_again() -> None:
    frame = exposures()
    split = make_split(frame, seed=7)
    record = json.loads(json.dumps(split.as_exposures(frame)))
    assert {name: set(record[name]) for name in PARTS} == parts_of(split, frame)
    shuffled = frame.sample(frac=1, random_state=3, ignore_index=True)
    again = Split.from_exposures(record, shuffled)
    assert parts_of(again, shuffled) == parts_of(split, frame)
    assert (again.by, again.seed, again.fractions) == ("NIGHT", 7, (0.6, 0.2, 0.2))


def test_a_record_of_other_data_is_refused() -> None:
    frame = exposures()
    record = make_split(frame).as_exposures(frame)
    with pytest.raises(DataError, match=r"1 of its exposures are not in the table, EXPID 70\d+"):
        Split.from_exposures(record, frame.iloc[1:].reset_index(drop=True))
    more = pd.concat([frame, frame.tail(1).assign(EXPID=1)], ignore_index=True)
    with pytest.raises(DataError, match="the data has changed"):
        Split.from_exposures(record, more)
    twice = {**record, "test": [*record["test"], record["train"][0]]}
    with pytest.raises(DataError, match="an exposure stands in two of its parts"):
        Split.from_exposures(twice, frame)
    with pytest.raises(DataError, match="missing seed"):
        Split.from_exposures({k: v for k, v in record.items() if k != "seed"}, frame)


@pytest.mark.parametrize(
    "fractions",
    [(0.6, 0.4), (0.6, 0.2, 0.3), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1), (0.5, 0.5, np.nan)],
)
def test_fractions_are_three_positive_shares_of_one(fractions: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="three positive numbers with sum 1"):
        make_split(exposures(), fractions=fractions)


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_a_seed_is_a_non_negative_integer(seed: int) -> None:
    with pytest.raises(InputError, match=r"seed = .*: a non-negative integer"):
        make_split(exposures(), seed=seed)


def test_too_few_nights_are_counted() -> None:
    frame = exposures(2)
    with pytest.raises(DataError, match=r"needs at least 3 nights .*the table has 2 in \d+ rows"):
        make_split(frame)
    with pytest.raises(DataError, match="needs at least 3 rows"):
        make_split(frame.head(2), by="row")


def test_an_unknown_column_is_named_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"missing column FIELDS \(nearest name there: FIELD\)"):
        make_split(exposures(), by="FIELDS")


def test_a_row_without_a_group_is_told() -> None:
    frame = exposures().astype({"FIELD": float})
    frame.loc[5, "FIELD"] = np.nan
    with pytest.raises(DataError, match="1 rows have no FIELD, row 5 first"):
        make_split(frame, by="FIELD")


@settings(max_examples=30, deadline=None)
@given(
    folds=st.integers(2, 6),
    seed=st.integers(0, 9999),
    by=st.sampled_from(["NIGHT", "row"]),
)
def test_folds_validate_every_row_once_and_split_no_group(folds: int, seed: int, by: str) -> None:
    frame = exposures(20, seed)
    rows = np.concatenate([make_split(frame).train, make_split(frame).validation])
    pairs = make_folds(frame, rows, by=by, folds=folds, seed=seed)
    assert len(pairs) == folds
    validated = np.concatenate([validation for _, validation in pairs])
    np.testing.assert_array_equal(np.sort(validated), np.sort(rows))
    for train, validation in pairs:
        np.testing.assert_array_equal(np.union1d(train, validation), np.sort(rows))
        assert not set(train) & set(validation)
        if by == "NIGHT":
            assert not set(frame["NIGHT"].iloc[train]) & set(frame["NIGHT"].iloc[validation])


def test_folds_do_not_depend_on_the_order_of_rows() -> None:
    frame = exposures()
    shuffled = frame.sample(frac=1, random_state=1, ignore_index=True)
    one = make_folds(frame, np.arange(len(frame)), seed=4)
    other = make_folds(shuffled, np.arange(len(frame)), seed=4)
    for (_, mine), (_, theirs) in zip(one, other, strict=True):
        assert set(frame["EXPID"].iloc[mine]) == set(shuffled["EXPID"].iloc[theirs])


def test_folds_need_enough_nights() -> None:
    frame = exposures(4)
    with pytest.raises(DataError, match=r"5 folds by NIGHT need at least 5 nights; .* have 4"):
        make_folds(frame, np.arange(len(frame)))
    with pytest.raises(InputError, match="folds = 1: an integer of at least 2"):
        make_folds(frame, np.arange(len(frame)), folds=1)
