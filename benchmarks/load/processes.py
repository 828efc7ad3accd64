"""Starting, measuring and surely ending the processes of a measurement."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from shared.service import PARENT_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
LOOK_S = 0.02


class Child:
    """One process of a measurement, by name. `cpu_s` and `resident_kb` are of the process alone."""

    def __init__(self, name: str, arguments: Sequence[str], log: IO[bytes], *, piped: bool = False) -> None:
        self.name = name
        environment = os.environ | {PARENT_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else log,
            stderr=log,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def line(self) -> str:
        """The next line that a piped process prints."""
        assert self._process.stdout is not None
        text = self._process.stdout.readline().strip()
        if not text:
            raise RuntimeError(f"{self.name} ended (code {self._process.wait(10)}) instead of printing a line")
        return text

    def tell(self, question: dict[str, Any]) -> None:
        """Write one JSON line to a piped process."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next JSON line that it prints."""
        return json.loads(self.line())

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Tell, and wait for the answer."""
        self.tell(question)
        return self.answer()

    def running(self) -> bool:
        """Whether it has not ended yet; RuntimeError when it ended badly."""
        code = self._process.poll()
        if code:
            raise RuntimeError(f"{self.name} ended with code {code}")
        return code is None

    def check(self) -> None:
        """RuntimeError if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise RuntimeError(f"{self.name} ended early with code {code}")

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # it ended with a line unread
                    pipe.close()

    def cpu_s(self) -> float:
        """CPU seconds used so far, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_kb(self) -> int:
        """Resident memory."""
        text = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(text.partition("VmRSS:")[2].split()[0])


@contextlib.contextmanager
def children(log_path: Path) -> Iterator[Children]:
    """Processes that are all gone when the block ends; what they print goes to `log_path`."""
    with log_path.open("ab") as log:
        group = Children(log)
        try:
            yield group
        finally:
            for child in group.all:
                child.kill()


class Children:
    """See `children`."""

    def __init__(self, log: IO[bytes]) -> None:
        self._log = log
        self.all: list[Child] = []

    def start(self, name: str, *arguments: str, piped: bool = False) -> Child:
        """Start `python -m ARGUMENTS`."""
        child = Child(name, arguments, self._log, piped=piped)
        self.all.append(child)
        return child


def wait_for_address(folder: Path, controller: Child, timeout_s: float, *, term: int = 1) -> str:
    """The address that the controller of this term tells, once it listens."""
    until = time.monotonic() + timeout_s
    path = folder / "controller.address"
    while time.monotonic() < until:
        controller.check()
        if path.exists():
            address, told = path.read_text(encoding="utf-8").split()
            if int(told) == term:
                return address
        time.sleep(LOOK_S)
    raise TimeoutError(f"the controller did not listen within {timeout_s:g} s")
