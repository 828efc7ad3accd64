"""A real Slurm of four nodes on this machine, and what happens to its nodes (`cluster.sh`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.slurm.client import Job

HERE = Path(__file__).parent
NODES = 4
LOGIN = "n0"
"""The node without jobs, where a person types."""
COMMAND_S = 60.0
LOOK_S = 0.5


class Cluster:
    """Use as a context manager: at its end every process and namespace is gone."""

    def __init__(self) -> None:
        # not below pytest's folder, which munge's user cannot enter
        self.folder = Path(tempfile.mkdtemp(prefix="orrery-slurm-"))
        self.folder.chmod(0o755)

    def __enter__(self) -> Cluster:
        try:
            self._script("up", NODES)
            self.wait_for(
                lambda: self.on(LOGIN, "sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(NODES), "nodes"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._script("down")
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, node: str, *command: str) -> list[str]:
        """The command line that runs `command` on a node."""
        return [str(HERE / "cluster.sh"), "on", str(self.folder), node, *command]

    def on(self, node: str, *command: str) -> str:
        """What a command on a node prints."""
        done = subprocess.run(
            self.command(node, *command), capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done.stdout

    def crash(self, node: str) -> None:
        """Every process of the node dies at once."""
        self._script("crash", node)

    def start(self, node: str) -> None:
        """Turn a crashed node on again."""
        self._script("start", node)

    def cut(self, node: str) -> None:
        """Pull its network cable; what runs there goes on."""
        self._script("cut", node)

    def heal(self, node: str) -> None:
        """Put the cable back."""
        self._script("heal", node)

    def jobs(self) -> dict[str, Job]:
        """The jobs that wait or run, by name."""
        told = self.on(LOGIN, "squeue", "--noheader", "--format=%i|%j|%T|%N|%r")
        jobs = [line.strip().split("|", 4) for line in told.splitlines()]
        return {name: Job(int(number), name, state, node, reason) for number, name, state, node, reason in jobs}

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> float:
        """Return once `condition` holds, with the seconds that it took; fails with what the cluster did meanwhile."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() < began + timeout_s, f"waited {timeout_s:g} s for {what}\n{self.story()}"
            time.sleep(LOOK_S)
        return time.monotonic() - began

    def story(self) -> str:
        """For a failed test: the ends of what Slurm wrote."""
        parts = []
        for path in sorted((self.folder / "log").glob("*")):
            parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-10:]))
        return "\n".join(parts)

    def _script(self, action: str, *words: object) -> None:
        command = [str(HERE / "cluster.sh"), action, str(self.folder), *map(str, words)]
        subprocess.run(command, check=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL, env=dict(os.environ))
