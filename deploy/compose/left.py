"""What a launcher that was killed has left: containers that go on by themselves, found by what is in the run folder."""

from __future__ import annotations

import time
from pathlib import Path

from deploy.compose.docker import DockerError, docker
from deploy.compose.project import ENVIRONMENT, project_name
from deploy.local.asking import ask_run
from shared.bus import BusError
from shared.messages import StopRun

ASK_S = 5.0
LOOK_S = 0.5


def running(folder: Path) -> list[str]:
    """The containers of the run in `folder` that run; none where there is no Docker."""
    label = f"label=com.docker.compose.project={project_name(folder)}"
    try:
        return docker("ps", "--filter", label, "--format", "{{.Names}}").split()
    except DockerError:
        return []


def end(folder: Path, longest_s: float, *, now: bool) -> bool:
    """End them, after the batch in hand and a checkpoint unless `now`, and remove them; False if they had to be killed.

    The controller ends the run; its container is waited for, at most `longest_s`.
    """
    ended = True
    if not now:
        deadline = time.monotonic() + longest_s
        try:
            ask_run(folder, StopRun("asked by a person"), ASK_S)
            while any("-controller-" in name for name in running(folder)):
                if time.monotonic() > deadline:
                    ended = False
                    break
                time.sleep(LOOK_S)
        except BusError:
            ended = False
    docker("compose", "--env-file", str(folder / ENVIRONMENT), "down", "--timeout", "0")
    return ended
