"""`orrery audit`: prove from the journal alone that no prompt group was lost or doubled."""

from __future__ import annotations

import typer

from deploy.cli import console
from deploy.cli.runs import RunArgument, find_run


def audit(run: RunArgument = None) -> None:
    """Prove from the journal alone that no prompt group was lost or doubled; exit code 1 if one was."""
    from services.controller.audit import audit_run

    found = audit_run(find_run(run))
    for line in found.lines():
        console.out.print(line, markup=False)
    if not found.clean:
        raise typer.Exit(1)
