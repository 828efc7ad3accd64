"""One replica's job, from its submission to its end: what the supervisor takes for a process.

A job of the same name that runs or waits already is taken over instead: an earlier supervisor of the run submitted it.
While Slurm cannot be reached nothing is known, and nothing changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from deploy.local.plan import ReplicaPlan
from deploy.slurm import client
from deploy.slurm.client import Job, SlurmError
from shared.service import EXIT_DONE, EXIT_RESTART
from shared.telemetry import get_logger

LOOK_S = 1.0
"""How often Slurm is asked about all jobs together."""
AGAIN_S = 2.0
"""Until Slurm is asked again after it could not be reached."""

log = get_logger()


class Board:
    """The jobs of one run by name, as Slurm last showed them; it is asked once for all."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._jobs: list[Job] = []
        self._seen = asyncio.Event()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        silent = False
        while True:
            try:
                if self._names:
                    self._jobs = await asyncio.to_thread(client.find, sorted(self._names))
                silent = False
            except SlurmError as error:
                if not silent:
                    log.warning("Slurm cannot be asked: jobs stay as they were last seen", why=str(error))
                silent = True
                await asyncio.sleep(AGAIN_S)
                continue
            seen, self._seen = self._seen, asyncio.Event()
            seen.set()
            await asyncio.sleep(LOOK_S)

    async def look(self, name: str) -> list[Job]:
        """The jobs of a name at a look that begins after this call."""
        self._names.add(name)
        for _ in range(2):  # one look may be under way already, and not know this name
            await self._seen.wait()
        return [job for job in self._jobs if job.name == name]


class SlurmJob:
    """See the module. `submit` is called in a thread, and returns the job's number."""

    def __init__(self, plan: ReplicaPlan, name: str, board: Board, submit: Callable[[], int], output: Path) -> None:
        self.plan = plan
        self._name, self._board, self._submit, self._output = name, board, submit, output
        self._number = 0
        self._running_since: float | None = None
        self._dismissed = False
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._begin(self._live())

    @property
    def known_as(self) -> int:
        """Not known: a process of another machine. The controller hears of its end by its silence."""
        return 0

    @property
    def code(self) -> int | None:
        """How it ended, or None while it waits or runs."""
        return self._ended.result() if self._ended.done() else None

    @property
    def age_s(self) -> float:
        """Seconds that it has run."""
        return 0.0 if self._running_since is None else time.monotonic() - self._running_since

    async def wait(self) -> int:
        """The exit code, once the job has ended."""
        return await asyncio.shield(self._ended)

    def signal(self, number: signal.Signals) -> None:
        """SIGTERM: ask the replica to leave; a job that does not run yet is taken out of the queue."""
        self._dismissed = True
        if self.code is None and self._number:
            act = client.cancel if self._running_since is None else client.terminate
            self._begin(self._quietly(act))

    def kill_group(self) -> None:
        """End the job."""
        self._dismissed = True
        if self.code is None and self._number:
            with contextlib.suppress(SlurmError):
                client.cancel(self._number)

    def let_go(self) -> None:
        """Watch it no more, and leave it as it is: another supervisor has it now."""
        for task in self._tasks:
            task.cancel()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, act: Callable[[int], None]) -> None:
        with contextlib.suppress(SlurmError):  # it has ended meanwhile, or the supervisor will see that it has not
            await asyncio.to_thread(act, self._number)

    async def _live(self) -> None:
        try:
            self._number = await self._take_over() or await self._enter()
            self._ended.set_result(await self._watch())
        except Exception as error:
            log.exception("a job cannot be kept", replica_job=self._name)
            self._say(f"{type(error).__name__}: {error}")
            self._ended.set_result(EXIT_RESTART)

    async def _take_over(self) -> int:
        """The number of a job of this name that an earlier supervisor submitted, if there is one."""
        there = sorted(job.number for job in await self._board.look(self._name) if not job.ended)
        if not there:
            return 0
        log.info("job taken over", replica_job=self._name, job=there[-1])
        if there[:-1]:
            await asyncio.to_thread(client.cancel, *there[:-1])
        return there[-1]

    async def _enter(self) -> int:
        while True:
            try:
                number = await asyncio.to_thread(self._submit)
            except SlurmError as error:
                if not error.away:
                    raise
                await asyncio.sleep(AGAIN_S)
                continue
            log.info("job submitted", replica_job=self._name, job=number)
            if self._dismissed:  # asked to leave while it was being submitted
                await self._quietly(client.cancel)
            return number

    async def _watch(self) -> int:
        shown = ""
        missed = 0
        while True:
            mine = [job for job in await self._board.look(self._name) if job.number == self._number]
            missed = 0 if mine else missed + 1
            if mine:
                job = mine[0]
                if job.state == "RUNNING" and self._running_since is None:
                    self._running_since = time.monotonic()
                if (at := f"{job.state} {job.node}") != shown:
                    shown = at
                    log.info(
                        "job", replica_job=self._name, job=job.number, state=job.state, node=job.node, reason=job.reason
                    )
            if missed > 1 or (mine and mine[0].ended):
                return await self._end()

    async def _end(self) -> int:
        try:
            found = await asyncio.to_thread(client.details, self._number)
        except SlurmError as error:
            log.warning("job gone", replica_job=self._name, job=self._number, why=str(error))
            return EXIT_RESTART
        level = log.info if found.state == "COMPLETED" else log.warning
        level(
            "job ended", replica_job=self._name, job=self._number, state=found.state, node=found.node, code=found.code
        )
        self._say(f"job {self._number} on {found.node or 'no node'} ended: {found.state}, code {found.code}")
        if found.state == "COMPLETED":
            return EXIT_DONE
        return found.code or EXIT_RESTART

    def _say(self, text: str) -> None:
        """Among what the replica itself printed."""
        with contextlib.suppress(OSError), self._output.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
