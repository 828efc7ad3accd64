"""`orrery plan`: which processes a recipe would start, what each needs, and by which command."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deploy.cli import console

if TYPE_CHECKING:
    from deploy.plan import LaunchPlan, Process

MOST_NAMES = 4
"""Names in one line of the table; more are told by their number."""


def plan(
    recipe: Annotated[Path, typer.Argument(help="TOML file that describes the run")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="override one key")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="every process, for other programs")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="memory of each process, part by part")] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="CARD", help="with --memory: a card a rank, H100-80GB or just 80GB")
    ] = None,
) -> None:
    """Show the processes that a recipe starts: ranks, GPUs, environment and command, whatever the launcher."""
    from deploy.plan import CONTROLLER, Place, launch_plan
    from shared.config import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if memory:
        from deploy.cli.memory import show

        show(loaded, gpu, as_json=as_json)
        return
    if gpu is not None:
        raise typer.BadParameter("--gpu says what --memory is held against: give that too")
    planned = launch_plan(loaded)
    if as_json:
        print(json.dumps(planned.as_json(), indent=1))
        return
    console.out.print(_table(planned))
    ranks, gpus, cpus = (sum(getattr(p, each) for p in planned.processes) for each in ("ranks", "gpus", "cpus"))
    console.out.print(f"in all: {len(planned.processes)} processes, {ranks} ranks, {gpus} GPUs, {cpus} CPUs\n")
    for role in dict.fromkeys(process.role for process in planned.processes):
        first = next(process for process in planned.processes if process.role == role)
        name = role if role == CONTROLLER else f"{role}-N"
        command = shlex.join(("python", *replace(first, name=name).arguments(Place())))
        console.out.print(f"[bold]{role:<10}[/] {escape(command)}")
    console.out.print("[dim]RUN: the run's folder; ADDRESS: the controller's, from the launcher[/]")


def _table(planned: LaunchPlan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("replicas", "number", "nodes", "ranks", "GPUs", "CPUs", "environment"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("replicas", "environment") else "right")
    alike: dict[tuple[object, ...], list[Process]] = {}
    for process in planned.processes:
        needs = (process.role, process.environment, process.ranks, process.gpus, process.cpus)
        alike.setdefault(needs, []).append(process)
    for processes in alike.values():
        first = processes[0]
        names = ", ".join(p.name for p in processes) if len(processes) <= MOST_NAMES else f"{first.name}, ..."
        numbers = [str(each) for each in (len(processes), first.nodes, first.ranks, first.gpus, first.cpus)]
        table.add_row(escape(names), *numbers, first.environment)
    return table
