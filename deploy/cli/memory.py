"""What `orrery plan --memory` prints: memory by process with its parts, whether it fits, and what would free some."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Table

from deploy.cli import console

if TYPE_CHECKING:
    from deploy.plan.memory.fit import Verdict
    from deploy.plan.memory.model import ModelShape
    from deploy.plan.memory.parts import Phase, ProcessMemory
    from shared.config import Recipe

GIB = 1 << 30
MOST_KNOBS = 5


def show(recipe: Recipe, card: str | None, *, as_json: bool) -> None:
    """Print the plan, on cards of that name if it is given; ends with 1 if something does not fit."""
    from deploy.plan.memory import fit
    from deploy.plan.memory.model import shape_of

    try:
        gpu = fit.gpu_bytes(card) if card is not None else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    shape = shape_of(recipe.model)
    ram = _ram()
    try:
        found = fit.processes(recipe, shape, gpu)
    except ValueError as error:
        console.error(f"[policy.parallel]: {error}")
        raise typer.Exit(2) from error
    verdicts = fit.verdicts(recipe, shape, gpu, ram)
    if as_json:
        print(json.dumps({name: [asdict(process) for process in own] for name, own in found.items()}, indent=1))
    else:
        _show(recipe, shape, found, verdicts, card, gpu, ram)
    if not all(verdict.fits for verdict in verdicts):
        raise typer.Exit(1)


def _show(
    recipe: Recipe,
    shape: ModelShape,
    found: dict[str, list[ProcessMemory]],
    verdicts: list[Verdict],
    card: str | None,
    gpu: int | None,
    ram: int,
) -> None:
    from deploy.plan.memory import fit
    from deploy.plan.memory.parts import fullest

    console.out.print(
        f"{escape(shape.name)}: {shape.parameters:,} parameters in {recipe.model.dtype}, shapes from {shape.source}"
    )
    console.out.print("[dim]GiB of the fullest process of each role, in the phase that needs most[/]")
    hosts = fit.host_bytes(found)
    for role, names in fit.replicas(recipe).items():
        of_role = [process for name in names for process in found[name]]
        on_device = [process for process in of_role if process.device]
        worst = max(on_device or of_role, key=lambda process: fullest(process.device or process.host).total)
        where = f"on {card}" if worst.device else "without a GPU"
        console.out.print(f"\n[bold]{role}[/], {worst.rank}, {where}")
        console.out.print(_parts(worst.device or worst.host))
        for note in worst.notes:
            console.out.print(f"  {escape(note)}")
        if on_device:
            most = max(hosts[name] for name in names)
            console.out.print(f"  memory of the host for a replica's processes together: {_gib(most)} GiB")
    console.out.print("")
    for verdict in verdicts:
        answer = "[green]fits[/]" if verdict.fits else "[red]does not fit[/]"
        what = f"{verdict.role} needs {_gib(verdict.needs)} of {_gib(verdict.available)} GiB"
        console.out.print(f"{answer}  {what} ({verdict.phase.name})")
        for knob in fit.knobs(recipe, shape, gpu, verdict.role, ram)[:MOST_KNOBS]:
            console.out.print(f"      {escape(knob.setting)} frees {_gib(knob.frees)}")
    if gpu is None:
        for role, cards in fit.cards(recipe, shape).items():
            console.out.print(f"[dim]a GPU for each rank of {role}: {', '.join(cards) or 'none that is known'}[/]")


def _parts(phases: tuple[Phase, ...]) -> Table:
    from deploy.plan.memory.parts import fullest

    table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    worst = fullest(phases)
    for name, size in worst.parts.items():
        if size:
            table.add_row(name, _gib(size))
    table.add_row(f"[bold]{worst.name}[/]", f"[bold]{_gib(worst.total)}[/]")
    for phase in phases:
        if phase is not worst:
            table.add_row(f"[dim]{phase.name}[/]", f"[dim]{_gib(phase.total)}[/]")
    return table


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
