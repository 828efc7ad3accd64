"""One session's reliable, ordered channel, both directions, without sockets and without a clock.

Outgoing: `push` numbers a message from 1; `due` says what to send again; `acknowledge` takes the peer's cumulative
acks; a bounded window pushes back. Incoming: `arrive` says of a sequence number whether to deliver it, drop it or wait
for what is missing; `mark_durable` separates "received in order" from "may be acknowledged", because the controller
acknowledges only what its disk has. Go-back-N: one gap makes the sender repeat everything after it.

Used by the client's session, by the router and by the simulator, which pass the time in (seconds, any origin).
Invariant: whatever the network loses, repeats or reorders, what was pushed is delivered once, in order.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Generic, TypeVar

Item = TypeVar("Item")

MOST_PATIENCE = 4
"""Repeats without an answer come further and further apart, up to this many times `resend_s`."""


class Arrival(Enum):
    """What an incoming sequence number is."""

    NEXT = "next"
    DUPLICATE = "duplicate"
    GAP = "gap"


class WindowFull(Exception):
    """The peer owes acknowledgements for a whole window: nothing more may be pushed until some come."""


class Channel(Generic[Item]):
    """See the module. `window` is in messages; an item is whatever the owner needs to send a message again."""

    def __init__(self, *, window: int, resend_s: float) -> None:
        self._window = window
        self._resend_s = resend_s
        self.repeats = 0
        self.gaps = 0
        self.resent = 0
        self._begin()

    def _begin(self) -> None:
        self._outgoing: deque[Item] = deque()
        self._acknowledged = 0
        self._patience_s = self._resend_s
        self._due_at: float | None = None
        self.waiting_since: float | None = None
        """When the oldest unacknowledged message began to wait, or the last progress was made; None if none waits."""
        self.received = 0
        """Every incoming message up to this number has been delivered."""
        self.durable = 0
        """Every incoming message up to this number may be acknowledged."""
        self._nothing_to_keep: set[int] = set()

    def reset(self) -> list[Item]:
        """Begin a new session: all numbers from 1. Returns what the peer never acknowledged, in order."""
        unacknowledged = self.unacknowledged()
        self._begin()
        return unacknowledged

    # --- outgoing ---

    @property
    def full(self) -> bool:
        return len(self._outgoing) >= self._window

    def unacknowledged(self) -> list[Item]:
        """What the peer has not acknowledged, in order."""
        return list(self._outgoing)

    def push(self, item: Item, now: float) -> int:
        """Number `item` and keep it until acknowledged. WindowFull if the peer owes a whole window."""
        if self.full:
            raise WindowFull(f"{len(self._outgoing)} messages are unacknowledged, the window's size")
        if not self._outgoing:
            self._wait_afresh(now)
        self._outgoing.append(item)
        return self._acknowledged + len(self._outgoing)

    def acknowledge(self, sequence: int, now: float) -> int:
        """Take a cumulative ack; returns how many messages it freed (0 for an old one, or for one never sent)."""
        freed = sequence - self._acknowledged
        if not 0 < freed <= len(self._outgoing):
            return 0
        for _ in range(freed):
            self._outgoing.popleft()
        self._acknowledged = sequence
        if self._outgoing:
            self._wait_afresh(now)
        else:
            self._due_at = self.waiting_since = None
        return freed

    def due(self, now: float) -> list[tuple[int, Item]]:
        """What to send again now: all that is unacknowledged, if nothing was acknowledged for too long."""
        if self._due_at is None or now < self._due_at:
            return []
        self._patience_s = min(2 * self._patience_s, MOST_PATIENCE * self._resend_s)
        self._due_at = now + self._patience_s
        self.resent += len(self._outgoing)
        return list(enumerate(self._outgoing, self._acknowledged + 1))

    def _wait_afresh(self, now: float) -> None:
        self._patience_s = self._resend_s
        self._due_at = now + self._resend_s
        self.waiting_since = now

    # --- incoming ---

    def arrive(self, sequence: int) -> Arrival:
        """Say what `sequence` is; NEXT means that it counts as received, and the caller must deliver it."""
        if sequence <= self.received:
            self.repeats += 1
            return Arrival.DUPLICATE
        if sequence > self.received + 1:
            self.gaps += 1
            return Arrival.GAP
        self.received = sequence
        return Arrival.NEXT

    def mark_durable(self, sequence: int) -> None:
        """Everything received up to `sequence` may be acknowledged. ValueError for what has not been received."""
        if sequence > self.received:
            raise ValueError(f"sequence {sequence} cannot be durable: only {self.received} have been received")
        self.durable = max(self.durable, sequence)
        while self.durable + 1 in self._nothing_to_keep:
            self.durable += 1
            self._nothing_to_keep.discard(self.durable)

    def step_over(self, sequence: int) -> None:
        """`sequence` was received but refused: durable as soon as all before it is, since there is nothing to keep."""
        self._nothing_to_keep.add(sequence)
        self.mark_durable(self.durable)
