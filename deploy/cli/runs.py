"""From what a person types to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUNS = Path("runs")
RunArgument = Annotated[str | None, typer.Argument(metavar="[RUN]", help="a run's folder or id (default: runs/latest)")]


class RunNotFoundError(Exception):
    """No run is where a person looked for one."""


def find_run(run: str | None) -> Path:
    """The folder of `run` (a path, or an id below runs/; None: the newest); RunNotFoundError with what there is."""
    from deploy.local.folder import newest_run

    if run is None:
        newest = newest_run(RUNS)
        if newest is None:
            raise RunNotFoundError(f"no run in {RUNS.absolute()} yet: 'orrery up recipes/quickstart.toml' starts one")
        return newest
    for folder in (Path(run), RUNS / run):
        if (folder / "config.toml").exists():
            return folder.resolve()
    known = sorted(path.parent.name for path in RUNS.glob("*/config.toml") if path.parent.name != "latest")
    there = ", ".join(known[-5:]) if known else "none"
    raise RunNotFoundError(f"{run} is no run (no config.toml in it); runs in {RUNS.absolute()}: {there}")
