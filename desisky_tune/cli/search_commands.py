"""`search`, `resume`, `leaderboard`, `report`, `export`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from desisky_tune.cli.console import configuration_text, number, say, show, show_json, table
from desisky_tune.cli.options import (
    Address,
    AsJson,
    Dashboard,
    Data,
    Debug,
    Deterministic,
    Epochs,
    Gpus,
    Mlflow,
    Overrides,
    Run,
    Seed,
    Slots,
    Space,
    Subset,
    TensorBoard,
    TimeLimit,
    Trials,
    Wandb,
    Workers,
    as_overrides,
)
from desisky_tune.cli.progress import search_progress
from desisky_tune.errors import InputError
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.trackers import require_tools, tracking

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from desisky_tune.search.run import SearchResult

#: Rows of the leaderboard that the end of a search shows.
TOP = 10

#: How the models of an evaluation are called.
MODEL_NAMES = {
    "winner": "winner",
    "alone": "winner's configuration alone",
    "default": "documented default",
    "ensemble": "ensemble",
    "classical": "classical model",
    "constant": "constant",
    "trees": "boosted trees",
}


def search(
    space: Space = "quick",
    overrides: Overrides = None,
    runs: Annotated[
        str,
        typer.Option("--runs", metavar="DIR", help="Folder, or URL, that holds the runs."),
    ] = "runs",
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the run. Default: that of the space, numbered."),
    ] = None,
    data: Data = None,
    subset: Subset = None,
    trials: Trials = None,
    epochs: Epochs = None,
    seed: Seed = None,
    workers: Workers = None,
    gpus: Gpus = None,
    slots: Slots = None,
    time_limit: TimeLimit = None,
    deterministic: Deterministic = False,
    warm_start: Annotated[
        list[str] | None,
        typer.Option(
            "--warm-start", metavar="RUN", help="Begin with the best of an earlier run. Repeatable."
        ),
    ] = None,
    address: Address = None,
    dashboard: Dashboard = False,
    tensorboard: TensorBoard = False,
    mlflow: Mlflow = False,
    wandb: Wandb = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search a space of hyperparameters and write the winner's checkpoint."""
    from desisky_tune.search.space import load_spec

    given = as_overrides(
        data=data,
        subset=subset,
        trials=trials,
        epochs=epochs,
        seed=seed,
        workers=workers,
        gpus=gpus,
        slots=slots,
        time_limit=time_limit,
        deterministic=deterministic,
    )
    spec = load_spec(space, [*(overrides or []), *given])
    if warm_start:
        from desisky_tune.search.warm_start import earlier_configurations

        first = earlier_configurations(spec, warm_start)
        given.append(f"search.warm_start={json.dumps(first)}")
        spec = load_spec(space, [*(overrides or []), *given])

    tools = chosen_tools(tensorboard=tensorboard, mlflow=mlflow, wandb=wandb)
    from desisky_tune.search.run import run_search

    with search_progress() as shown, tracking(tools, shown) as on_event:
        result = run_search(
            spec, runs=runs, name=name, address=address, dashboard=dashboard, on_event=on_event
        )
    _show_result(result, as_json)


def resume(
    run: Run,
    address: Address = None,
    dashboard: Dashboard = False,
    tensorboard: TensorBoard = False,
    mlflow: Mlflow = False,
    wandb: Wandb = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Finish a search that was interrupted."""
    tools = chosen_tools(tensorboard=tensorboard, mlflow=mlflow, wandb=wandb)
    from desisky_tune.search.run import resume_search

    with search_progress() as shown, tracking(tools, shown) as on_event:
        result = resume_search(run, address=address, dashboard=dashboard, on_event=on_event)
    _show_result(result, as_json)


def show_leaderboard(
    run: Run,
    every: Annotated[
        bool, typer.Option("--all", help="Pruned and failed trials too, not only complete ones.")
    ] = False,
    finalists: Annotated[
        bool, typer.Option("--finalists", help="Only the finalists, ranked over folds.")
    ] = False,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    debug: Debug = False,
) -> None:
    """Show the trials of a run, best first, and its finalists."""
    from desisky_tune.search.leaderboard import finalists_board, leaderboard, to_csv, to_json

    if as_json and as_csv:
        raise InputError("--json and --csv exclude each other")
    content = RunFolder.open(run).read_search()
    v_derived = bool(content["data"].get("v_derived"))
    ranked = finalists_board(run)
    if finalists and ranked is None:
        raise InputError(f"{run}: no finalists were ranked (evaluation.finalists)")
    board = leaderboard(run) if not finalists or ranked is None else ranked
    shown = board if every or finalists else complete_only(board)
    if as_json:
        show(to_json(shown).rstrip("\n"))
    elif as_csv:
        show(to_csv(shown).rstrip("\n"))
    elif finalists:
        show(finalists_text(shown, v_derived=v_derived))
    else:
        show(board_text(shown, v_derived=v_derived))
        if ranked is not None:
            show("\n" + finalists_text(ranked, v_derived=v_derived))
        if (note := content.get("pretrain")) is not None:
            from desisky_tune.search.pretraining import pretrain_sentence

            show(pretrain_sentence(note))
    if len(shown) < len(board) and not (as_json or as_csv):
        say(f"not shown: {len(board) - len(shown)} pruned or failed (--all shows them too)")


def report(
    run: Run,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder to write. Default: RUN/report."),
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Show the page in the browser afterwards.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a page with the figures of a search and of its winner."""
    from desisky_tune import load_run
    from desisky_tune.data.remote import is_url, refuse_secrets

    if out is None and is_url(run):
        refuse_secrets(run)
        raise InputError(f"{run} is on a URL: say with --out in which folder the report is to be")
    page = load_run(run).report(out)
    show(str(page))
    if open_page:
        import webbrowser

        if not webbrowser.open(page.absolute().as_uri()):
            say("no browser was found to show it in")


def export(
    run: Run,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Checkpoint (.eqx) to write, or ensemble's folder.",
            show_default=False,
        ),
    ],
    trial: Annotated[
        int | None,
        typer.Option("--trial", metavar="ID", help="Number of a trial. Default: the winner."),
    ] = None,
    ensemble: Annotated[
        bool,
        typer.Option("--ensemble", help="The best finalists' members, as a folder of checkpoints."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a trial's best weights as a checkpoint that desisky loads."""
    from desisky_tune.search.export import export_trial

    if ensemble:
        from desisky_tune.search.ensemble import export_ensemble

        if trial is not None:
            raise InputError("--ensemble and --trial exclude each other")
        show(str(export_ensemble(run, out)))
        return

    show(str(export_trial(run, out, trial=trial)))


def chosen_tools(**given: bool) -> list[str]:
    """Return the tools that were asked for; refuse those that are not installed."""
    names = [name for name, wanted in given.items() if wanted]
    require_tools(names)
    return names


def _show_result(result: SearchResult, as_json: bool) -> None:
    if as_json:
        show_json(result_json(result))
        return
    from desisky_tune.search.leaderboard import finalists_board

    v_derived = bool(result.evaluation["v_derived"])
    best = complete_only(result.board).head(TOP)
    show(f"leaderboard of {result.place} (RMSE on the validation rows, mag)")
    show(board_text(best, v_derived=v_derived))
    ranked = finalists_board(result.run_dir)
    if ranked is not None:
        show("\n" + finalists_text(ranked, v_derived=v_derived))
    configuration = configuration_text(result.winner.configuration)
    show(f"\nwinner: trial {result.winner.number} ({configuration})")
    committee = result.evaluation.get("final_fit", {}).get("committee")
    if committee:
        show(
            f"exported: the mean of {committee['trainings']} trainings on folds, of the finalists "
            f"{', '.join(map(str, committee['finalists']))}{_with_classical(committee)}, "
            "as one network"
        )
    show(figures_text(result.evaluation))
    show(f"\ncheckpoint: {checkpoint_place(result)}")
    out = "" if result.place == result.run_dir else " --out DIR"
    show(f"figures: desisky-tune report {shlex.quote(str(result.place))}{out}")


def _with_classical(committee: Mapping[str, Any]) -> str:
    """Say what share the classical model has in a committee, where it has one."""
    share = committee.get("classical")
    return f", with {100 * share:.0f} % of the classical model" if share else ""


def checkpoint_place(result: SearchResult) -> str:
    """Return where the winner's checkpoint lies: a path, or a URL."""
    return f"{result.place}/{result.checkpoint.relative_to(result.run_dir).as_posix()}"


def complete_only(board: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a leaderboard that belong to complete trials."""
    return board[board["state"] == "COMPLETE"]


def board_text(board: pd.DataFrame, *, v_derived: bool) -> str:
    """Return a leaderboard as a table; a V that was derived from g and r is called so."""
    from desisky_tune.search.leaderboard import to_rows

    headings, rows = to_rows(board)
    if v_derived:
        headings[headings.index("V")] = "V (derived)"
    return table(headings, rows, left=0)


def finalists_text(board: pd.DataFrame, *, v_derived: bool) -> str:
    """Return the finalists as a table, the winner first."""
    from desisky_tune.search.leaderboard import finalist_rows

    headings, rows = finalist_rows(board)
    if v_derived:
        headings[headings.index("V")] = "V (derived)"
    title = "finalists, over folds of the training and validation rows (RMSE, mag)"
    return title + "\n" + table(headings, rows, left=0)


def figures_text(evaluation: dict[str, Any]) -> str:
    """Return the RMSE of the winner and of what it is held against, per band, as a table."""
    v_name = "V (derived)" if evaluation["v_derived"] else "V"
    headings = ["RMSE (mag)", "on", v_name, "g", "r", "z", "mean V g r z", "mean g r z", "95 %"]
    rows = []
    for part in ("validation", "test"):
        for model, parts in evaluation["figures"].items():
            values = [parts[part][key] for key in ("V", "g", "r", "z", "mean", "mean_grz")]
            ends = evaluation.get("intervals", {}).get(model, {}).get(part, {}).get("mean_grz")
            spread = " to ".join(map(number, ends)) if ends else "-"
            name = MODEL_NAMES.get(model, model)
            rows.append([name, part_name(evaluation, part), *(number(v) for v in values), spread])
    lines = [table(headings, rows, left=2)]
    if "against_default" in evaluation:
        paired = evaluation["against_default"]["test"]["mean_grz"]
        low, high = paired["interval"]
        lines.append(
            f"winner - documented default on the test rows, mean g r z: "
            f"{paired['difference']:+.4f} mag (95 %: {low:+.4f} to {high:+.4f}, over nights)"
        )
    counts = ", ".join(
        f"{part} {evaluation['rows'][part]} in {evaluation['nights'][part]} nights"
        for part in ("train", "validation", "test")
    )
    lines.append(f"exposures: {counts}")
    if "pretrain" in evaluation:
        lines.append(evaluation["pretrain"])
    if evaluation["v_derived"]:
        lines.append("V is derived from g and r in this table: judge by g, r and z alone")
    return "\n".join(lines)


def part_name(evaluation: dict[str, Any], part: str) -> str:
    """Return how a part of the rows is called: the validation rows may be all of the folds."""
    by_folds = part == "validation" and evaluation.get("validated_on") == "folds"
    return "folds" if by_folds else part


def result_json(result: SearchResult) -> dict[str, Any]:
    """Return what a search left, as JSON-able values."""
    from desisky_tune.search.leaderboard import to_json

    return {
        "run": str(result.place),
        "checkpoint": checkpoint_place(result),
        "winner": {
            "trial": result.winner.number,
            "objective": result.winner.objective,
            "configuration": result.winner.configuration,
        },
        "evaluation": result.evaluation,
        "leaderboard": json.loads(to_json(result.board)),
        "seconds": result.seconds,
    }
