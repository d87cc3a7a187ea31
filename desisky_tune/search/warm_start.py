"""What earlier runs found, to begin a search with.

Their configurations are trained again, on this search's exposures and split: figures of
another split or catalogue could not be compared with those of this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from desisky_tune.errors import RunError
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.hyperparameters import HYPERPARAMETERS, Value, is_documented_default
from desisky_tune.search.leaderboard import leaderboard
from desisky_tune.search.records import Ledger
from desisky_tune.search.space import SearchSpec

#: Configurations that are taken from each run.
BEST_OF_RUN = 5

Configuration = dict[str, Value]


def earlier_configurations(spec: SearchSpec, runs: Iterable[str | Path]) -> list[Configuration]:
    """Return the best configurations of earlier runs, for ``search.warm_start``.

    Parameters
    ----------
    spec
        The search that is to begin with them: those that break its constraints, and the
        documented default, are left out.
    runs
        Folders of runs; the `BEST_OF_RUN` best of each, a run after the other, each
        configuration once, and no more than half of the search's trials.

    Raises
    ------
    RunError
        When a folder is no run, or no trial of it has completed.
    """
    found: list[Configuration] = []
    for run in runs:
        records = Ledger(RunFolder.open(run).ledger).records()
        by_number = {record.number: record for record in records}
        ranked = leaderboard(records).query("state == 'COMPLETE'")["trial"].tolist()
        if not ranked:
            raise RunError(f"{run}: no trial has completed: there is nothing to begin with")
        allowed = [
            configuration
            for number in ranked
            if not is_documented_default(
                configuration := _known(by_number[int(number)].configuration)
            )
            and configuration not in found
            and spec.broken_constraint(configuration) is None
        ]
        found += allowed[:BEST_OF_RUN]
    return found[: spec.search.trials // 2]


def _known(configuration: dict[str, Value]) -> Configuration:
    return {name: configuration[name] for name in HYPERPARAMETERS if name in configuration}
