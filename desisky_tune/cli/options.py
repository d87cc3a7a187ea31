"""Options and arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

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
