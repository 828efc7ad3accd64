"""The `orrery` command: start, watch and steer runs. Each group of commands has a file; none imports torch."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script; every installation has it, also one without the packages of the `cli` extra."""
    try:
        from deploy.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"the orrery command needs {error.name}, which is not installed here: pip install 'orrery[cli]'")
    run()
