"""A container as the supervisor's child: `docker start --attach` is its process, as long as the container runs.

The command hands on the container's output, its exit code, and signals but SIGKILL. Invariant: a container is created
by Compose before it is started, so that `docker compose` knows all of them; a container that runs already, since an
earlier launcher was killed, is attached to, not started.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

from deploy.compose.docker import DockerError, docker
from deploy.local.plan import ReplicaPlan
from deploy.local.process import ChildProcess

KILL_S = 10.0


class ContainerProcess(ChildProcess):
    """The container that `plan.command` ends with. `pids` is where containers write the process ids of replicas."""

    def __init__(self, plan: ReplicaPlan, output: Path, pids: Path) -> None:
        self._name = plan.command[-1]
        self._pids = pids
        super().__init__(plan, output)

    @property
    def known_as(self) -> int:
        """The process id inside the container, which the replica registered with; 0 if it did not come so far."""
        try:
            return int((self._pids / self.plan.replica).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0

    def kill_group(self) -> None:
        """Kill all of the container, if it still runs."""
        if self.code is None:
            with contextlib.suppress(DockerError):  # it has just ended
                docker("kill", "--signal", signal.SIGKILL.name, self._name, timeout_s=KILL_S)

    def _sweep(self) -> None:
        """Nothing is left of a container that has ended; one whose attached command was killed goes on."""

    def _code(self, status: int) -> int:
        """Docker tells a signal as 128 and its number, as shells do."""
        return 128 - status if 128 < status < 128 + signal.NSIG else status
