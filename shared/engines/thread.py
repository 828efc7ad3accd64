"""The thread on which a hosted engine's asyncio loop runs, and how its caller waits for what is done there.

Who waits for a backend stops waiting when a process of it has ended, and when the replica was lost meanwhile: a worker
that is silent, not dead, is seen by the controller alone. Invariant: whatever ends a wait says who waited for what.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from shared.bus import BusClient, BusError
from shared.engines.base import EngineDied, EngineError

LOOK_S = 0.1
"""How often a caller who waits for the engine looks whether it still lives."""

T = TypeVar("T")


class EngineThread:
    """Runs coroutines of the engine `name`; `death` tells how a process of it ended, if one did.

    `client` is that of the replica, whose end ends every wait.
    """

    def __init__(self, name: str, death: Callable[[], str | None], client: BusClient | None) -> None:
        self._name = name
        self._death = death
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin a coroutine; called from any thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T], limit_s: float, what: str) -> T:
        """Run a coroutine to its end, and return what it does. EngineError as it comes, EngineDied for all else.

        BusError if the replica has ended meanwhile.
        """
        future = self.start(work)
        until = time.monotonic() + limit_s
        try:
            while not future.done() and time.monotonic() < until and self._death() is None:
                wait([future], timeout=LOOK_S)
                if self._client is not None:
                    self._client.raise_if_ended()
        except BusError:
            future.cancel()
            raise
        if not future.done():
            future.cancel()
            self.raise_if_dead()
            raise EngineDied(f"{self._name} did not {what} within {limit_s:g} s")
        try:
            return future.result()
        except Exception as error:
            failure = self.failed(what, error)
            if failure is error:
                raise
            raise failure from error

    def failed(self, what: str, error: Exception) -> Exception:
        """What to raise for a backend's error: a fresh process may do better, unless the backend says what is wrong."""
        if isinstance(error, EngineError):
            return error
        return EngineDied(f"{self._name} could not {what}: {self._death() or f'{type(error).__name__}: {error}'}")

    def raise_if_dead(self) -> None:
        """EngineDied if a process of the engine has ended by itself."""
        death = self._death()
        if death is not None:
            raise EngineDied(f"{self._name} died: {death}")

    def stop(self, last: Coroutine[Any, Any, None], limit_s: float) -> None:
        """Run `last`, however it ends, then end the loop and the thread."""
        wait([self.start(last)], timeout=limit_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(limit_s)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()
