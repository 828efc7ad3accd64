"""One run from this terminal: its lock, its supervisor, what is shown meanwhile, and the summary at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape

from deploy.cli import console
from deploy.cli.live.display import Display
from deploy.cli.report import summarise
from deploy.local import RunLock, Supervisor, plan_run
from deploy.local.plan import RunPlan
from deploy.local.supervisor import Deadlines
from deploy.metrics import MetricsWriters
from deploy.readers.lines import LineFollower
from shared.config import Recipe
from shared.telemetry import configure_logging, get_logger

_LOOK_S = 0.25
_PREFIX_COLOURS = ("cyan", "magenta", "yellow", "blue", "green")


def supervise(recipe: Recipe, folder: Path, verbose: bool) -> int:
    """Run what `folder` holds to its end; the supervisor's exit code. RunBusyError if somebody else does."""
    with RunLock(folder):
        configure_logging(folder, "supervisor", "supervisor", console=False)
        console.note(f"run {folder.name} in {folder}")
        code, why = asyncio.run(_run(recipe, folder, plan_run(recipe, folder), verbose))
    summarise(folder, code, why)
    return code


async def _run(recipe: Recipe, folder: Path, plan: RunPlan, verbose: bool) -> tuple[int, str]:
    """The supervisor's exit code, and what went wrong."""
    from shared.bus import ask

    log = get_logger()
    outputs = {p.replica: LineFollower(folder / "logs" / f"{p.replica}.out", at_end=True) for p in plan.replicas}
    with Display(folder, extra=(lambda: _prefixed(outputs)) if verbose else None) as display:

        def tell(text: str) -> None:
            display.tell(text)
            log.info(text)

        times = recipe.timeouts
        deadlines = Deadlines(stop_s=times.step_s + times.checkpoint_s + times.exit_s, exit_s=times.exit_s)
        supervisor = Supervisor(folder, plan.replicas, plan.address, deadlines, ask=ask, tell=tell)
        with MetricsWriters(folder, recipe, tell):
            running = asyncio.create_task(supervisor.run())
            while not running.done():
                await asyncio.wait([running], timeout=_LOOK_S)
                if supervisor.stopping:
                    display.stopping()
        return await running, supervisor.why


def _prefixed(outputs: dict[str, LineFollower]) -> Iterator[str]:
    width = max(map(len, outputs))
    for index, (replica, lines) in enumerate(outputs.items()):
        colour = _PREFIX_COLOURS[index % len(_PREFIX_COLOURS)]
        for line in lines.new():
            yield f"[{colour}]{replica:<{width}}[/] {escape(line)}"
