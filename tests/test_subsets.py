"""Cuts: the reference definitions, NaN, and who removed what."""

from __future__ import annotations

import pandas as pd
import pytest
from builders import catalogue_metadata
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.data.subsets import KNOWN_BAD_NIGHTS, SUBSETS, cut, refuse_empty
from desisky_tune.errors import DataError

#: The definitions of the reference package, written out as pandas queries.
QUERIES = {
    "moon": "SUNALT < -20 and MOONALT > 5 and MOONFRAC > 0.5 and MOONSEP <= 90"
    " and TRANSPARENCY_GFA > 0",
    "dark": "SUNALT < -20 and MOONALT < -5 and TRANSPARENCY_GFA > 0",
    "twilight": "SUNALT > -20 and MOONALT <= -5 and SUNSEP <= 110 and TRANSPARENCY_GFA > 0",
    "all": "TRANSPARENCY_GFA > 0",
}


@pytest.mark.parametrize("subset", list(SUBSETS))
def test_a_subset_is_the_documented_one(subset: str) -> None:
    frame = catalogue_metadata(400, seed=1)
    kept, _ = cut(frame, subset)
    expected = frame.query(QUERIES[subset]).reset_index(drop=True)
    assert 0 < len(expected) < len(frame)
    pd.testing.assert_frame_equal(kept, expected)


@settings(max_examples=20, deadline=None)
@given(subset=st.sampled_from(sorted(SUBSETS)), seed=st.integers(0, 999), bad=st.booleans())
def test_every_row_is_kept_or_removed_once(subset: str, seed: int, bad: bool) -> None:
    frame = catalogue_metadata(50, seed=seed)
    kept, removed = cut(frame, subset, exclude_known_bad=bad)
    assert len(kept) + sum(removed.values()) == len(frame)


def test_a_row_is_charged_to_the_first_condition_that_it_fails() -> None:
    frame = pd.DataFrame(
        {
            "SUNALT": [-30.0, -10.0, -10.0, -30.0],
            "MOONALT": [-10.0, -10.0, 40.0, 40.0],
            "TRANSPARENCY_GFA": [1.0, 0.0, 1.0, float("nan")],
        }
    )
    kept, removed = cut(frame, "dark")
    assert kept.index.tolist() == [0]
    assert removed == {"SUNALT < -20": 2, "MOONALT < -5": 1, "TRANSPARENCY_GFA > 0": 0}


def test_both_ends_of_the_smoke_are_excluded() -> None:
    first, last = KNOWN_BAD_NIGHTS
    frame = pd.DataFrame({"NIGHT": [first - 1, first, 20210608, last, last + 1]})
    frame["TRANSPARENCY_GFA"] = 1.0
    kept, removed = cut(frame, "all", exclude_known_bad=True)
    assert kept["NIGHT"].tolist() == [20210603, 20210613]
    assert removed["NIGHT outside 20210604-20210612"] == 3


def test_a_missing_column_is_named_with_the_nearest() -> None:
    frame = catalogue_metadata(5).rename(columns={"SUNSEP": "SUN_SEP"})
    with pytest.raises(DataError, match=r"missing column SUNSEP \(nearest name there: SUN_SEP\)"):
        cut(frame, "twilight")


def test_an_unknown_subset_is_refused() -> None:
    with pytest.raises(DataError, match="'lunar' is unknown: one of moon, dark, twilight, all"):
        cut(catalogue_metadata(5), "lunar")


def test_an_empty_cut_says_what_each_condition_removed() -> None:
    message = "f.csv: none of 7 rows is left: MOONALT > 5 removed 4; MOONSEP <= 90 removed 3"
    with pytest.raises(DataError) as caught:
        refuse_empty(0, 7, {"MOONALT > 5": 4, "MOONSEP <= 90": 3}, "f.csv")
    assert str(caught.value) == message
    refuse_empty(1, 7, {}, "f.csv")
