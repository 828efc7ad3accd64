"""A Slurm run from this terminal: submitted, then watched. The terminal may be closed; the run does not need it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import typer

from deploy.cli import console
from deploy.cli.live.display import LOOK_S, WATCH_HINT, LiveView
from deploy.cli.progress import PlainProgress
from deploy.cli.report import summarise
from deploy.slurm.client import SlurmError
from deploy.slurm.launcher import cancel_jobs, outcome_of, state_of, submit_controller
from shared.config import Recipe

ASK_EVERY_S = 5.0
"""How often Slurm is asked what has become of the controller's job."""


def submit_and_follow(recipe: Recipe, folder: Path, verbose: bool) -> int:
    """Submit the run and show it to its end; the run's exit code, or 0 for who stops watching."""
    if verbose:
        console.note(f"what processes print is in {folder / 'logs'}/*.out")
    number = submit_controller(recipe, folder)
    console.note(f"run {folder.name} in {folder}: controller's job {number}")
    try:
        code, why = _follow(folder)
    except KeyboardInterrupt:
        console.note(f"the run goes on: 'orrery status {folder.name} --watch' shows it, 'orrery down' stops it")
        return 0
    summarise(folder, code, why)
    return code


def _follow(folder: Path) -> tuple[int, str]:
    """Show the run until its supervisor has told the outcome, or its job is gone without one."""
    view = LiveView(folder, WATCH_HINT) if console.out.is_terminal else None
    shown = view or PlainProgress(folder)
    why = f"the controller's job ended without telling why: see {folder / 'logs' / 'controller-job.out'}"
    ask_at = 0.0
    state: str | None = ""
    with view or contextlib.nullcontext():
        while (outcome := outcome_of(folder)) is None:
            if time.monotonic() >= ask_at:
                ask_at = time.monotonic() + ASK_EVERY_S
                try:
                    now = state_of(folder)
                except SlurmError:
                    now = state  # not known: as before
                if now is None and state is None:  # twice, since the outcome is told just before the job ends
                    break
                if now is not None and now != state:
                    console.note(now)
                state = now
            shown.refresh()
            time.sleep(LOOK_S)
        shown.refresh(final=True)
    return outcome if outcome is not None else (1, why)


def stop(folder: Path, longest_s: float, *, now: bool) -> None:
    """Stop a run: with a checkpoint, or at once; typer.Exit(1) if it does not end."""
    from deploy.local.asking import ask_run
    from shared.bus import BusError
    from shared.messages import StopRun

    state = state_of(folder)
    if now or state is None or "RUNNING" not in state:
        count = cancel_jobs(folder)
        console.note(f"{folder.name}: {count} jobs cancelled" if count else f"{folder.name} is not running")
        return
    console.note(f"stopping {folder.name} ({state})")
    deadline = time.monotonic() + longest_s
    asked = False
    while state_of(folder) is not None:
        if not asked:
            with contextlib.suppress(BusError):
                ask_run(folder, StopRun("asked by a person"), 5.0)
                asked = True
        if time.monotonic() > deadline:
            console.error(
                f"{folder.name} did not stop within {longest_s:g} s: 'orrery down --now {folder}' cancels its jobs"
            )
            raise typer.Exit(1)
        time.sleep(1.0)
    console.note(f"{folder.name} has stopped")
