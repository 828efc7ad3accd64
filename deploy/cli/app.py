"""Gathers the commands and turns the errors that a person can cause into one red line and exit code 2."""

from __future__ import annotations

import sys

import typer

from deploy.cli import audit, console, logs, run, status
from deploy.cli.runs import RunNotFoundError
from deploy.local.folder import RunBusyError
from shared.config import RecipeError

app = typer.Typer(
    help="Post-train language models with services that survive anything.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command("up")(run.up)
app.command("resume")(run.resume)
app.command("down")(run.down)
app.command("status")(status.status)
app.command("logs")(logs.logs)
app.command("audit")(audit.audit)


def main() -> None:
    """The console script `orrery`."""
    try:
        app()
    except (RecipeError, RunNotFoundError, RunBusyError, FileExistsError) as error:
        console.error(str(error))
        sys.exit(2)
