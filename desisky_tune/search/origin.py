"""What a run was made from: written when it begins, read when it is resumed or exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from desisky_tune.data.features import FeatureTable, fingerprint
from desisky_tune.data.parquet import read_parquet
from desisky_tune.data.splits import Split
from desisky_tune.errors import RunError
from desisky_tune.files import atomic_path
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.folds import folds_as_exposures, run_folds
from desisky_tune.search.samplers import sampler_settings
from desisky_tune.search.space import SearchSpec, resolved_dict, spec_from_dict
from desisky_tune.search.versions import versions

#: Rows up to which a checkpoint's header lists the exposures of the split; beyond, it says
#: how they were drawn.
MAX_LISTED = 10_000


@dataclass(frozen=True)
class SearchRun:
    """A run: its folder, what is searched, and on which rows."""

    folder: RunFolder
    spec: SearchSpec
    table: FeatureTable
    split: Split


def write_run(run: SearchRun, pretrain: Mapping[str, Any] | None = None) -> None:
    """Write the feature table and `search.json` of a new run.

    Parameters
    ----------
    run
        The run.
    pretrain
        Where the weights come from that its trials begin with; None where they are drawn.
    """
    folder, spec, table, split = run.folder, run.spec, run.table, run.split
    with atomic_path(folder.features) as temporary:
        table.frame.to_parquet(temporary)
    folder.kept(folder.features)
    folder.write_search(
        {
            "name": folder.name,
            "created": now(),
            "spec": resolved_dict(spec),
            "sampler": sampler_settings(spec),
            "data": dict(table.provenance),
            "split": split.as_exposures(table.frame),
            **_recorded_folds(run),
            **({} if pretrain is None else {"pretrain": dict(pretrain)}),
            "seed": {
                "search": spec.search.seed,
                "split": spec.split.seed,
                "training": spec.training.seed,
            },
            "versions": versions(),
        }
    )


def _recorded_folds(run: SearchRun) -> dict[str, Any]:
    """Say which exposures each fold of the trials validates on, where there are several."""
    folds, seeds = run.spec.evaluation.folds, run.spec.evaluation.seeds
    if folds == seeds == 1:
        return {}
    first = run.spec.training.seed
    return {
        "folds": folds_as_exposures(run, run_folds(run, folds)),
        "seeds": list(range(first, first + seeds)),
    }


def read_table_of(folder: RunFolder, content: Mapping[str, Any]) -> FeatureTable:
    """Read the feature table that a run was made with.

    Parameters
    ----------
    folder
        The run.
    content
        Of its `search.json`.

    Raises
    ------
    RunError
        When it is missing, or its rows are not those that `search.json` records.
    """
    provenance = dict(content["data"])
    try:
        frame = read_parquet(folder.features).to_pandas()
        found = fingerprint(frame)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder.features} cannot be read: {error}") from error
    if found != provenance["fingerprint"]:
        raise RunError(
            f"{folder.features}: its rows are not those of {folder.search_json} "
            f"(fingerprint {found[:12]}, recorded {provenance['fingerprint'][:12]})"
        )
    return FeatureTable(frame, provenance)


def open_run(path: str | Path) -> SearchRun:
    """Open a run that exists.

    Raises
    ------
    RunError
        When there is none at `path`, or files of it were changed or lost.
    """
    folder = RunFolder.open(path)
    content = folder.read_search()
    table = read_table_of(folder, content)
    return SearchRun(
        folder,
        spec_from_dict(content["spec"], where=str(folder.search_json)),
        table,
        Split.from_exposures(content["split"], table.frame),
    )


def checkpoint_header(run: SearchRun) -> dict[str, Any]:
    """What the header of every trial's checkpoint says of its origin."""
    spec, split, provenance = run.spec, run.split, run.table.provenance
    if len(run.table.frame) <= MAX_LISTED:
        drawn = split.as_exposures(run.table.frame)
    else:
        drawn = {"by": split.by, "seed": split.seed, "fractions": list(split.fractions)}
    return {
        "search": {"name": run.folder.name, "sampler": spec.search.sampler}
        | {"seed": spec.search.seed},
        "data": {
            key: provenance[key]
            for key in ("source", "subset", "eclipse", "v_derived", "fingerprint")
            if key in provenance
        },
        "split": drawn,
        "seed": spec.training.seed,
        "versions": versions(),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
