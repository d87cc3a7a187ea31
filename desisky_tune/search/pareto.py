"""Which trials nobody beats in both RMSE and size."""

from __future__ import annotations

import math
from collections.abc import Iterable

from desisky_tune.search.records import TrialRecord


def pareto_front(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the complete trials that no other dominates, the smallest model first.

    One trial dominates another when it has no higher RMSE and no more weights, and less of
    one of them. Of trials that are equal in both all are on the front.
    """
    complete = [each for each in records if each.state == "COMPLETE" and each.objective is not None]
    front: list[TrialRecord] = []
    best, size = math.inf, 0
    for record in sorted(complete, key=lambda each: (each.parameters, each.objective, each.number)):
        objective = float(record.objective or 0.0)
        if objective < best or (objective == best and record.parameters == size):
            front.append(record)
            best, size = objective, record.parameters
    return front
