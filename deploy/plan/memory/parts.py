"""The memory of one process as parts that add up, in each phase of its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 1 << 30
MIB = 1 << 20

Parts = Mapping[str, int]
"""Bytes by what they are for."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What is alive at the fullest moment of one kind of work."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """One process: `role`, which of its replica's ranks, and its phases in a device's memory and in the host's.

    Without a GPU everything is in the host's. `notes` are what follows from the figures.
    """

    role: str
    rank: str
    device: tuple[Phase, ...]
    host: tuple[Phase, ...]
    notes: tuple[str, ...] = ()


def fullest(phases: tuple[Phase, ...]) -> Phase:
    """The phase that decides how much memory is needed."""
    return max(phases, key=lambda phase: phase.total, default=Phase("none", {}))
