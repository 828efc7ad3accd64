"""The simulated world: virtual time, a heap of what happens next, randomness by name, and the trace of what happened.

Everything that happens in a simulation happens in `World.run`, one action after the other. Invariant: the same seed,
plan and faults give the same trace, event by event; nothing reads a real clock, and sets are never iterated.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable

TRACE = 4000
"""Lines of the trace that are kept: the last ones."""


class Violation(AssertionError):
    """A rule was broken; the text says which, by whom and when."""


class World:
    """Time in seconds from 0. `after` schedules, `run` lets it happen."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.seed = seed
        self.tracing = tracing
        self.now = 0.0
        self.happened = 0
        self.trace: deque[tuple[float, str]] = deque(maxlen=TRACE)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._random: dict[str, random.Random] = {}
        self._names: dict[str, int] = {}

    def chance(self, name: str) -> random.Random:
        """The stream of randomness of this name: one actor's draws don't shift another's."""
        stream = self._random.get(name)
        if stream is None:
            stream = self._random[name] = random.Random(f"{self.seed}/{name}")
        return stream

    def count(self, name: str) -> int:
        """1, 2, 3 ... for each name."""
        self._names[name] = self._names.get(name, 0) + 1
        return self._names[name]

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Let `action` happen in so many seconds."""
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._number, action))

    def say(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append((self.now, text))

    def run(self, until: Callable[[], bool], most_s: float) -> bool:
        """Let things happen until `until` holds (true) or `most_s` of virtual time have gone (false)."""
        while not until():
            if not self._heap or self._heap[0][0] > most_s:
                return False
            self.now, _, action = heapq.heappop(self._heap)
            self.happened += 1
            action()
        return True
