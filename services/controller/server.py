"""The controller's loop: the shell with a real bus and a real clock.

Who waits for whom: a reader task takes messages off the bus into a bounded queue; the loop takes everything that is
there, has it made durable in one go (the group commit, in a thread), and lets the consequences out. While the disk
syncs, the next messages gather.
"""

from __future__ import annotations

import asyncio
import time

from services.controller.core.core import Core
from services.controller.core.outcome import EndRun
from services.controller.journal import Journal
from services.controller.outputs import Outputs
from services.controller.shell import Clock, Shell
from services.controller.spool import Spool
from shared.bus import Incoming, RouterBus
from shared.telemetry import get_logger

log = get_logger()

TICK_S = 0.1
"""How often silence, deadlines and waits are looked at."""
QUEUE = 1024
BATCH = 256
"""Most messages that one group commit covers."""


class Controller:
    """One term of one run."""

    def __init__(self, core: Core, journal: Journal, spool: Spool, outputs: Outputs, bus: RouterBus) -> None:
        self._shell = Shell(core, journal, spool, outputs, bus, Clock(time.time, time.monotonic))
        self._outputs = outputs
        self._bus = bus
        self._exit_s = core.recipe.timeouts.exit_s
        self._queue: asyncio.Queue[Incoming] = asyncio.Queue(QUEUE)

    async def serve(self, run: str) -> EndRun:
        """Run this term to its end; how the run ended."""
        self._shell.begin(run)
        await self._commit()
        self._outputs.address(await self._bus.start(), self._bus.term)
        log.info("the controller listens", address=self._bus.address, term=self._bus.term)
        reader = asyncio.create_task(self._read())
        try:
            while self._shell.ending is None:
                await self._turn(reader)
            await self._say_goodbye(reader)
            return self._shell.ending
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await self._bus.close()

    async def _turn(self, reader: asyncio.Task[None]) -> None:
        if reader.done():
            reader.result()
        try:
            async with asyncio.timeout(TICK_S):
                self._shell.take(await self._queue.get())
        except TimeoutError:
            pass
        for _ in range(BATCH):
            if self._queue.empty():
                break
            self._shell.take(self._queue.get_nowait())
        self._shell.tick()
        await self._commit()

    async def _read(self) -> None:
        while True:
            await self._queue.put(await self._bus.recv())

    async def _commit(self) -> None:
        """Make durable what was decided, then let its consequences out, until nothing new was decided by that."""
        while True:
            if self._shell.unsynced:
                await asyncio.to_thread(self._shell.sync)
            self._shell.release()
            if not self._shell.unsynced:
                return

    async def _say_goodbye(self, reader: asyncio.Task[None]) -> None:
        """Give everyone the time to take its Shutdown, then keep the state for a quick start of the next term."""
        until = time.monotonic() + self._exit_s / 2
        while time.monotonic() < until and self._shell.peers:  # who says goodbye is no peer any more
            await self._turn(reader)
        self._shell.save_snapshot()
