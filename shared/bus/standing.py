"""What a rank says of itself when it registers and in its heartbeats."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.messages import DatasetIdentity, Device, Heartbeat, LeaseRef, Position, Role


@dataclass(frozen=True)
class Passport:
    """What names this process for as long as it lives. `nonce` is that of its replica's start: the ranks share it."""

    role: Role
    replica: str
    rank: int
    world: int
    nonce: int
    pid: int
    host: str
    datasets: Sequence[DatasetIdentity] = ()
    device: Device | None = None


class Standing:
    """What `Register` and `Heartbeat` say of this process: written by the service's threads, read by the bus thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._position: Position | None = None
        self._leases: dict[tuple[int, int], LeaseRef] = {}
        self._state, self._progress = "starting", 0
        self._since = clock()
        self._seconds: dict[str, float] = {}

    def hold(self, position: Position | None) -> None:
        with self._lock:
            self._position = position

    def take_lease(self, ref: LeaseRef) -> None:
        with self._lock:
            self._leases[ref.group, ref.attempt] = ref

    def drop_lease(self, ref: LeaseRef) -> None:
        with self._lock:
            self._leases.pop((ref.group, ref.attempt), None)

    def progress(self, state: str, count: int) -> None:
        with self._lock:
            self._account()
            self._state, self._progress = state, count

    def held(self) -> tuple[Position | None, dict[tuple[int, int], LeaseRef]]:
        with self._lock:
            return self._position, dict(self._leases)

    def heartbeat(self) -> Heartbeat:
        with self._lock:
            self._account()
            seconds = {state: round(spent, 3) for state, spent in self._seconds.items()}
            return Heartbeat(state=self._state, progress=self._progress, seconds=seconds)

    def _account(self) -> None:
        """What has passed since the last look was spent in the state of then."""
        now = self._clock()
        if now > self._since:
            self._seconds[self._state] = self._seconds.get(self._state, 0.0) + now - self._since
        self._since = now
