"""What a run was made from: written when it begins, read when it is resumed or exported."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from desisky_tune.data.features import FeatureTable, fingerprint
from desisky_tune.data.splits import Split
from desisky_tune.errors import RunError
from desisky_tune.files import atomic_path
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.samplers import sampler_settings
from desisky_tune.search.space import SearchSpec, resolved_dict
from desisky_tune.search.versions import versions


def write_run(folder: RunFolder, spec: SearchSpec, table: FeatureTable, split: Split) -> None:
    """Write the feature table and `search.json` of a new run."""
    with atomic_path(folder.features) as temporary:
        table.frame.to_parquet(temporary)
    folder.write_search(
        {
            "name": folder.name,
            "created": now(),
            "spec": resolved_dict(spec),
            "sampler": sampler_settings(spec),
            "data": dict(table.provenance),
            "split": split.as_exposures(table.frame),
            "seed": {
                "search": spec.search.seed,
                "split": spec.split.seed,
                "training": spec.training.seed,
            },
            "versions": versions(),
        }
    )


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
    import pandas as pd

    provenance = dict(content["data"])
    try:
        frame = pd.read_parquet(folder.features)
        found = fingerprint(frame)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder.features} cannot be read: {error}") from error
    if found != provenance["fingerprint"]:
        raise RunError(
            f"{folder.features}: its rows are not those of {folder.search_json} "
            f"(fingerprint {found[:12]}, recorded {provenance['fingerprint'][:12]})"
        )
    return FeatureTable(frame, provenance)


def checkpoint_header(
    folder: RunFolder, spec: SearchSpec, table: FeatureTable, split: Split
) -> dict[str, Any]:
    """What the header of every trial's checkpoint says of its origin."""
    return {
        "search": {"name": folder.name, "sampler": spec.search.sampler, "seed": spec.search.seed},
        "data": {
            key: table.provenance[key]
            for key in ("source", "subset", "eclipse", "v_derived", "fingerprint")
            if key in table.provenance
        },
        "split": split.as_exposures(table.frame),
        "seed": spec.training.seed,
        "versions": versions(),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
