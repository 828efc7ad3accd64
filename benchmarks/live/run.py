"""`orrery up` of a recipe, and the processes that belong to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.machine import ROOT
from shared.records import JOURNAL

LOOK_S = 0.1
STOP_S = 120.0
BOOT_FRACTION_S = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) - psutil.boot_time()
"""The kernel tells when it was booted in whole seconds, and psutil adds a process's age to that."""


def leave_nothing_behind() -> None:
    """Have SIGTERM end this process as an exception does, so that runs in `with` blocks are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@dataclass(frozen=True, order=True)
class ServiceProcess:
    """One process of a service: `started` in seconds since the epoch, from the kernel."""

    role: str
    replica: str
    rank: int
    pid: int
    started: float


class RunEnded(Exception):
    """The run ended before what was waited for."""


class LiveRun:
    """One run and its supervisor. Use as a context manager: whatever still runs at its end is ended by process id.

    `inside` is put before the command, to start it somewhere else (a network namespace).
    """

    def __init__(self, folder: Path, inside: Sequence[str] = ()) -> None:
        self.folder = folder
        self.output = folder.with_suffix(".txt")
        self._inside = tuple(inside)
        self._supervisor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def up(self, recipe: Path, overrides: Sequence[str]) -> LiveRun:
        """Start it."""
        command = [*self._inside, sys.executable, "-m", "deploy.cli", "up", str(recipe)]
        command += ["--run-folder", str(self.folder)]
        for override in overrides:
            command += ["--set", override]
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("wb") as sink:
            self._supervisor = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        return self

    @property
    def code(self) -> int | None:
        """The exit code of `orrery up`, or None while it runs."""
        return None if self._supervisor is None else self._supervisor.poll()

    def orrery(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Run another `orrery` command on this run; what it printed. RuntimeError if it fails."""
        command = [*self._inside, sys.executable, "-m", "deploy.cli", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            said = (done.stdout + done.stderr).strip()
            raise RuntimeError(f"'orrery {' '.join(arguments)}' ended with code {done.returncode}: {said}")
        return done.stdout

    def processes(self) -> list[ServiceProcess]:
        """Live service processes, by role, replica and rank."""
        if self._supervisor is None:
            return []
        try:
            children = psutil.Process(self._supervisor.pid).children()
        except psutil.NoSuchProcess:
            return []
        return sorted(found for found in map(_service, children) if found is not None)

    def committed(self) -> int:
        """Bytes of metrics.jsonl: grows with every committed step."""
        try:
            return (self.folder / "metrics.jsonl").stat().st_size
        except FileNotFoundError:
            return 0

    def wait_for_step(self, timeout_s: float) -> None:
        """Return once a step is committed. RunEnded, or TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not self.committed():
            self.check_alive("its first step")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no step was committed within {timeout_s:g} s:\n{self.tail()}")
            time.sleep(LOOK_S)

    def wait(self, timeout_s: float) -> int:
        """The exit code of `orrery up`; TimeoutError with what it printed last."""
        assert self._supervisor is not None
        try:
            return self._supervisor.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the run did not end within {timeout_s:g} s:\n{self.tail()}") from None

    def check_alive(self, before: str) -> None:
        """RunEnded when the supervisor has ended."""
        if self.code is not None:
            raise RunEnded(f"the run ended with code {self.code} before {before}:\n{self.tail()}")

    def end(self) -> None:
        """End what still runs: as a person would, then by SIGKILL (the kernel takes the services along)."""
        if self._supervisor is None or self._supervisor.poll() is not None:
            return
        for _ in range(2):  # the second SIGTERM asks for an end at once
            self._supervisor.send_signal(signal.SIGTERM)
            time.sleep(LOOK_S)
        try:
            self._supervisor.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()

    def tail(self, lines: int = 15) -> str:
        """What the command printed last."""
        return "\n".join(self.output.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    @property
    def has_journal(self) -> bool:
        """Whether there is anything to read."""
        return (self.folder / JOURNAL).is_dir()


def _service(process: psutil.Process) -> ServiceProcess | None:
    """What a child of the supervisor is, by its command line; None for anything that is no service."""
    try:
        command = process.cmdline()
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        started = process.create_time() + BOOT_FRACTION_S
    except psutil.NoSuchProcess:
        return None
    role = next((word.removeprefix("services.") for word in command if word.startswith("services.")), "")
    if not role:
        return None
    return ServiceProcess(
        role, _option(command, "--replica", role), int(_option(command, "--rank", "0")), process.pid, started
    )


def _option(command: Sequence[str], name: str, default: str) -> str:
    return command[command.index(name) + 1] if name in command[:-1] else default
