"""`orrery mesh ls`: the process groups of a run, by epoch, as its controller knows them."""

from __future__ import annotations

import typer
from rich.table import Table

from deploy.cli import console
from deploy.cli.runs import RunArgument, find_run

_ASK_S = 3.0
app = typer.Typer(help="The process groups that weights travel over.", no_args_is_help=True)


@app.callback()
def mesh() -> None:
    """The process groups that weights travel over."""


@app.command("ls")
def ls(run: RunArgument = None) -> None:
    """List the meshes: epoch, purpose, state, members; those that formed, and the last ones that were revoked."""
    from deploy.cli.live.sources import ask_controller

    folder = find_run(run)
    answer = ask_controller(folder, _ASK_S)
    if answer is None:
        console.error(f"{folder.name} has no controller that answers: meshes live and end with the run")
        raise typer.Exit(1)
    meshes = answer.get("meshes")
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("epoch", "purpose", "backend", "state", "formed", "transfer", "members"):
        table.add_column(column)
    for it in meshes if isinstance(meshes, list) else []:
        members = list(it["members"])
        formed = f"{len(it['formed'])}/{len(members)}" if "formed" in it else ""
        version = f"version {it['transfer']}" if it.get("transfer") is not None else ""
        cells = (str(it["epoch"]), it.get("purpose", ""), it.get("backend", ""), it["state"], formed, version)
        table.add_row(*cells, ", ".join(members))
    console.out.print(table if table.row_count else "no mesh yet: the first is formed when weights have to travel")
