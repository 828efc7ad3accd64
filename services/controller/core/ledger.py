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
from shared.messages import ArrayHeader, DatasetIdentity, GroupReport, Partial, Purpose, Sampling

GroupState = Literal["queued", "leased", "reported", "assigned", "consumed"]
PURPOSES: tuple[Purpose, ...] = ("sft", "train", "eval")
SAMPLED: tuple[GroupState, ...] = ("leased", "reported")
"""Groups in these states may hold the version back: their tokens wait to be trained."""


class Group(msgspec.Struct):
    """One prompt group. `version` is the weight version of the lease; `oldest`/`newest` are its tokens' versions.

    `told`: the lessee was sent this lease in its session. `kept`: it passed the equal-reward filter. `suite` and
    `category` are those of an evaluation group. `newest_allowed`: tokens of newer versions may be of weights that were
    not compared. `partial` (its payload at `partial_at`) is what a lessee handed over: the next lease goes on from it.
    `handed_over` counts how often that was; `begun` are the tokens that the last lease went on from.
    """

    id: int
    purpose: Purpose
    dataset: str
    fingerprint: str
    epoch: int
    row: int
    seed: int
    samples: int
    sampling: Sampling
    state: GroupState = "queued"
    attempt: int = 0
    wave: int = 0
    replica: str = ""
    incarnation: int = 0
    version: int = 0
    revision: int = 0
    deadline: float = 0.0
    leased_at: float = 0.0
    told: bool = False
    rewards: list[float] = []
    parts: dict[str, list[float]] = {}
    prompt_length: int = 0
    lengths: list[int] = []
    truncated: int = 0
    oldest: int = 0
    newest: int = 0
    seconds: float = 0.0
    judge_seconds: float = 0.0
    arrays: list[ArrayHeader] = []
    spooled: Spooled | None = None
    kept: bool = False
    suite: str = ""
    category: str = ""
    newest_allowed: int | None = None
    partial: Partial | None = None
    partial_at: Spooled | None = None
    handed_over: int = 0
    begun: int = 0

    @property
    def sampled_at(self) -> int:
        """The oldest version that a live token of this group may have: until the report tells, the lease's, or that of
        the tokens which the lease goes on from."""
        if self.state in ("reported", "assigned", "consumed"):
            return self.oldest
        return self.version if self.partial is None else min(self.version, self.partial.oldest)


class Book(msgspec.Struct):
    """What happened to the ids of one lineage, and how often one was handed over part-way, or that was of no use."""

    issued: int = 0
    consumed: int = 0
    settled: int = 0
    discarded: dict[str, int] = {}
    handed_over: int = 0
    partials_dropped: int = 0


class Ledger(msgspec.Struct):
    """Every open or unsettled group by id, and the books of each lineage.

    Indices, so that no event has to look at every group or replica: `shelves` are the groups by state and purpose,
    `ages` how many leased and reported ones were sampled by which version, `lessees` the leased ones by replica,
    `loads` their samples, `unfiltered` the reported ones that the filter has yet to see. `hungry` are the replicas that
    may have room for more: whoever gives a lease back, or becomes ready, is added; leasing strikes off who has none.
    `rewards` are sum and count over the samples reported since the last committed step.
    """

    seed: int
    groups: dict[int, Group] = {}
    shelves: dict[str, dict[int, None]] = {}
    ages: dict[str, dict[int, int]] = {}
    lessees: dict[str, dict[int, None]] = {}
    loads: dict[str, int] = {}
    unfiltered: dict[int, None] = {}
    hungry: dict[str, None] = {}
    next_id: int = 1
    drawn: dict[str, int] = {}
    books: dict[int, Book] = {}
    wave: int = 0
    segment: int = 0
    rewards: list[float] = msgspec.field(default_factory=lambda: [0.0, 0.0])

    # -- looking ------------------------------------------------------------------------------------------------------

    def having(self, state: GroupState, purpose: Purpose | None = None) -> list[Group]:
        """Groups in a state (of a purpose), by id."""
        purposes = PURPOSES if purpose is None else (purpose,)
        numbers = [number for each in purposes for number in self.shelves.get(f"{state} {each}", ())]
        return [self.groups[number] for number in sorted(numbers)]

    def count(self, state: GroupState, purpose: Purpose) -> int:
        """How many groups of a purpose are in a state."""
        return len(self.shelves.get(f"{state} {purpose}", ()))

    def first(self, state: GroupState, purpose: Purpose) -> Group | None:
        """The group that comes first on its shelf: of the leased ones, that whose lease ends first."""
        shelf = self.shelves.get(f"{state} {purpose}")
        return self.groups[next(iter(shelf))] if shelf else None

    def oldest(self, state: Literal["leased", "reported"], purpose: Purpose) -> int | None:
        """The oldest version that may have sampled a token of a group in this state; None without such groups."""
        return min(self.ages.get(f"{state} {purpose}", ()), default=None)

    def sampled_by(self, version: int, purpose: Purpose) -> int:
        """How many leased and reported groups may have tokens of this version or an older one."""
        ages = [self.ages.get(f"{state} {purpose}", {}) for state in SAMPLED]
        return sum(count for each in ages for age, count in each.items() if age <= version)

    def fresh(self) -> list[Group]:
        """Reported training groups that the filter has not seen, by id."""
        return [self.groups[number] for number in sorted(self.unfiltered)]

    def load(self, replica: str) -> int:
        """Samples that a replica has leased."""
        return self.loads.get(replica, 0)

    def held_by(self, replica: str) -> list[Group]:
        """What a replica has leased, by id."""
        return [self.groups[number] for number in sorted(self.lessees.get(replica, ()))]

    def accepted_and_running(self, purpose: Purpose) -> int:
        """Groups of a purpose that run or hold a slot and aren't consumed yet."""
        return self.count("leased", purpose) + self.count("reported", purpose) + self.count("assigned", purpose)

    # -- moving -------------------------------------------------------------------------------------------------------

    def draw(
        self,
        lineage: int,
        purpose: Purpose,
        dataset: DatasetIdentity,
        epoch: int,
        row: int,
        samples: int,
        sampling: Sampling,
        revision: int,
        suite: str = "",
    ) -> Group:
        """Issue a new group for a row; its sampling seed follows from the run's seed, its purpose, epoch and row.

        (Not from its id: ids count evaluations too, and a deterministic run may have to judge twice.) How it is
        sampled, and under which revision, is fixed here: every attempt at a group is alike.
        """
        key = f"{self.seed}/{purpose}/{epoch}/{row}".encode()
        seed = int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1
        group = Group(
            id=self.next_id,
            purpose=purpose,
            dataset=dataset.name,
            fingerprint=dataset.fingerprint,
            epoch=epoch,
            row=row,
            seed=seed,
            samples=samples,
            sampling=sampling,
            revision=revision,
            suite=suite,
        )
        self.next_id += 1
        self.groups[group.id] = group
        self._shelve(group)
        self.book(lineage).issued += 1
        return group

    def lease(self, group: Group, replica: str, incarnation: int, version: int, at: float, until: float) -> None:
        """Give a queued group to a replica: a new attempt."""
        self._expect(group, "queued")
        group.attempt += 1
        group.replica, group.incarnation, group.told = replica, incarnation, False
        group.version, group.leased_at, group.deadline, group.newest_allowed = version, at, until, None
        group.begun = sum(group.partial.lengths) if group.partial is not None else 0
        self._move(group, "leased")

    def report(self, group: Group, report: GroupReport, spooled: Spooled | None) -> None:
        """Take the result of the attempt in force."""
        self._expect(group, "leased")
        group.deadline = 0.0
        group.rewards, group.parts = report.rewards, report.parts
        group.prompt_length, group.lengths, group.truncated = (
            report.prompt_length,
            report.lengths,
            sum(report.truncated),
        )
        group.oldest, group.newest = report.oldest, report.newest
        group.seconds, group.judge_seconds = report.seconds, report.judge_seconds
        group.arrays, group.spooled, group.category = report.arrays, spooled, report.category
        if spooled is not None:
            self.segment = spooled.segment
        self._move(group, "reported")
        group.partial = group.partial_at = None  # its tokens are in the report
        if group.purpose == "train":
            self.unfiltered[group.id] = None
            self.rewards = [self.rewards[0] + sum(group.rewards), self.rewards[1] + len(group.rewards)]

    def requeue(self, group: Group) -> None:
        """Back to the queue; what this attempt has sampled is dropped, the next lease is a new one."""
        self._expect(group, "leased", "reported")
        self._move(group, "queued")
        group.replica, group.incarnation, group.deadline = "", 0, 0.0
        group.rewards, group.parts, group.lengths, group.arrays = [], {}, [], []
        group.spooled, group.kept = None, False

    def hand_over(self, group: Group, lineage: int, partial: Partial, spooled: Spooled) -> None:
        """What was sampled of a queued group: its next lease goes on from there."""
        self._expect(group, "queued")
        group.partial, group.partial_at = partial, spooled
        group.handed_over += 1
        self.segment = spooled.segment
        self.book(lineage).handed_over += 1

    def drop_partial(self, group: Group, lineage: int) -> None:
        """The next lease of a queued group begins anew."""
        self._expect(group, "queued")
        group.partial = group.partial_at = None
        self.book(lineage).partials_dropped += 1

    def keep(self, group: Group) -> None:
        """The group passed the filter."""
        self._expect(group, "reported")
        group.kept = True
        self.unfiltered.pop(group.id, None)

    def assign(self, group: Group) -> None:
        """The group joins a batch."""
        self._expect(group, "reported")
        self._move(group, "assigned")

    def prolong(self, answered: Group, until: float) -> None:
        """The lessee of `answered` is at work: what it was leased since has waited behind it, and has until `until`.

        What was leased before `answered` keeps its deadline, so that a lease that was forgotten ends even if others
        are answered all the time. `until` is never below a deadline given before: shelves stay in order of deadlines.
        """
        for number in self.lessees.get(answered.replica, ()):
            group = self.groups[number]
            if group.leased_at >= answered.leased_at:
                group.deadline = until
                shelf = self.shelves[f"leased {group.purpose}"]
                del shelf[number]
                shelf[number] = None

    def consume(self, group: Group, lineage: int) -> None:
        """Its batch committed (or, for an evaluation, it was judged and leaves the ledger)."""
        self._expect(group, "reported" if group.purpose == "eval" else "assigned")
        self.book(lineage).consumed += 1
        if group.purpose == "eval":
            self._remove(group)
        else:
            self._move(group, "consumed")

    def settle(self, group: Group, lineage: int) -> None:
        """It is inside a durable checkpoint: the ledger forgets it."""
        self._expect(group, "consumed")
        self.book(lineage).settled += 1
        self._remove(group)

    def discard(self, group: Group, lineage: int, cause: str) -> None:
        """End an unconsumed group and give its slot back."""
        self._expect(group, "queued", "leased", "reported", "assigned")
        self._count_discard(lineage, cause)
        self._remove(group)

    def carry(self, group: Group, before: int, lineage: int) -> None:
        """A rollback: the group moves to the new lineage's books; a consumed one is assigned again."""
        if group.state == "consumed":
            self.book(before).consumed -= 1
            self._move(group, "assigned")
        self._count_discard(before, "rollback")
        self.book(lineage).issued += 1

    def book(self, lineage: int) -> Book:
        """The books of a lineage."""
        return self.books.setdefault(lineage, Book())

    def take_reward(self) -> float | None:
        """Mean reward of every sample reported since this was last asked, those filtered out since included."""
        total, count = self.rewards
        self.rewards = [0.0, 0.0]
        return total / count if count else None

    def first_segment(self) -> int:
        """The lowest spool segment that a group still needs; if none is needed, the newest known: it may be in use."""
        places = (place for g in self.groups.values() for place in (g.spooled, g.partial_at) if place is not None)
        return min((place.segment for place in places), default=self.segment)

    def _move(self, group: Group, state: GroupState) -> None:
        self._unshelve(group)
        group.state = state
        self._shelve(group)

    def _remove(self, group: Group) -> None:
        self._unshelve(group)
        del self.groups[group.id]

    def _shelve(self, group: Group) -> None:
        key = f"{group.state} {group.purpose}"
        self.shelves.setdefault(key, {})[group.id] = None
        if group.state in SAMPLED:
            ages, age = self.ages.setdefault(key, {}), group.sampled_at
            ages[age] = ages.get(age, 0) + 1
        if group.state == "leased":
            self.lessees.setdefault(group.replica, {})[group.id] = None
            self.loads[group.replica] = self.load(group.replica) + group.samples

    def _unshelve(self, group: Group) -> None:
        key = f"{group.state} {group.purpose}"
        del self.shelves[key][group.id]
        if group.state in SAMPLED:
            ages, age = self.ages[key], group.sampled_at
            ages[age] -= 1
            if not ages[age]:
                del ages[age]
        if group.state == "leased":
            held = self.lessees[group.replica]
            del held[group.id]
            self.loads[group.replica] -= group.samples
            self.hungry[group.replica] = None
            if not held:
                del self.lessees[group.replica], self.loads[group.replica]
        self.unfiltered.pop(group.id, None)

    def _count_discard(self, lineage: int, cause: str) -> None:
        discarded = self.book(lineage).discarded
        discarded[cause] = discarded.get(cause, 0) + 1

    def _expect(self, group: Group, *states: GroupState) -> None:
        if group.state not in states:
            raise ValueError(f"group {group.id} is {group.state}, expected {' or '.join(states)}")
