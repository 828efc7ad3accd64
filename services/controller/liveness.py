"""Who has been heard of lately. Facts of the shell: only their consequence, a lost replica, is an event of the core."""

from __future__ import annotations

from collections.abc import Mapping

Rank = tuple[str, int, int]
"""Replica, incarnation, rank."""

KINDS = {
    "generating": "generate",
    "judging": "reward",
    "waiting": "wait",
    "training": "train",
    "applying": "train",
    "receiving": "sync",
    "swapping": "sync",
    "staging": "sync",
    "starting": "load",
    "loading": "load",
}
"""What a replica says it does -> where its time goes; all else (encoding, saving, ...) is "other"."""


class Liveness:
    """Last word of every rank with a session, on the monotonic clock; every rank counts, not just rank 0."""

    def __init__(self, lost_after_s: float) -> None:
        self._lost_after_s = lost_after_s
        self._heard: dict[Rank, float] = {}
        self._states: dict[Rank, tuple[str, int]] = {}
        self._spent: dict[Rank, dict[str, float]] = {}
        self._taken: dict[Rank, dict[str, float]] = {}
        self._looked = 0.0

    def hear(self, rank: Rank, now: float) -> None:
        """A rank said something."""
        self._heard[rank] = now

    def note(self, rank: Rank, state: str, progress: int, seconds: Mapping[str, float] | None = None) -> None:
        """What its heartbeat told: what it does, how much is done, and the time it spent in each state so far."""
        self._states[rank] = (state, progress)
        spent: dict[str, float] = {}
        for name, value in (seconds or {}).items():
            kind = KINDS.get(name, "other")
            spent[kind] = spent.get(kind, 0.0) + value
        self._spent[rank] = spent

    def spent(self, replica: str, incarnation: int) -> dict[str, float]:
        """Seconds by kind of work that rank 0 has told of."""
        return {kind: round(value, 3) for kind, value in self._spent.get((replica, incarnation, 0), {}).items()}

    def take_spent(self) -> dict[str, float]:
        """`time/ROLE/KIND`: mean seconds over the replicas of a role (`ROLE-NUMBER`) since this was last asked.

        Rank 0 speaks for its replica: what it waits for is what the others do.
        """
        sums: dict[str, float] = {}
        members: dict[str, int] = {}
        for rank, spent in self._spent.items():
            if rank[2] != 0:
                continue
            role = rank[0].partition("-")[0]
            members[role] = members.get(role, 0) + 1
            before = self._taken.get(rank, {})
            for kind, value in spent.items():
                name = f"time/{role}/{kind}"
                sums[name] = sums.get(name, 0.0) + value - before.get(kind, 0.0)
        self._taken = dict(self._spent)
        return {name: round(value / members[name.split("/")[1]], 4) for name, value in sorted(sums.items())}

    def forget(self, replica: str, incarnation: int) -> None:
        """An incarnation is gone."""
        for rank in [r for r in self._heard if r[:2] == (replica, incarnation)]:
            del self._heard[rank]
            self._states.pop(rank, None)
            self._spent.pop(rank, None)

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
        """What rank 0 last said it was doing, and how long the rank that is silent for longest has been."""
        heard = [at for rank, at in self._heard.items() if rank[:2] == (replica, incarnation)]
        if not heard:
            return None
        return self._states.get((replica, incarnation, 0), ("", 0))[0], now - min(heard)
