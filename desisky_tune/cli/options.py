"""Options and arguments that several commands share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.find_root().obj["debug"] = True
    return value


Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show the traceback of a failure (also DESISKY_TUNE_DEBUG=1).",
        callback=_set_debug,
        is_eager=True,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="sv1 (real exposures, shipped), vac (the downloaded catalogue), or a file: "
        "a VAC, or a table as CSV, ECSV, FITS or Parquet.",
    ),
]
Subset = Annotated[
    str | None,
    typer.Option("--subset", metavar="NAME", help="moon, dark, twilight or all."),
]
Space = Annotated[
    str,
    typer.Argument(metavar="SPACE", help="A space that ships (quick, broadband), or a file."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the space file, e.g. space.depth.high=4. Repeatable.",
    ),
]
Trials = Annotated[int | None, typer.Option("--trials", metavar="N", help="Trials in all.")]
Epochs = Annotated[
    int | None, typer.Option("--epochs", metavar="N", help="Epochs of a full trial.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Of the sampler and of the training.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", metavar="N", help="Trials trained at a time.")
]
Gpus = Annotated[
    float | None, typer.Option("--gpus", metavar="F", help="GPUs per trial; a fraction shares one.")
]
Slots = Annotated[
    int | None,
    typer.Option(
        "--slots", metavar="N", help="Trainings side by side on a GPU. Default: calibrated."
    ),
]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        "--time-limit", metavar="TIME", help="Stop after this time: seconds, or 10m, 1h30m."
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Same seed and machine, same leaderboard; slower."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDR",
        help="Ray cluster to use: auto, or HOST:PORT. Default: a Ray of its own, on loopback.",
    ),
]
Dashboard = Annotated[
    bool, typer.Option("--dashboard", help="Start Ray's dashboard on the loopback address.")
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder or URL of the run.", show_default=False)
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Show finished trials to TensorBoard too.")
]
Mlflow = Annotated[
    bool,
    typer.Option(
        "--mlflow", help="And to MLflow: MLFLOW_TRACKING_URI, else mlflow.db in the run's folder."
    ),
]
Wandb = Annotated[
    bool,
    typer.Option(
        "--wandb", help="And to Weights & Biases: WANDB_PROJECT, WANDB_MODE=offline and so on."
    ),
]


#: The fields of a space file that the short options stand for.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "data": ("data.source",),
    "subset": ("data.subset",),
    "trials": ("search.trials",),
    "epochs": ("training.epochs",),
    "seed": ("search.seed", "training.seed"),
    "workers": ("resources.workers",),
    "gpus": ("resources.gpus_per_trial",),
    "slots": ("resources.slots",),
    "time_limit": ("search.time_limit",),
    "deterministic": ("search.deterministic",),
}


def as_overrides(**given: Any) -> list[str]:
    """Return short options as overrides of a space file; None and False say nothing."""
    return [
        # JSON is YAML: a path or a time arrives as the text that was given.
        f"{field}={json.dumps(value)}"
        for option, value in given.items()
        if value is not None and value is not False
        for field in FIELDS[option]
    ]
