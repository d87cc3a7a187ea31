"""The tree of commands."""

from __future__ import annotations

from typing import Annotated

import typer

import desisky_tune
from desisky_tune.cli import data_commands, job_commands, model_commands, search_commands
from desisky_tune.cli.options import Debug


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"desisky-tune {desisky_tune.__version__}")
        raise typer.Exit


def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Hyperparameter search for DESI's broadband night-sky brightness model."""
    _help_without_command(context)


def _data(context: typer.Context) -> None:
    """Catalogues and tables of exposures: look at, ingest, simulate, fetch."""
    _help_without_command(context)


def _group(callback: object) -> typer.Typer:
    """Return an empty group with plain help: nothing to load, the same text in a file."""
    return typer.Typer(
        callback=callback,  # type: ignore[arg-type]
        invoke_without_command=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


app = _group(_root)
app.command("search")(search_commands.search)
app.command("resume")(search_commands.resume)
app.command("leaderboard")(search_commands.show_leaderboard)
app.command("report")(search_commands.report)
app.command("export")(search_commands.export)
app.command("train")(model_commands.train)
app.command("predict")(model_commands.predict)
app.command("evaluate")(model_commands.evaluate)
app.command("submit")(job_commands.submit)
app.command("status")(job_commands.status)
app.command("logs")(job_commands.logs)
app.command("stop")(job_commands.stop)
app.command("fetch")(job_commands.fetch)

data_app = _group(_data)
data_app.command("info")(data_commands.info)
data_app.command("ingest")(data_commands.ingest)
data_app.command("simulate")(data_commands.simulate)
data_app.command("fetch")(data_commands.fetch)
app.add_typer(data_app, name="data")
