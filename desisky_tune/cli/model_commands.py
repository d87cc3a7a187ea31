"""`train`, `predict`, `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from desisky_tune.cli.console import configuration_text, number, say, show, show_json, table
from desisky_tune.cli.options import AsJson, Data, Debug, Subset
from desisky_tune.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from desisky_tune.data.features import FeatureTable
    from desisky_tune.data.splits import Split
    from desisky_tune.inference import Evaluation, Predictor
    from desisky_tune.search.backend import Progress
    from desisky_tune.search.single import SingleTraining

#: What `--rows` takes.
ROWS = ("all", "train", "validation", "test")

#: Instead of a checkpoint: the weights that desisky publishes.
PUBLISHED = "published"

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A .eqx file, or 'published' for the weights that desisky publishes.",
        show_default=False,
    ),
]


def train(
    out: Annotated[
        Path, typer.Option("--out", metavar="OUT.eqx", help="Checkpoint to write.")
    ] = Path("broadband.eqx"),
    data: Data = None,
    subset: Subset = None,
    width: Annotated[
        int | None, typer.Option("--width", metavar="N", help="Units per layer.  [default: 128]")
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", metavar="N", help="Hidden layers.  [default: 5]")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", metavar="F", help="Of Adam.  [default: 1e-4]"),
    ] = None,
    huber_delta: Annotated[
        float | None,
        typer.Option("--huber-delta", metavar="F", help="Of the Huber loss, mag.  [default: 0.25]"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", help="Rows per step.  [default: 32]"),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", metavar="NAME", help="constant or cosine.  [default: constant]"),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option("--warmup", metavar="F", help="Share of the steps, 0 to 1.  [default: 0]"),
    ] = None,
    final_rate: Annotated[
        float | None,
        typer.Option("--final-rate", metavar="F", help="Share of the learning rate.  [default: 0]"),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option("--weight-decay", metavar="F", help="Of AdamW.  [default: 0]"),
    ] = None,
    gradient_clip: Annotated[
        float | None,
        typer.Option("--gradient-clip", metavar="F", help="Longest gradient.  [default: any]"),
    ] = None,
    early_stopping: Annotated[
        int | None,
        typer.Option(
            "--early-stopping", metavar="N", help="Epochs without a better value.  [default: never]"
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", metavar="N", help="Passes over the data.  [default: 500]"),
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", metavar="NAME", help="huber or l2.  [default: huber]")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Of weights and shuffles.  [default: 0]"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="COLUMN",
            help="Keep rows that share this column together; 'row' splits at random.  "
            "[default: NIGHT]",
        ),
    ] = None,
    split_seed: Annotated[
        int | None,
        typer.Option("--split-seed", metavar="N", help="Of the split.  [default: 0]"),
    ] = None,
    from_run: Annotated[
        str | None,
        typer.Option(
            "--from-run",
            metavar="RUN",
            help="Take data, split and configuration from a run's trial; options given here count.",
        ),
    ] = None,
    trial: Annotated[
        int | None,
        typer.Option("--trial", metavar="ID", help="The trial of --from-run. Default: the winner."),
    ] = None,
    every: Annotated[
        int, typer.Option("--print-every", metavar="N", min=1, help="Epochs between two lines.")
    ] = 50,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train one model and write it as a checkpoint that desisky loads."""
    from desisky_tune.search.single import new_training, repeated_training, train_single

    space = _given(
        width=width,
        depth=depth,
        learning_rate=learning_rate,
        huber_delta=huber_delta,
        batch_size=batch_size,
        schedule=schedule,
        warmup=warmup,
        final_rate=final_rate,
        weight_decay=weight_decay,
        gradient_clip=gradient_clip,
        early_stopping=early_stopping,
    )
    training = _given(epochs=epochs, loss=loss, seed=seed)
    rows = {
        "data": _given(source=data, subset=subset),
        "split": _given(by=split, seed=split_seed),
    }
    if from_run is None:
        if trial is not None:
            raise InputError("--trial needs --from-run: the run that the trial belongs to")
        plan = new_training({**rows, "space": space, "training": training})
    else:
        if any(rows.values()):
            raise InputError(
                "--from-run brings the run's own exposures and split: "
                "leave --data, --subset, --split, --split-seed out"
            )
        plan = repeated_training(from_run, trial, space=space, training=training)
    say(
        f"training on {len(plan.split.train)} exposures, choosing the epoch on "
        f"{len(plan.split.validation)}: {configuration_text(plan.configuration)}, "
        f"{plan.spec.training.epochs} epochs, seed {plan.seed}"
    )
    progress = train_single(plan, out, every=every, on_progress=_print_progress)
    _show_training(plan, progress, out, as_json)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _print_progress(progress: Progress) -> None:
    say(
        f"epoch {progress.epochs}: train loss {progress.curve['train_loss'][-1]:.5f}, "
        f"validation loss {progress.curve['test_loss'][-1]:.5f}, "
        f"best RMSE {progress.objective:.4f} mag at epoch {progress.best_epoch}"
    )


def _show_training(plan: SingleTraining, progress: Progress, out: Path, as_json: bool) -> None:
    """Show the figures of the file just written, read back, on the validation rows."""
    from desisky_tune.inference import evaluate as measure

    evaluation = measure(str(out), plan.table, plan.split.validation, train_rows=plan.split.train)
    if as_json:
        show_json(
            {
                "checkpoint": str(out),
                "configuration": dict(plan.configuration),
                "seed": plan.seed,
                "epochs": progress.epochs,
                "objective": progress.objective,
                "best_epoch": progress.best_epoch,
                "curve": dict(progress.curve),
                "validation": evaluation.as_dict(),
            }
        )
        return
    show(evaluation_text(evaluation, f"{out}, validation rows"))
    show(f"checkpoint: {out}")


def predict(
    checkpoint: Checkpoint,
    exposures: Annotated[
        Path,
        typer.Argument(
            metavar="TABLE", help="CSV, ECSV, FITS or Parquet of conditions.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Table to write (.csv, .ecsv, .fits, .parquet): TABLE with SKY_MAG_*_PRED.",
            show_default=False,
        ),
    ],
    debug: Debug = False,
) -> None:
    """Predict the sky's magnitudes for a table of exposures."""
    from desisky_tune.data.exposures import read_table
    from desisky_tune.data.tables import write_table
    from desisky_tune.inference import predict_frame

    if exposures.resolve() == out.resolve():
        raise InputError(f"OUT {out}: is the table itself; name another file")
    predictor = _load(checkpoint)
    result = predict_frame(predictor, read_table(exposures, require_magnitudes=False))
    write_table(result, out)
    for note in result.attrs["notes"]:
        say(f"note: {note}")
    show(str(out))


def evaluate(
    checkpoint: Checkpoint,
    data: Data = None,
    subset: Subset = None,
    split_from: Annotated[
        str | None,
        typer.Option(
            "--split-from",
            metavar="RUN",
            help="Use the exposures and the split of a run.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        str,
        typer.Option(
            "--rows", metavar="PART", help="all, or a part of the split: train, validation, test."
        ),
    ] = "all",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a checkpoint on real exposures, beside the classical model and a constant."""
    from desisky_tune.data.features import load_features
    from desisky_tune.inference import evaluate as measure
    from desisky_tune.inference import recorded_split

    if rows not in ROWS:
        raise InputError(f"--rows {rows}: one of {', '.join(ROWS)}")
    if split_from is not None and (data is not None or subset is not None):
        raise InputError("--split-from brings the run's own exposures: leave --data, --subset out")
    predictor = _load(checkpoint)
    drawn: Split | None = None
    if split_from is not None:
        features, drawn = _run_data(split_from)
    else:
        features = load_features(data or "sv1", subset or "moon")
    # The exported winner of finalists has learnt from the run's validation rows, too.
    own = recorded_split(predictor.meta, features)
    split = own or drawn
    evaluation = measure(
        predictor,
        features,
        _chosen(rows, drawn or own, checkpoint),
        train_rows=split.train if split is not None else None,
    )
    if as_json:
        show_json({"checkpoint": checkpoint, "part": rows, **evaluation.as_dict()})
        return
    show(evaluation_text(evaluation, f"{checkpoint}, {rows} rows"))


def _load(checkpoint: str) -> Predictor:
    from desisky_tune.inference import load_predictor

    return load_predictor(None if checkpoint == PUBLISHED else checkpoint)


def _run_data(run: str) -> tuple[FeatureTable, Split]:
    """Return the exposures and the split of a run."""
    from desisky_tune.search.origin import open_run

    opened = open_run(run)
    return opened.table, opened.split


def _chosen(part: str, split: Split | None, checkpoint: str) -> np.ndarray | None:
    if part == "all":
        return None
    if split is None:
        raise InputError(
            f"--rows {part}: {checkpoint} records no split that fits this table; "
            "give a run with --split-from"
        )
    chosen: np.ndarray = getattr(split, part)
    if not len(chosen):
        raise InputError(
            f"--rows {part}: {checkpoint} was fitted to the {part} rows of its split, too, and "
            "none are left; choose test, or all"
        )
    return chosen


def evaluation_text(evaluation: Evaluation, title: str) -> str:
    """Return an evaluation as tables: per band over all rows, then by night."""
    rows = [
        [
            row["model"],
            row["band"],
            number(row["rmse"]),
            number(row.get("bias"), "+.4f"),
            number(row.get("nmad")),
            number(row.get("outlier_fraction"), ".3f"),
        ]
        for row in evaluation.table_rows()
    ]
    bands = table(["model", "band", "RMSE", "bias", "NMAD", "beyond 0.4 mag"], rows, left=2)
    lines = [
        f"{title}: {evaluation.rows} exposures in {len(evaluation.by_night)} nights "
        "(mag; residual = prediction - observation)",
        bands,
        "",
        night_text(evaluation),
        *(f"note: {note}" for note in evaluation.notes),
    ]
    return "\n".join(lines)


def night_text(evaluation: Evaluation) -> str:
    """Return a table with a line per night; means are over g, r, z where V was derived."""
    bands = ("g", "r", "z") if evaluation.v_derived else ("V", "g", "r", "z")
    others = [name for name in evaluation.figures if name != "checkpoint"]
    lines = []
    for night, models in evaluation.by_night.items():
        own = models["checkpoint"].bands

        def mean(quantity: str, figures: Mapping[str, Mapping[str, float]] = own) -> float:
            return sum(figures[band][quantity] for band in bands) / len(bands)

        lines.append(
            [
                night,
                int(own["g"]["n"]),
                *(number(own[band]["rmse"], ".3f") for band in bands),
                number(mean("rmse"), ".3f"),
                number(mean("bias"), "+.3f"),
                number(mean("nmad"), ".3f"),
                number(mean("outlier_fraction"), ".3f"),
                *(number(mean("rmse", models[name].bands), ".3f") for name in others),
            ]
        )
    headings = [
        "night",
        "exposures",
        *(f"RMSE {band}" for band in bands),
        "mean",
        "bias",
        "NMAD",
        "beyond 0.4 mag",
        *(f"{name} RMSE" for name in others),
    ]
    return f"by night (mag; means over {', '.join(bands)})\n{table(headings, lines)}"
