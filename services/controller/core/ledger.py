"""The ledger: a prompt group's life.

    queued -> leased -> reported -> assigned -> consumed -> settled
       ^         |          |           |
       +---------+          +-----------+----> discarded(cause)

- queued: its row is drawn, nobody works on it; leased: a replica does, until a deadline;
- reported: its samples are spooled; assigned: it belongs to a batch;
- consumed: its batch committed; settled: inside a durable checkpoint (the group leaves the ledger).

A group keeps its id for life; every lease is a new *attempt*, and a report of an older attempt is refused. Each lineage
keeps books: ids issued = consumed + discarded(cause) + open. Evaluation groups live in the same ledger and are consumed
when judged.

The transitions that must not exist: consumed -> queued within a lineage, and anything out of discarded.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal

import msgspec

from services.controller.core.events import Spooled
from shared.messages import ArrayHeader, DatasetIdentity, GroupReport, Purpose

GroupState = Literal["queued", "leased", "reported", "assigned", "consumed"]


class Group(msgspec.Struct):
    """One prompt group. `version` is the weight version of the lease; `oldest`/`newest` are its tokens' versions.

    `kept`: it passed the equal-reward filter.
    """

    id: int
    purpose: Purpose
    dataset: str
    fingerprint: str
    epoch: int
    row: int
    seed: int
    samples: int
    state: GroupState = "queued"
    attempt: int = 0
    wave: int = 0
    replica: str = ""
    incarnation: int = 0
    version: int = 0
    revision: int = 0
    deadline: float = 0.0
    leased_at: float = 0.0
    rewards: list[float] = []
    parts: dict[str, list[float]] = {}
    prompt_length: int = 0
    lengths: list[int] = []
    truncated: int = 0
    oldest: int = 0
    newest: int = 0
    seconds: float = 0.0
    arrays: list[ArrayHeader] = []
    spooled: Spooled | None = None
    kept: bool = False

    @property
    def sampled_at(self) -> int:
        """The oldest version that a live token of this group may have: the lease's until the report tells."""
        return self.oldest if self.state in ("reported", "assigned", "consumed") else self.version


class Book(msgspec.Struct):
    """What happened to the ids of one lineage."""

    issued: int = 0
    consumed: int = 0
    settled: int = 0
    discarded: dict[str, int] = {}


class Ledger(msgspec.Struct):
    """Every open or unsettled group by id, and the books of each lineage."""

    seed: int
    groups: dict[int, Group] = {}
    next_id: int = 1
    drawn: dict[str, int] = {}
    books: dict[int, Book] = {}
    wave: int = 0
    last_report: float = 0.0

    # -- looking ------------------------------------------------------------------------------------------------------

    def having(self, state: GroupState, purpose: Purpose | None = None) -> list[Group]:
        """Groups in a state (of a purpose), by id."""
        return [g for g in self.groups.values() if g.state == state and (purpose is None or g.purpose == purpose)]

    def held_by(self, replica: str) -> list[Group]:
        """What a replica has leased, by id."""
        return [g for g in self.groups.values() if g.state == "leased" and g.replica == replica]

    def accepted_and_running(self, purpose: Purpose) -> int:
        """Groups of a purpose that hold a slot and aren't consumed yet."""
        return sum(g.purpose == purpose and g.state != "consumed" for g in self.groups.values())

    # -- moving -------------------------------------------------------------------------------------------------------

    def draw(
        self, lineage: int, purpose: Purpose, dataset: DatasetIdentity, epoch: int, row: int, samples: int
    ) -> Group:
        """Issue a new group for a row; its sampling seed follows from the run's seed and its id."""
        key = f"{self.seed}/{self.next_id}".encode()
        seed = int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1
        group = Group(self.next_id, purpose, dataset.name, dataset.fingerprint, epoch, row, seed, samples)
        self.next_id += 1
        self.groups[group.id] = group
        self.book(lineage).issued += 1
        return group

    def lease(
        self, group: Group, replica: str, incarnation: int, version: int, revision: int, at: float, until: float
    ) -> None:
        """Give a queued group to a replica: a new attempt."""
        self._expect(group, "queued")
        group.state, group.attempt = "leased", group.attempt + 1
        group.replica, group.incarnation = replica, incarnation
        group.version, group.revision, group.leased_at, group.deadline = version, revision, at, until

    def report(self, group: Group, report: GroupReport, spooled: Spooled | None, at: float) -> None:
        """Take the result of the attempt in force."""
        self._expect(group, "leased")
        group.state, group.deadline = "reported", 0.0
        group.rewards, group.parts = report.rewards, report.parts
        group.prompt_length, group.lengths, group.truncated = (
            report.prompt_length,
            report.lengths,
            sum(report.truncated),
        )
        group.oldest, group.newest, group.seconds = report.oldest, report.newest, report.seconds
        group.arrays, group.spooled = report.arrays, spooled
        self.last_report = at

    def requeue(self, group: Group) -> None:
        """Back to the queue; what was sampled so far is dropped, the next lease is a new attempt."""
        self._expect(group, "leased", "reported")
        group.state, group.replica, group.incarnation, group.deadline = "queued", "", 0, 0.0
        group.rewards, group.parts, group.lengths, group.arrays = [], {}, [], []
        group.spooled, group.kept = None, False

    def assign(self, group: Group) -> None:
        """The group joins a batch."""
        self._expect(group, "reported")
        group.state = "assigned"

    def release(self, group: Group) -> None:
        """Its batch was given up before any step committed: the group waits for another."""
        self._expect(group, "assigned")
        group.state = "reported"

    def consume(self, group: Group, lineage: int) -> None:
        """Its batch committed (or, for an evaluation, it was judged and leaves the ledger)."""
        self.book(lineage).consumed += 1
        if group.purpose == "eval":
            self._expect(group, "reported")
            del self.groups[group.id]
            return
        self._expect(group, "assigned")
        group.state = "consumed"

    def settle(self, group: Group, lineage: int) -> None:
        """It is inside a durable checkpoint: the ledger forgets it."""
        self._expect(group, "consumed")
        self.book(lineage).settled += 1
        del self.groups[group.id]

    def discard(self, group: Group, lineage: int, cause: str) -> None:
        """End an unconsumed group and give its slot back."""
        self._expect(group, "queued", "leased", "reported", "assigned")
        self._count_discard(lineage, cause)
        del self.groups[group.id]

    def carry(self, group: Group, before: int, lineage: int) -> None:
        """A rollback: the group moves to the new lineage's books; a consumed one is assigned again."""
        if group.state == "consumed":
            self.book(before).consumed -= 1
            group.state = "assigned"
        self._count_discard(before, "rollback")
        self.book(lineage).issued += 1

    def book(self, lineage: int) -> Book:
        """The books of a lineage."""
        return self.books.setdefault(lineage, Book())

    def first_segment(self) -> int | None:
        """The lowest spool segment that a group still needs; None when none needs any."""
        return min((g.spooled.segment for g in self.groups.values() if g.spooled is not None), default=None)

    def _count_discard(self, lineage: int, cause: str) -> None:
        discarded = self.book(lineage).discarded
        discarded[cause] = discarded.get(cause, 0) + 1

    def _expect(self, group: Group, *states: GroupState) -> None:
        if group.state not in states:
            raise ValueError(f"group {group.id} is {group.state}, expected {' or '.join(states)}")
