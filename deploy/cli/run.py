"""`orrery up`, `resume` and `down`: the life of a run. What takes time to import is imported late."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import console
from deploy.cli.launchers import Launcher, check, runner, start
from deploy.cli.runs import RunArgument, find_run

LauncherOption = Annotated[
    Launcher | None, typer.Option("--launcher", "-l", help="what starts the processes (default: local)")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show what every process prints")]


def up(
    recipe: Annotated[Path, typer.Argument(help="TOML file that describes the run")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="override one key")] = None,
    run_folder: Annotated[Path | None, typer.Option(help="where the run lives (default: runs/NAME-DATE-TIME)")] = None,
    launcher: LauncherOption = None,
    verbose: Verbose = False,
) -> None:
    """Run a recipe to its end."""
    from deploy.checks.apart import look_apart
    from deploy.local import create_run, note_launcher
    from shared.config import load_recipe

    checked = load_recipe(recipe, set_ or [])
    chosen = launcher or Launcher.local
    check(chosen, checked)
    faults = look_apart(checked)
    for fault in faults:
        console.error(fault)
    if faults:
        raise typer.Exit(2)
    folder = create_run(checked, run_folder)
    note_launcher(folder, chosen.value)
    raise typer.Exit(start(chosen, checked, folder.absolute(), verbose))


def resume(
    run: RunArgument = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="change how a policy computes, say policy.parallel.fsdp=4"),
    ] = None,
    launcher: Annotated[
        Launcher | None, typer.Option("--launcher", "-l", help="what starts the processes (default: as last time)")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Go on with a run that was stopped or killed, or with one that 'orrery pause' holds back."""
    from deploy.cli.live.sources import ASK_S, ask_controller
    from deploy.cli.steer import tell
    from deploy.local import RunLock, launcher_of, note_launcher
    from deploy.local.folder import change_recipe
    from shared.config import load_recipe
    from shared.messages import ResumeRun

    folder = find_run(run)
    answer = ask_controller(folder, ASK_S) if runner(folder) is not None else None
    if answer is not None and answer.get("paused"):
        tell(folder, ResumeRun())
        return
    with RunLock(folder):
        recipe = change_recipe(folder, set_) if set_ else load_recipe(folder / "config.toml")
    chosen = launcher or Launcher(launcher_of(folder))
    check(chosen, recipe)
    note_launcher(folder, chosen.value)
    raise typer.Exit(start(chosen, recipe, folder, verbose))


def down(
    run: RunArgument = None,
    now: Annotated[bool, typer.Option("--now", help="kill at once, without a checkpoint")] = False,
) -> None:
    """Stop a run after the batch in hand, with a checkpoint; `orrery resume` goes on from there."""
    from deploy.local import holder, launcher_of
    from shared.config import load_recipe

    folder = find_run(run)
    timeouts = load_recipe(folder / "config.toml").timeouts
    longest = timeouts.step_s + timeouts.checkpoint_s + 4 * timeouts.exit_s
    if launcher_of(folder) == Launcher.slurm:
        from deploy.cli.slurm import stop

        stop(folder, longest, now=now)
        return
    owner = holder(folder)
    if owner is None and (left := runner(folder)) is not None:
        from deploy.compose.left import end

        console.note(f"stopping {folder.name}, {left}")
        ended = end(folder, longest, now=now)
        console.note(f"{folder.name} has stopped" if ended or now else f"{folder.name} did not stop: it was killed")
        return
    if owner is None:
        console.note(f"{folder.name} is not running")
        return
    os.kill(owner, signal.SIGTERM)
    if now:
        os.kill(owner, signal.SIGTERM)
    console.note(f"stopping {folder.name} (process {owner})")
    deadline = time.monotonic() + longest
    while holder(folder) == owner:
        if time.monotonic() > deadline:
            console.error(f"{folder.name} did not stop within {longest:g} s: 'orrery down --now {folder}' kills it")
            raise typer.Exit(1)
        time.sleep(0.1)
    console.note(f"{folder.name} has stopped")
