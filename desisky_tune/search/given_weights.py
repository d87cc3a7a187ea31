"""Weights that a search is given to begin with: an earlier run's winner, or a checkpoint.

They are looked at before the run has a folder: whether they fit its features, its bands and
its space, and whether they were trained on exposures that are to be its test rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, EXPOSURE_ID, NIGHT
from desisky_tune.data.parquet import read_parquet
from desisky_tune.data.remote import is_url, local_copy
from desisky_tune.errors import CheckpointError, MissingFileError, RunError, SpaceError
from desisky_tune.files import sha256_file
from desisky_tune.io import feature_names, read_header
from desisky_tune.search.export import trial_record
from desisky_tune.search.final_fit import fit_of, write_final_fit
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.origin import open_run
from desisky_tune.search.parameters import Fixed

if TYPE_CHECKING:
    from desisky_tune.data.features import FeatureTable
    from desisky_tune.data.splits import Split
    from desisky_tune.search.space import SearchSpec

#: Hyperparameters that the weights settle, and what a header calls them.
SETTLED: Mapping[str, str] = {"width": "width_size", "depth": "depth"}


@dataclass(frozen=True)
class Located:
    """Where given weights lie: the checkpoint, and the run whose winner it is, if any."""

    path: Path
    run: RunFolder | None = None


def locate(source: str) -> Located:
    """Find the checkpoint that ``pretrain.source`` names.

    Raises
    ------
    MissingFileError
        When there is neither such a run nor such a checkpoint.
    RunError
        When a folder is no run, or the run has no winner yet.
    """
    path = Path(source).expanduser()
    if is_url(source) and source.endswith(".eqx"):
        return Located(local_copy(source))
    if path.is_file():
        return Located(path)
    if not is_url(source) and not path.is_dir():
        raise MissingFileError(
            f"pretrain.source = {source!r}: no such run or checkpoint; allowed: simulated, the "
            "folder or URL of a run, the path of a checkpoint (.eqx)"
        )
    folder = RunFolder.open(source)
    folder.fetched(folder.best)
    if not folder.best.is_file():
        raise RunError(
            f"pretrain.source = {source!r}: the run has no winner yet; finish it with "
            f"'desisky-tune resume {source}'"
        )
    return Located(folder.best, folder)


def architecture_of(source: str) -> dict[str, Any]:
    """Return the width and depth of given weights, for a space that does not name them.

    Raises
    ------
    InputError
        As `locate`, or when the file is no checkpoint of an MLP.
    """
    found = locate(source)
    path, header = found.path, read_header(found.path)
    arch = header["arch"]
    if found.run is not None and "mean_of" in header:
        configuration = trial_record(found.run, None).configuration
        return {name: configuration[name] for name in SETTLED}
    missing = [key for key in SETTLED.values() if key not in arch]
    if missing:
        raise CheckpointError(f"pretrain.source = {source!r}: {path}: arch lacks {missing[0]!r}")
    return {name: arch[key] for name, key in SETTLED.items()}


@dataclass(frozen=True)
class GivenWeights:
    """Given weights that a search can begin with.

    Attributes
    ----------
    layers
        Weight ``(out, in)`` and bias ``(out,)`` by layer, the inputs in the search's order.
    note
        Where they come from, for headers and `search.json`.
    """

    layers: list[tuple[np.ndarray, np.ndarray]]
    note: dict[str, Any]


def read_given(spec: SearchSpec, table: FeatureTable, split: Split) -> GivenWeights:
    """Read the weights that a search is given, and see that they may be used.

    Raises
    ------
    InputError
        When they are missing, damaged, or of other features, bands or another architecture
        than the search's; when they were trained on some of its test rows.
    """
    from desisky_tune.io.checkpoint import load_layers

    assert spec.pretrain is not None
    source = spec.pretrain.source
    found = locate(source)
    with _one_network(found) as path:
        layers, meta = load_layers(path)
    where = f"pretrain.source = {source!r}"
    names, wanted = feature_names(meta, found.path), spec.data.features
    if sorted(names) != sorted(wanted):
        raise CheckpointError(
            f"{where}: these weights take {', '.join(names)}; data.features: {', '.join(wanted)}"
        )
    bands = list(meta.get("bands") or BANDS)
    if bands != list(BANDS) or meta["arch"]["out_size"] != len(BANDS):
        raise CheckpointError(
            f"{where}: these weights give {meta['arch']['out_size']} outputs "
            f"({', '.join(map(str, bands))}); needed: {', '.join(BANDS)}"
        )
    require_architecture(spec, meta["arch"])
    weight, bias = layers[0]
    layers[0] = np.ascontiguousarray(weight[:, [names.index(name) for name in wanted]]), bias
    trained_on = _trained_on(found, meta)
    return GivenWeights(
        layers,
        {
            "source": source,
            "run": None if found.run is None else found.run.name,
            "sha256": sha256_file(found.path),
            "trained_on": trained_on,
            "seen": _seen(where, found, trained_on, table, split),
        },
    )


@contextmanager
def _one_network(found: Located) -> Iterator[Path]:
    """Yield a checkpoint of one network: what a run exports may be the mean of several.

    A training that began with such a mean would be as wide as all of them together. So the
    winner's configuration is fitted once more, with one seed.
    """
    if found.run is None or "mean_of" not in read_header(found.path):
        yield found.path
        return
    fit = fit_of(trial_record(found.run, None), {})
    with TemporaryDirectory(prefix="desisky-tune-") as folder:
        yield write_final_fit(open_run(found.run.path), fit, Path(folder) / "winner.eqx", seeds=1)


def require_architecture(spec: SearchSpec, arch: Mapping[str, Any]) -> None:
    """Refuse a space that searches, or fixes otherwise, what given weights settle.

    Raises
    ------
    SpaceError
        With one line: what the space says, and what is allowed.
    """
    assert spec.pretrain is not None
    for name, key in SETTLED.items():
        parameter, given = spec.space[name], arch[key]
        if not isinstance(parameter, Fixed) or parameter.value != given:
            raise SpaceError(
                f"space.{name} = {parameter.entry()}: the weights of pretrain.source = "
                f"{spec.pretrain.source!r} have {name} {given}; leave space.{name} out, or give "
                f"{given} (--set space.{name}={given})"
            )


def _trained_on(found: Located, meta: Mapping[str, Any]) -> list[int] | None:
    """Return the exposures that weights were trained or chosen on; None where nobody wrote them.

    Those of the weights that they began with are among them.
    """
    split = meta.get("split") or {}
    if found.run is not None:
        split = found.run.read_search()["split"]
    if "train" not in split:
        return None
    before = meta.get("pretrain") or {}
    if before.get("trained_on", ()) is None:
        return None
    every = {*split["train"], *split.get("validation", ()), *before.get("trained_on", ())}
    return sorted(int(exposure) for exposure in every)


def _seen(
    where: str,
    found: Located,
    trained_on: list[int] | None,
    table: FeatureTable,
    split: Split,
) -> dict[str, int] | None:
    """Count the exposures of each part that weights were trained on; refuse those of the test."""
    if trained_on is None:
        return None
    frame = table.frame
    known = np.isin(frame[EXPOSURE_ID].to_numpy(), trained_on)
    if found.run is not None:
        # Two observatories may number alike: an exposure is the same in the same night.
        nights = _nights(found.run)
        same = [
            nights.get(e, n) == n for e, n in zip(frame[EXPOSURE_ID], frame[NIGHT], strict=True)
        ]
        known &= np.array(same)
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    seen = {part: int(known[rows].sum()) for part, rows in parts.items()}
    if seen["test"]:
        first = frame[EXPOSURE_ID].to_numpy()[split.test[known[split.test]]].min()
        raise SpaceError(
            f"{where}: these weights were trained on {seen['test']} of the {len(split.test)} test "
            f"exposures (EXPID {first} first); take the split that they were trained with "
            "(split.by, split.fractions, split.seed), or other weights"
        )
    return seen


def _nights(folder: RunFolder) -> dict[int, int]:
    try:
        frame = read_parquet(folder.features, columns=[EXPOSURE_ID, NIGHT]).to_pandas()
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.features} cannot be read: {error}") from error
    return dict(zip(frame[EXPOSURE_ID].tolist(), frame[NIGHT].tolist(), strict=True))
