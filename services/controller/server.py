"""The controller's loop: the shell with a real bus and a real clock.

Who waits for whom: a reader task takes messages off the bus into a bounded queue; the loop decides on everything that
is there; a committer has what was decided made durable in one go (the group commit, in a thread), and lets the
consequences out. While the disk syncs, the loop decides on what comes next, and a writer (another thread) hands its
payloads to the operating system: they wait for the next commit, which finds them written.
"""

from __future__ import annotations

import asyncio
import time

from services.controller.core.core import Core
from services.controller.core.outcome import EndRun
from services.controller.journal import Journal
from services.controller.launch import LOOK_S, Launch
from services.controller.outputs import Outputs
from services.controller.shell import Clock, Shell
from services.controller.spool import Spool
from shared.bus import Incoming, RouterBus
from shared.telemetry import get_logger

log = get_logger()

TICK_S = 0.1
"""How often silence, deadlines and waits are looked at."""
LAG_S = 0.25
"""How often the loop's lag is measured."""
QUEUE = 1024
BATCH = 256
"""Most messages taken before the committer gets its turn."""


class Controller:
    """One term of one run."""

    def __init__(
        self, core: Core, journal: Journal, spool: Spool, outputs: Outputs, bus: RouterBus, launch: Launch
    ) -> None:
        self._shell = Shell(core, journal, spool, outputs, bus, Clock(time.time, time.monotonic))
        self._outputs = outputs
        self._bus = bus
        self._launch = launch
        self._exit_s = core.recipe.timeouts.exit_s
        self._tick_at = 0.0
        self._queue: asyncio.Queue[Incoming] = asyncio.Queue(QUEUE)
        self._decided = asyncio.Event()
        self._spooled = asyncio.Event()
        self._committed = asyncio.Event()

    async def serve(self, run: str) -> EndRun:
        """Run this term to its end; how the run ended."""
        self._shell.begin(run)
        await self._commit()
        self._outputs.address(await self._bus.start(), self._bus.term)
        log.info("the controller listens", address=self._bus.address, term=self._bus.term)
        jobs = (self._read, self._write_forever, self._commit_forever, self._watch_lag, self._watch_launch)
        tasks = [asyncio.create_task(job()) for job in jobs]
        try:
            while self._shell.ending is None:
                await self._turn(tasks)
            await self._say_goodbye(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._bus.close()
        self._shell.save_snapshot()
        return self._shell.ending

    async def _turn(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            if task.done():
                task.result()
        try:
            async with asyncio.timeout(TICK_S):
                while self._shell.crowded:
                    self._committed.clear()
                    await self._committed.wait()
                self._shell.take(await self._queue.get())
        except TimeoutError:
            pass
        for _ in range(BATCH):
            if self._queue.empty() or self._shell.crowded:
                break
            self._shell.take(self._queue.get_nowait())
        now = time.monotonic()
        if now >= self._tick_at:  # not in each turn: it looks at every replica
            self._tick_at = now + TICK_S
            self._shell.tick()
        self._decided.set()
        self._spooled.set()

    async def _watch_lag(self) -> None:
        """Measure how late the loop wakes: whatever holds it up holds up every message."""
        while True:
            due = time.monotonic() + LAG_S
            await asyncio.sleep(LAG_S)
            self._shell.note_lag(max(0.0, time.monotonic() - due))

    async def _watch_launch(self) -> None:
        """Notice a newer launch without a commit too, and let go of the run's lock, which it waits for."""
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self._launch.check)

    async def _read(self) -> None:
        while True:
            await self._queue.put(await self._bus.recv())

    async def _write_forever(self) -> None:
        while True:
            await self._spooled.wait()
            self._spooled.clear()
            if self._shell.unwritten:
                await asyncio.to_thread(self._shell.write)

    async def _commit_forever(self) -> None:
        while True:
            await self._decided.wait()
            self._decided.clear()
            await self._commit()

    async def _commit(self) -> None:
        """Make durable what was decided, then let its consequences out, until nothing new was decided meanwhile."""
        while True:
            self._shell.seal()
            if self._shell.unsynced:
                await asyncio.to_thread(self._sync)
            self._shell.release()
            self._committed.set()
            if not self._shell.unsynced:
                return

    def _sync(self) -> None:
        """On disk, and still ours to tell of: a launch that began before now may not have read it."""
        self._shell.sync()
        self._launch.check()

    async def _say_goodbye(self, tasks: list[asyncio.Task[None]]) -> None:
        """Give everyone the time to take its Shutdown."""
        until = time.monotonic() + self._exit_s / 2
        # Who says goodbye is no peer any more.
        while (time.monotonic() < until and self._shell.peers) or self._shell.unsynced:
            await self._turn(tasks)
