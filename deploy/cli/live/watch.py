"""`orrery status --watch`: a run's live view from another terminal; the run itself knows nothing of it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from deploy.cli import console
from deploy.cli.launchers import runner
from deploy.cli.live.display import LOOK_S, WATCH_HINT, LiveView
from deploy.cli.progress import PlainProgress

ASK_EVERY_S = 3.0
"""How often it is looked whether anybody runs the run: a cluster has to be asked."""


def watch(run_folder: Path) -> None:
    """Show the run until it has no supervisor any more, or until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        if console.out.is_terminal:
            with LiveView(run_folder, WATCH_HINT) as shown:
                _show(run_folder, shown)
                shown.refresh(final=True)
        else:
            plain = PlainProgress(run_folder)
            _show(run_folder, plain)
            plain.refresh(final=True)
        console.note(f"{run_folder.name} is not running; 'orrery report {run_folder.name}' tells what it has come to")


def _show(run_folder: Path, shown: LiveView | PlainProgress) -> None:
    while runner(run_folder) is not None:
        until = time.monotonic() + ASK_EVERY_S
        while time.monotonic() < until:
            shown.refresh()
            time.sleep(LOOK_S)
