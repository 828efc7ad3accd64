"""`orrery status --watch`: a run's live view from another terminal; the run itself knows nothing of it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from deploy.cli import console
from deploy.cli.launchers import runner
from deploy.cli.live.display import LOOK_S, WATCH_HINT, LiveView
from deploy.cli.progress import PlainProgress


def watch(run_folder: Path) -> None:
    """Show the run until it has no supervisor any more, or until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        if console.out.is_terminal:
            with LiveView(run_folder, WATCH_HINT) as shown:
                while runner(run_folder) is not None:
                    shown.refresh()
                    time.sleep(LOOK_S)
                shown.refresh(final=True)
        else:
            plain = PlainProgress(run_folder)
            while runner(run_folder) is not None:
                plain.refresh()
                time.sleep(LOOK_S)
            plain.refresh(final=True)
        console.note(f"{run_folder.name} is not running; 'orrery report {run_folder.name}' tells what it has come to")
