"""`orrery status`: what a run is doing, asked of its controller, or what its journal says if there is none."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from deploy.cli import console
from deploy.cli.runs import RunArgument, find_run
from deploy.local import holder
from shared.messages import Status, StatusRequest

_ASK_S = 3.0


def status(run: RunArgument = None) -> None:
    """Show what a run is doing."""
    folder = find_run(run)
    owner = holder(folder)
    console.out.print(f"[bold]{folder.name}[/]  {f'supervised by process {owner}' if owner else 'not running'}")
    answer = _ask_controller(folder)
    if answer is not None:
        _show(answer.run, 1)
        return
    if owner:
        console.note("its controller does not answer; from its journal:")
    from services.controller.audit import audit_run

    for line in audit_run(folder).lines():
        console.out.print(line, markup=False)


def _ask_controller(folder: Path) -> Status | None:
    from shared.bus import BusError, ask

    try:
        address = (folder / "controller.address").read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        return None
    try:
        answer = ask(address, StatusRequest(), _ASK_S)
    except BusError:
        return None
    return answer if isinstance(answer, Status) else None


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
    return f"{value:.4g}" if isinstance(value, float) else str(value)
