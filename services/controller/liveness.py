"""Who has been heard of lately. Facts of the shell: only their consequence, a lost replica, is an event of the core."""

from __future__ import annotations

Rank = tuple[str, int, int]
"""Replica, incarnation, rank."""


class Liveness:
    """Last word of every rank with a session, on the monotonic clock; every rank counts, not just rank 0."""

    def __init__(self, lost_after_s: float) -> None:
        self._lost_after_s = lost_after_s
        self._heard: dict[Rank, float] = {}
        self._states: dict[Rank, tuple[str, int]] = {}
        self._looked = 0.0

    def hear(self, rank: Rank, now: float) -> None:
        """A rank said something."""
        self._heard[rank] = now

    def note(self, rank: Rank, state: str, progress: int) -> None:
        """What its heartbeat told."""
        self._states[rank] = (state, progress)

    def forget(self, replica: str, incarnation: int) -> None:
        """An incarnation is gone."""
        for rank in [r for r in self._heard if r[:2] == (replica, incarnation)]:
            del self._heard[rank]
            self._states.pop(rank, None)

    def silent(self, now: float) -> list[tuple[Rank, float]]:
        """Ranks silent for too long, with their silence in seconds.

        When this process itself was stopped for a while, its silence is not theirs: everyone is given time again.
        """
        if self._looked and now - self._looked > self._lost_after_s / 2:
            pause = now - self._looked
            self._heard = {rank: at + pause for rank, at in self._heard.items()}
        self._looked = now
        return [(rank, now - at) for rank, at in self._heard.items() if now - at > self._lost_after_s]

    def heartbeat(self, replica: str, incarnation: int, now: float) -> tuple[str, float] | None:
        """What rank 0 last said it was doing, and how long ago."""
        rank = (replica, incarnation, 0)
        if rank not in self._heard:
            return None
        return self._states.get(rank, ("", 0))[0], now - self._heard[rank]
