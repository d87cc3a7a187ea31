"""`data info`, `data ingest`, `data simulate`, `data fetch`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from desisky_tune.cli.console import duration, number, say, show, show_json, table
from desisky_tune.cli.options import Address, AsJson, Debug, Subset
from desisky_tune.cli.progress import counter_progress, removed_text

if TYPE_CHECKING:
    import pandas as pd

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="sv1 (shipped), vac (downloaded), or a file: a VAC or a table of exposures.",
        show_default=False,
    ),
]


def info(source: Source = "sv1", as_json: AsJson = False, debug: Debug = False) -> None:
    """Show what a source holds: exposures, nights, subsets, magnitudes."""
    content = describe(source)
    if as_json:
        show_json(content)
        return
    nights = content["nights"]
    show(f"{content['path']}: {content['rows']} exposures in {nights['count']} nights")
    show(f"kind: {content['kind']}")
    if nights["count"]:
        show(f"nights: {nights['first']} to {nights['last']}")
    if content["v_derived"]:
        show("V is derived from g and r")
    bands = list(content["subsets"]["all"]["median"])
    headings = ["subset", "exposures", "nights", *(f"median {band}" for band in bands)]
    rows = [
        [
            name,
            part["rows"],
            part["nights"],
            *(number(part["median"][band], ".2f") for band in bands),
        ]
        for name, part in content["subsets"].items()
    ]
    show(table(headings, rows))


def ingest(
    source: Source,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.parquet",
            help="Feature table to write (.parquet, .csv, .ecsv or .fits).",
            show_default=False,
        ),
    ],
    subset: Subset = "moon",
    eclipse: Annotated[
        str,
        typer.Option(
            "--eclipse",
            metavar="WAY",
            help="exact (computed), none (0 everywhere) or table (the source's own column).",
        ),
    ] = "exact",
    known_bad: Annotated[
        bool,
        typer.Option("--include-known-bad", help="Keep the nights with smoke of June 2021."),
    ] = False,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Make the feature table of a source: features and magnitudes, cut and cleaned."""
    from desisky_tune.data.features import load_features
    from desisky_tune.data.tables import write_table

    begin = time.monotonic()
    features = load_features(
        source,
        subset or "moon",
        eclipse=eclipse,
        exclude_known_bad=not known_bad,
        address=address,
    )
    write_table(features.frame, out)
    say(
        f"{len(features.frame)} exposures{removed_text(features.provenance)}, "
        f"in {duration(time.monotonic() - begin)}"
    )
    if features.v_derived:
        say("note: V is derived from g and r in this table (column V_DERIVED)")
    show(str(out))


def simulate(
    out: Annotated[
        Path, typer.Argument(metavar="OUT.fits", help="File to write.", show_default=False)
    ],
    exposures: Annotated[
        int, typer.Option("--exposures", metavar="N", help="Rows; the real VAC has 9176.")
    ] = 9176,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Of every draw: same seed, same bytes.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Write a simulated VAC: the real one's layout, with physics and real sky geometry."""
    from desisky_tune.data.simulate import simulate_vac

    with counter_progress("exposures") as progress:
        path = simulate_vac(out, exposures=exposures, seed=seed, progress=progress)
    show(str(path))


def fetch(
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Folder of downloaded data. Default: $DESISKY_DATA_DIR or ~/.desisky/data.",
        ),
    ] = None,
    release: Annotated[
        str, typer.Option("--release", metavar="VERSION", help="Version of the catalogue.")
    ] = "v1.0",
    debug: Debug = False,
) -> None:
    """Download the sky-spectra VAC (about 274 MiB), go on where a download broke off, verify it."""
    from desisky_tune.data.vac import SkySpecVAC

    show(str(SkySpecVAC(root=root, version=release, download=True).path))


def describe(source: str) -> dict[str, Any]:
    """Return what a source holds, as JSON-able values, without reading spectra."""
    from desisky_tune.data.features import needs_ray, source_path

    path = source_path(source)
    spectra = needs_ray(source)
    frame, v_derived = _spectra_metadata(path) if spectra else _exposures(path)
    return {
        "source": source,
        "path": str(path),
        "kind": "spectra with metadata" if spectra else "table of exposures",
        "rows": len(frame),
        "nights": _nights(frame),
        "v_derived": v_derived,
        "columns": [str(name) for name in frame.columns],
        "subsets": _subsets(frame),
    }


def _spectra_metadata(path: Path) -> tuple[pd.DataFrame, bool]:
    import pandas as pd

    from desisky_tune.data.fits import SpectraFile

    return pd.DataFrame(SpectraFile.open(path).metadata()), False


def _exposures(path: Path) -> tuple[pd.DataFrame, bool]:
    from desisky_tune.data.exposures import read_table

    frame = read_table(path)
    return frame, bool(frame.attrs["v_derived"])


def _nights(frame: pd.DataFrame) -> dict[str, Any]:
    nights = frame["NIGHT"]
    known = {"count": int(nights.nunique()), "first": None, "last": None}
    return known | ({"first": int(nights.min()), "last": int(nights.max())} if len(nights) else {})


def _subsets(frame: pd.DataFrame) -> dict[str, Any]:
    """Return rows, nights and median magnitudes (AB mag/arcsec2) by subset."""
    from desisky_tune.data.columns import BANDS, TARGETS
    from desisky_tune.data.subsets import SUBSETS, cut

    bands = {b: name for b, name in zip(BANDS, TARGETS, strict=True) if name in frame.columns}
    found = {}
    for subset in SUBSETS:
        rows, _ = cut(frame, subset)
        found[subset] = {
            "rows": len(rows),
            "nights": int(rows["NIGHT"].nunique()),
            "median": {band: float(rows[name].median()) for band, name in bands.items()},
        }
    return found
