"""One run from this terminal: its lock, its supervisor, what is shown meanwhile, and the summary at its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from rich.markup import escape

from deploy.cli import console
from deploy.cli.live.display import Display
from deploy.cli.report import summarise
from deploy.local import RunLock, Supervisor, plan_run
from deploy.local.plan import RunPlan
from deploy.local.process import ChildProcess
from deploy.local.supervisor import Deadlines, Start
from deploy.metrics import MetricsWriters
from deploy.readers.lines import LineFollower
from shared.config import Recipe, load_recipe
from shared.telemetry import configure_logging, get_logger

_LOOK_S = 0.25
_PREFIX_COLOURS = ("cyan", "magenta", "yellow", "blue", "green")


Launch = Callable[[Recipe, Path], AbstractContextManager[tuple[RunPlan, Start]]]
"""How a run's processes are started, for as long as it is supervised."""


def on_this_machine(recipe: Recipe, folder: Path) -> AbstractContextManager[tuple[RunPlan, Start]]:
    """Each process as a child of this one."""
    return contextlib.nullcontext((plan_run(recipe, folder), ChildProcess))


def supervise(recipe: Recipe, folder: Path, verbose: bool, launch: Launch = on_this_machine) -> int:
    """Run what `folder` holds to its end; the supervisor's exit code. RunBusyError if somebody else does."""
    with RunLock(folder):
        configure_logging(folder, "supervisor", "supervisor", console=False)
        console.note(f"run {folder.name} in {folder}")
        with launch(recipe, folder) as (plan, start):
            code, why = asyncio.run(_run(load_recipe(folder / "config.toml"), folder, plan, start, verbose))
    summarise(folder, code, why)
    return code


async def _run(recipe: Recipe, folder: Path, plan: RunPlan, start: Start, verbose: bool) -> tuple[int, str]:
    """The supervisor's exit code, and what went wrong."""
    from shared.bus import ask, keys_place

    log = get_logger()
    outputs = _Outputs(folder / "logs")
    with Display(folder, extra=outputs.new if verbose else None) as display:

        def tell(text: str) -> None:
            display.tell(text)
            log.info(text)

        times = recipe.timeouts
        deadlines = Deadlines(stop_s=times.step_s + times.checkpoint_s + times.exit_s, exit_s=times.exit_s)
        ask_controller = partial(ask, keys=keys_place(recipe.bus.keys))
        supervisor = Supervisor(folder, plan, deadlines, ask=ask_controller, tell=tell, start=start)
        with MetricsWriters(folder, recipe, tell):
            running = asyncio.create_task(supervisor.run())
            while not running.done():
                await asyncio.wait([running], timeout=_LOOK_S)
                if supervisor.stopping:
                    display.stopping()
        return await running, supervisor.why


class _Outputs:
    """What the processes print from now on, however many there come to be."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._known: dict[str, LineFollower] = {}
        for path in sorted(logs.glob("*.out")):
            self._known[path.stem] = LineFollower(path, at_end=True)

    def new(self) -> Iterator[str]:
        """New lines, each behind the name of its process."""
        for path in sorted(self._logs.glob("*.out")):
            if path.stem not in self._known:
                self._known[path.stem] = LineFollower(path)
        width = max(map(len, self._known), default=0)
        for index, (replica, lines) in enumerate(self._known.items()):
            colour = _PREFIX_COLOURS[index % len(_PREFIX_COLOURS)]
            for line in lines.new():
                yield f"[{colour}]{replica:<{width}}[/] {escape(line)}"
