"""One child process: started, awaited, ended - with everything that it started itself.

The child leads a process group of its own. So a Ctrl-C in the terminal reaches the supervisor alone, which decides
what it means, and killing the group takes a service's own workers along. The child asks the kernel to be killed with
the supervisor (`shared/service.py`); that is tied to the *thread* that starts it, so it must be
the main thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from deploy.local.plan import ReplicaPlan
from shared.telemetry import log_path


class ChildProcess:
    """A running process of a replica; its stdout and stderr are appended to a file, so that no pipe can block it."""

    def __init__(self, plan: ReplicaPlan, output: Path) -> None:
        self.plan = plan
        self.started = time.monotonic()
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as sink:
            self._popen = subprocess.Popen(
                plan.command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **plan.environment},
                process_group=0,
            )
        self.pid = self._popen.pid
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._watch = os.pidfd_open(self.pid)
        asyncio.get_running_loop().add_reader(self._watch, self._on_end)

    @property
    def code(self) -> int | None:
        """The exit code (negative: the signal that killed it), or None while it runs."""
        return self._ended.result() if self._ended.done() else None

    @property
    def known_as(self) -> int:
        """The process id with which the replica registers."""
        return self.pid

    @property
    def age_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    async def wait(self) -> int:
        """The exit code, once the process has ended."""
        return await asyncio.shield(self._ended)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, if it still runs."""
        if self.code is None:
            self._popen.send_signal(number)

    def kill_group(self) -> None:
        """Kill the process, if it still runs, and whatever it left behind."""
        self._sweep()

    def let_go(self) -> None:
        """A process cannot be handed over: it dies with this one."""

    def _on_end(self) -> None:
        # leftovers go before the leader is reaped: until then nobody else can get its process group's number
        self._sweep()
        code = self._code(self._popen.wait())
        asyncio.get_running_loop().remove_reader(self._watch)
        os.close(self._watch)
        self._ended.set_result(code)

    def _sweep(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _code(self, status: int) -> int:
        return status


def describe_code(code: int) -> str:
    """An exit code for a person: "exit code 3 (fatal)", "killed by SIGKILL"."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    meaning = {0: "done", 2: "the recipe or the arguments cannot work", 3: "fatal for the run", 4: "fenced"}.get(code)
    return f"exit code {code}" + (f" ({meaning})" if meaning else "")


def last_words(run_folder: Path, plan: ReplicaPlan) -> str:
    """Why a replica's newest process ended, for a person: its last error without the traceback, or what it printed."""
    log = log_path(run_folder, plan.role, plan.replica)
    for text in reversed(_tail(log)):
        try:
            line = json.loads(text)
            event, level = line["event"], line["level"]
        except (ValueError, KeyError, TypeError):
            continue  # cut short by a full disk
        if event == f"{plan.role} starts":
            break  # what lies before is of an earlier process
        if level in ("error", "critical"):
            raised = str(line.get("exception", "")).strip().splitlines()
            return str(line.get("why") or (f"{event}: {raised[-1]}" if raised else event))
    printed = _tail(run_folder / "logs" / f"{plan.replica}.out")
    return "\n".join(printed[-1:] if any("Traceback" in line for line in printed) else printed[-5:])


def _tail(path: Path) -> list[str]:
    """The last lines of a file that are not empty; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]
