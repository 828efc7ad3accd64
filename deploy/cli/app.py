"""Gathers the commands and turns the errors that a person can cause into one red line and exit code 2."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from deploy.cli import (
    audit,
    config,
    console,
    doctor,
    eval,
    hyperparameters,
    keys,
    logs,
    mesh,
    model,
    plan,
    report,
    run,
    samples,
    status,
    steer,
)
from deploy.cli.runs import RunNotFoundError

app = typer.Typer(
    help="Post-train language models with services that survive anything.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command("up")(run.up)
app.command("resume")(run.resume)
app.command("down")(run.down)
app.command("status")(status.status)
app.command("pause")(steer.pause)
app.command("checkpoint")(steer.checkpoint)
app.command("evaluate")(steer.evaluate)
app.command("drain")(steer.drain)
app.command("scale")(steer.scale)
app.command("set")(hyperparameters.set_)
app.command("get")(hyperparameters.get)
app.command("history")(hyperparameters.history)
app.command("revert")(hyperparameters.revert)
app.command("plan")(plan.plan)
app.command("logs")(logs.logs)
app.command("audit")(audit.audit)
app.command("samples")(samples.samples)
app.command("eval")(eval.evaluate)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.command("model")(model.model)
app.add_typer(config.app, name="config")
app.add_typer(mesh.app, name="mesh")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """The console script `orrery`."""
    try:
        app()
    except (RunNotFoundError, FileExistsError) as error:
        _leave(error)
    except Exception as error:
        from deploy.compose.docker import DockerError
        from deploy.local.folder import RunBusyError, RunFolderError
        from deploy.slurm.client import SlurmError
        from shared.bus.errors import KeysRefused, TurnedAway
        from shared.config import RecipeError

        known = RecipeError | RunBusyError | RunFolderError | DockerError | SlurmError | KeysRefused | TurnedAway
        if not isinstance(error, known):
            raise
        _leave(error)


def _leave(error: Exception) -> NoReturn:
    console.error(str(error))
    sys.exit(2)
