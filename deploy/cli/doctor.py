"""`orrery doctor`: what this machine can run, what is missing, and how to get it."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.markup import escape

from deploy.cli import console
from deploy.cli.runs import RUNS

_MARKS = {"ok": "[green]ok     [/]", "note": "[yellow]note   [/]", "missing": "[bold red]missing[/]"}


def doctor() -> None:
    """Look at this machine: Python, packages, memory, disk, network; exit code 1 if a run could not work."""
    from deploy.checks.machine import look

    found = list(look(Path(RUNS)))
    for finding in found:
        advice = f"  [cyan]{escape(finding.advice)}[/]" if finding.advice else ""
        console.out.print(f"{_MARKS[finding.state]} {escape(finding.what):<18} {escape(finding.detail)}{advice}")
    missing = [finding.what for finding in found if finding.state == "missing"]
    if missing:
        console.error(f"runs cannot work here until this is mended: {', '.join(missing)}")
        raise typer.Exit(1)
    console.out.print("[bold green]runs can work here[/]: 'orrery up recipes/quickstart.toml' starts one")
