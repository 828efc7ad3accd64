"""Brings what runs on this machine in line with what the controller wants.

Owned by the supervisor. Once a second the controller is asked for the names of the replicas that shall run: what is
missing is started, and what was started here, is not wanted and does not drain either gets SIGTERM, once. Nothing is
decided here: while the controller does not answer, everything stays as it last said.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from shared.messages import AnyMessage, Wanted, WantedRequest

LOOK_S = 1.0
ASK_S = 2.0
"""The controller is on this machine and answers at once, or is not there."""
ASK_AGAIN_S = 0.2

Ask = Callable[[str, AnyMessage, float], AnyMessage]


class WantedReplicas:
    """Starts a *keeper* (the task that keeps one replica's process alive) for each wanted name that has none.

    `start` makes a keeper, `end` asks the process of a name to leave.
    """

    def __init__(
        self, address: str, ask: Ask, start: Callable[[str], asyncio.Task[None]], end: Callable[[str], None]
    ) -> None:
        self.keepers: dict[str, asyncio.Task[None]] = {}
        self._address = address
        self._ask = ask
        self._start = start
        self._end = end
        self._wanted: frozenset[str] = frozenset()
        self._told: set[str] = set()

    def wants(self, name: str) -> bool:
        """Whether the controller wanted this replica when it last answered."""
        return name in self._wanted

    async def run(self) -> None:
        """Look again and again, until cancelled. Before the controller's first answer nothing is started."""
        while True:
            running = {name for name, keeper in self.keepers.items() if not keeper.done()}
            answer: AnyMessage | None = None
            with contextlib.suppress(Exception):  # not up yet, or being restarted: its own keeper sees to that
                answer = await asyncio.to_thread(self._ask, self._address, WantedRequest(), ASK_S)
            if isinstance(answer, Wanted):
                self._take(answer, running)
            await asyncio.sleep(LOOK_S if isinstance(answer, Wanted) else ASK_AGAIN_S)

    def _take(self, answer: Wanted, running: set[str]) -> None:
        """`running` had a process when the question was put.

        One that ended since may have been told to by a decision that is newer than this answer: it waits for the next.
        """
        self._wanted = frozenset(answer.replicas)
        for name in answer.replicas:
            keeper = self.keepers.get(name)
            if keeper is None or (keeper.done() and name not in running):
                self._told.discard(name)
                self.keepers[name] = self._start(name)
        for name, keeper in self.keepers.items():
            unwanted = name not in self._wanted and name not in answer.draining
            if unwanted and not keeper.done() and name not in self._told:
                self._told.add(name)
                self._end(name)
