"""`orrery up`, `resume` and `down`: the life of a run on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from deploy.cli import console
from deploy.cli.evaluations import before_and_after, read_evaluations
from deploy.cli.follow import LineFollower
from deploy.cli.progress import ProgressDisplay
from deploy.cli.runs import RunArgument, find_run
from deploy.local import EXIT_INTERRUPTED, RunLock, Supervisor, create_run, holder, plan_run
from deploy.local.plan import RunPlan
from deploy.local.supervisor import Deadlines
from shared.config import Recipe, load_recipe
from shared.telemetry import configure_logging, get_logger

_LOOK_S = 0.25
_PREFIX_COLOURS = ("cyan", "magenta", "yellow", "blue", "green")

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show what every process prints")]


def up(
    recipe: Annotated[Path, typer.Argument(help="TOML file that describes the run")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="override one key")] = None,
    run_folder: Annotated[Path | None, typer.Option(help="where the run lives (default: runs/NAME-DATE-TIME)")] = None,
    verbose: Verbose = False,
) -> None:
    """Run a recipe on this machine to its end."""
    checked = load_recipe(recipe, set_ or [])
    folder = create_run(checked, run_folder)
    raise typer.Exit(_supervise(checked, folder.absolute(), verbose))


def resume(run: RunArgument = None, verbose: Verbose = False) -> None:
    """Go on with a run that was stopped or killed."""
    folder = find_run(run)
    raise typer.Exit(_supervise(load_recipe(folder / "config.toml"), folder, verbose))


def down(
    run: RunArgument = None,
    now: Annotated[bool, typer.Option("--now", help="kill at once, without a checkpoint")] = False,
) -> None:
    """Stop a run after the batch in hand, with a checkpoint; `orrery resume` goes on from there."""
    folder = find_run(run)
    timeouts = load_recipe(folder / "config.toml").timeouts
    owner = holder(folder)
    if owner is None:
        console.note(f"{folder.name} is not running")
        return
    os.kill(owner, signal.SIGTERM)
    if now:
        os.kill(owner, signal.SIGTERM)
    console.note(f"stopping {folder.name} (process {owner})")
    longest = timeouts.step_s + timeouts.checkpoint_s + 4 * timeouts.exit_s
    deadline = time.monotonic() + longest
    while holder(folder) == owner:
        if time.monotonic() > deadline:
            console.error(f"{folder.name} did not stop within {longest:g} s: 'orrery down --now {folder}' kills it")
            raise typer.Exit(1)
        time.sleep(0.1)
    console.note(f"{folder.name} has stopped")


def _supervise(recipe: Recipe, folder: Path, verbose: bool) -> int:
    with RunLock(folder):
        configure_logging(folder, "supervisor", "supervisor", console=False)
        console.note(f"run {folder.name} in {folder}")
        code = asyncio.run(_run(recipe, folder, plan_run(recipe, folder), verbose))
    _summarise(recipe, folder, code)
    return code


async def _run(recipe: Recipe, folder: Path, plan: RunPlan, verbose: bool) -> int:
    from shared.bus import ask

    log = get_logger()

    def tell(text: str) -> None:
        console.note(text)
        log.info(text)

    times = recipe.timeouts
    deadlines = Deadlines(stop_s=times.step_s + times.checkpoint_s + times.exit_s, exit_s=times.exit_s)
    supervisor = Supervisor(folder, plan.replicas, plan.address, deadlines, ask=ask, tell=tell)
    outputs = {p.replica: LineFollower(folder / "logs" / f"{p.replica}.out", at_end=True) for p in plan.replicas}
    with ProgressDisplay(folder) as display:
        running = asyncio.create_task(supervisor.run())
        while not running.done():
            await asyncio.wait([running], timeout=_LOOK_S)
            if verbose:
                for line in _prefixed(outputs):
                    console.out.print(line)
            display.refresh()
        return await running


def _prefixed(outputs: dict[str, LineFollower]) -> Iterator[str]:
    width = max(map(len, outputs))
    for index, (replica, lines) in enumerate(outputs.items()):
        colour = _PREFIX_COLOURS[index % len(_PREFIX_COLOURS)]
        for line in lines.new():
            yield f"[{colour}]{replica:<{width}}[/] {escape(line)}"


def _summarise(recipe: Recipe, folder: Path, code: int) -> None:
    """What the run has come to: accuracy before and after, the audit's verdict, where things lie."""
    judged = before_and_after(read_evaluations(folder / "eval"), rl=recipe.train is not None)
    for when, verdict in zip(("before", "after"), judged, strict=False):
        console.out.print(f"{when:<7} held-out accuracy [bold]{verdict.text}[/] at version {verdict.version}")
    console.out.print(f"audit   {_audit_line(folder)}")
    console.out.print(f"run     {folder}", markup=False)
    if (folder / "export").exists():
        console.out.print(f"export  {folder / 'export'}", markup=False)
    if code == EXIT_INTERRUPTED:
        console.note(f"interrupted; 'orrery resume {folder.name}' goes on")
    elif code:
        console.error(f"the run failed (exit code {code}); logs: 'orrery logs {folder.name}'")


def _audit_line(folder: Path) -> str:
    from services.controller.audit import audit_run

    try:
        clean = audit_run(folder).clean
    except Exception as error:  # the summary must come to its end whatever state a killed run left
        return f"[bold red]cannot be read[/]: {escape(str(error))}"
    return "[bold green]clean[/]" if clean else f"[bold red]NOT clean[/]: see 'orrery audit {folder.name}'"
