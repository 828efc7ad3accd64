"""Which fault comes when: a deck of every kind on every role, shuffled by the seed, dealt again when it is used up.

So as many faults as the deck has cards meet every combination once. The same seed and options make the same schedule;
which process a fault meets depends on who is there when it comes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "stop", "term", "cut"]
KINDS: tuple[Kind, ...] = ("kill", "stop", "term")
"""SIGKILL; SIGSTOP and after a while SIGCONT; SIGTERM. `cut`, a partition, needs a namespace."""
LONGEST = 1.6
"""Stops and partitions last at most this many times `bus.lost_after_s`: some are noticed as losses, some are not."""
JITTER = 0.1
"""Share of the interval by which a fault comes early or late."""


@dataclass(frozen=True)
class Fault:
    """A fault `at_s` seconds after the first: `pick` in [0, 1) chooses among the processes of `role`.

    `seconds` is how long a stop or a partition lasts, 0 for the others.
    """

    at_s: float
    kind: Kind
    role: str
    pick: float
    seconds: float


def make_schedule(
    seed: int, faults: int, every_s: float, roles: Sequence[str], kinds: Sequence[Kind], lost_after_s: float
) -> list[Fault]:
    """`faults` faults, about one every `every_s` seconds; none lasts longer than half of that."""
    draw = random.Random(seed)
    cards: list[tuple[Kind, str]] = []
    schedule = []
    for number in range(faults):
        if not cards:
            cards = [(kind, role) for kind in kinds for role in roles]
            draw.shuffle(cards)
        kind, role = cards.pop()
        at = every_s * (number + draw.uniform(-JITTER, JITTER)) if number else 0.0
        pick, share = draw.random(), draw.uniform(0.1, LONGEST)
        seconds = min(share * lost_after_s, every_s / 2) if kind in ("stop", "cut") else 0.0
        schedule.append(Fault(round(at, 2), kind, role, pick, round(seconds, 2)))
    return schedule
