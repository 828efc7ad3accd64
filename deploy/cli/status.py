"""`orrery status`: what a run is doing, asked of its controller, or what its journal says if there is none."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from deploy.cli import console
from deploy.cli.runs import RunArgument, find_run

_ASK_S = 3.0


def status(
    run: RunArgument = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="go on showing it until the run ends or Ctrl-C")] = False,
) -> None:
    """Show what a run is doing."""
    from deploy.cli.launchers import runner
    from deploy.cli.live.sources import ask_controller

    folder = find_run(run)
    if watch:
        from deploy.cli.live.watch import watch as watch_run

        watch_run(folder)
        return
    owner = runner(folder)
    console.out.print(f"[bold]{folder.name}[/]  {escape(owner or 'not running')}")
    answer = ask_controller(folder, _ASK_S)
    if answer is not None:
        _show({key: value for key, value in answer.items() if key not in ("hyperparameters", "history")}, 1)
        return
    if owner:
        console.note("its controller does not answer; from its journal:")
    from services.controller.audit import audit_run

    for line in audit_run(folder).lines():
        console.out.print(line, markup=False)


def _show(value: object, depth: int) -> None:
    """Maps as an indented list of keys; a list of maps as one line for each."""
    indent = "  " * depth
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, dict) or (isinstance(inner, list) and any(isinstance(i, dict) for i in inner)):
                console.out.print(f"{indent}[bold]{escape(str(key))}[/]")
                _show(inner, depth + 1)
            else:
                console.out.print(f"{indent}[cyan]{escape(str(key))}[/] {escape(_flat(inner))}")
    elif isinstance(value, list):
        for item in value:
            console.out.print(f"{indent}{escape(_flat(item))}")
    else:
        console.out.print(f"{indent}{escape(_flat(value))}")


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value)) or "none"
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
