"""The ledger under any sequence of moves: each group in exactly one state, every index right, and books that balance.

Hypothesis makes every move, the forbidden ones too, on groups in every state; a model of its own keeps where each group
is, and each lineage's account of the ids that it issued.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.controller.core.events import Spooled
from services.controller.core.ledger import PURPOSES, Group, Ledger
from shared.messages import ArrayHeader, DatasetIdentity, GroupReport, Partial, Sampling

DATASET = DatasetIdentity("train", 100, "aa")
SAMPLING = Sampling(1.0, 1.0, 0, 16)
STATES = ("queued", "leased", "reported", "assigned", "consumed")
REPLICAS = ("rollout-0", "rollout-1")
AFTER = {
    "lease": {"queued": "leased"},
    "report": {"leased": "reported"},
    "requeue": {"leased": "queued", "reported": "queued"},
    "hand over": {"queued": "queued"},
    "drop partial": {"queued": "queued"},
    "keep": {"reported": "reported"},
    "assign": {"reported": "assigned"},
    "consume": {"assigned": "consumed"},
    "settle": {"consumed": "gone"},
    "discard": {"queued": "gone", "leased": "gone", "reported": "gone", "assigned": "gone"},
}
"""Where each move leads from each state that allows it."""
picks = st.integers(0, 1 << 16)
versions = st.integers(0, 3)


@dataclass
class Entry:
    """One open or unsettled group, as the model knows it. `came` counts up with every change of state."""

    purpose: str
    samples: int
    state: str = "queued"
    came: int = 0
    attempt: int = 0
    replica: str = ""
    version: int = 0
    oldest: int = 0
    rewards: list[float] = field(default_factory=list)
    segment: int | None = None
    partial: tuple[int, int, int] | None = None
    """Tokens that were handed over, the oldest version of them, their segment."""
    begun: int = 0
    kept: bool = False
    filtered: bool = True
    """Whether the filter has nothing to do with it."""


@dataclass
class Account:
    """What became of the ids of a lineage."""

    issued: set[int] = field(default_factory=set)
    consumed: set[int] = field(default_factory=set)
    settled: set[int] = field(default_factory=set)
    handed_over: int = 0
    dropped: int = 0
    discarded: dict[int, str] = field(default_factory=dict)


class LedgerMachine(RuleBasedStateMachine):
    """A move from a state that does not allow it must fail and change nothing."""

    @initialize(seed=st.integers(0, 1 << 32))
    def begin(self, seed: int) -> None:
        self.ledger = Ledger(seed=seed)
        self.lineage, self.moves, self.drawn = 1, 0, 0
        self.entries: dict[int, Entry] = {}
        self.accounts = {1: Account()}
        self.hungry: set[str] = set()
        self.reported: list[float] = []

    # -- driving and comparing ---

    def pick(self, number: int, states: tuple[str, ...] = STATES) -> int | None:
        """One of the groups in these states, or of all when there is none."""
        likely = [group for group, entry in self.entries.items() if entry.state in states]
        groups = likely or list(self.entries)
        return groups[number % len(groups)] if groups else None

    def move(self, kind: str, number: int, make: Callable[[Group], object]) -> Entry | None:
        """Make a move; the entry, with its new state, when it was allowed."""
        entry, group = self.entries[number], self.ledger.groups[number]
        after = AFTER[kind].get(entry.state)
        if kind == "consume" and entry.purpose == "eval":
            after = "gone" if entry.state == "reported" else None
        if after is None:
            before = msgspec.msgpack.encode(self.ledger)
            with pytest.raises(ValueError, match=f"group {number} is {entry.state}, expected"):
                make(group)
            assert msgspec.msgpack.encode(self.ledger) == before, "a move that is refused changes nothing"
            return None
        make(group)
        if entry.state == "leased":
            self.hungry.add(entry.replica)
        if kind == "keep":
            entry.kept = entry.filtered = True
        if after == entry.state:
            return entry
        self.moves += 1
        entry.state, entry.came, entry.filtered = after, self.moves, True
        if after == "gone":
            del self.entries[number]
        return entry

    @property
    def account(self) -> Account:
        return self.accounts[self.lineage]

    # -- what happens ---

    @rule(purpose=st.sampled_from(PURPOSES), samples=st.integers(1, 3), count=st.integers(1, 3))
    def groups_are_drawn(self, purpose: str, samples: int, count: int) -> None:
        for _ in range(count):
            self.drawn += 1
            row = self.drawn % DATASET.length
            group = self.ledger.draw(self.lineage, purpose, DATASET, 0, row, samples, SAMPLING, 0)  # type: ignore[arg-type]
            assert group.id == self.drawn, "an id is used once"
            self.moves += 1
            self.entries[group.id] = Entry(purpose, samples, came=self.moves)
            self.account.issued.add(group.id)

    @precondition(lambda self: self.entries)
    @rule(which=picks, likely=st.booleans(), replica=st.sampled_from(REPLICAS), version=versions)
    def a_group_is_leased(self, which: int, likely: bool, replica: str, version: int) -> None:
        number = self.pick(which, ("queued",) if likely else STATES)
        assert number is not None
        entry = self.move("lease", number, lambda g: self.ledger.lease(g, replica, 1, version, 0.0, 9.0))
        if entry is not None:
            entry.attempt, entry.replica, entry.version = entry.attempt + 1, replica, version
            entry.begun = entry.partial[0] if entry.partial is not None else 0

    @precondition(lambda self: self.entries)
    @rule(which=picks, likely=st.booleans(), tokens=st.integers(1, 5), oldest=versions, segment=st.integers(1, 3))
    def a_group_is_handed_over(self, which: int, likely: bool, tokens: int, oldest: int, segment: int) -> None:
        number = self.pick(which, ("queued",) if likely else STATES)
        assert number is not None
        lengths = [tokens] + [0] * (self.entries[number].samples - 1)
        partial = Partial(lengths, oldest, oldest, [ArrayHeader("tokens", "int32", [tokens])])
        place = Spooled(segment, 0, [8], 1)
        entry = self.move("hand over", number, lambda g: self.ledger.hand_over(g, self.lineage, partial, place))
        if entry is not None:
            entry.partial = (tokens, oldest, segment)
            self.account.handed_over += 1

    @precondition(lambda self: self.entries)
    @rule(which=picks, likely=st.booleans())
    def what_was_handed_over_is_dropped(self, which: int, likely: bool) -> None:
        number = self.pick(which, ("queued",) if likely else STATES)
        assert number is not None
        entry = self.move("drop partial", number, lambda g: self.ledger.drop_partial(g, self.lineage))
        if entry is not None:
            entry.partial = None
            self.account.dropped += 1

    @precondition(lambda self: self.entries)
    @rule(which=picks, likely=st.booleans(), newer=st.integers(0, 2), segment=st.integers(1, 3))
    def a_group_is_reported(self, which: int, likely: bool, newer: int, segment: int) -> None:
        number = self.pick(which, ("leased",) if likely else STATES)
        assert number is not None
        before = self.entries[number]
        rewards = [float((number + n) % 2) for n in range(before.samples)]
        oldest = before.version + newer
        report = GroupReport(
            number, before.attempt, self.lineage, rewards, {}, 3, [2] * before.samples, [False] * before.samples,
            oldest, oldest + 1, 0.5, [ArrayHeader("tokens", "int32", [2 * before.samples])],
        )  # fmt: skip
        entry = self.move("report", number, lambda g: self.ledger.report(g, report, Spooled(segment, 0, [8], 1)))
        if entry is not None:
            entry.oldest, entry.rewards, entry.segment, entry.partial = oldest, rewards, segment, None
            if entry.purpose == "train":
                entry.filtered = False
                self.reported += rewards

    @precondition(lambda self: self.entries)
    @rule(which=picks, likely=st.booleans())
    def a_group_goes_back_to_the_queue(self, which: int, likely: bool) -> None:
        number = self.pick(which, ("leased", "reported") if likely else STATES)
        assert number is not None
        entry = self.move("requeue", number, self.ledger.requeue)
        if entry is not None:
            entry.replica, entry.rewards, entry.segment, entry.kept = "", [], None, False

    @precondition(lambda self: self.entries)
    @rule(which=picks, likely=st.booleans())
    def a_group_passes_the_filter(self, which: int, likely: bool) -> None:
        number = self.pick(which, ("reported",) if likely else STATES)
        assert number is not None
        self.move("keep", number, self.ledger.keep)

    @precondition(lambda self: self.entries)
    @rule(which=picks, likely=st.booleans())
    def a_group_is_assigned(self, which: int, likely: bool) -> None:
        number = self.pick(which, ("reported",) if likely else STATES)
        assert number is not None
        self.move("assign", number, self.ledger.assign)

    @precondition(lambda self: self.entries)
    @rule(which=picks, likely=st.booleans())
    def a_group_is_consumed(self, which: int, likely: bool) -> None:
        number = self.pick(which, ("assigned", "reported") if likely else STATES)
        assert number is not None
        if self.move("consume", number, lambda g: self.ledger.consume(g, self.lineage)) is not None:
            self.account.consumed.add(number)

    @precondition(lambda self: self.entries)
    @rule(which=picks, likely=st.booleans())
    def a_group_is_settled(self, which: int, likely: bool) -> None:
        number = self.pick(which, ("consumed",) if likely else STATES)
        assert number is not None
        if self.move("settle", number, lambda g: self.ledger.settle(g, self.lineage)) is not None:
            self.account.settled.add(number)

    @precondition(lambda self: self.entries)
    @rule(which=picks, cause=st.sampled_from(("stale", "nonfinite", "attempts")))
    def a_group_is_discarded(self, which: int, cause: str) -> None:
        number = self.pick(which)
        assert number is not None
        if self.move("discard", number, lambda g: self.ledger.discard(g, self.lineage, cause)) is not None:
            self.account.discarded[number] = cause

    @precondition(lambda self: self.entries)
    @rule(count=st.integers(1, 4), replica=st.sampled_from(REPLICAS), version=versions)
    def some_groups_go_all_the_way_to_consumed(self, count: int, replica: str, version: int) -> None:
        for number in list(self.entries)[:count]:
            state = self.entries[number].state
            if state == "queued":
                lease = self.ledger.lease
                entry = self.move("lease", number, lambda g, lease=lease: lease(g, replica, 1, version, 0.0, 9.0))  # type: ignore[misc]
                assert entry is not None
                entry.attempt, entry.replica, entry.version = entry.attempt + 1, replica, version
                entry.begun = entry.partial[0] if entry.partial is not None else 0
            if self.entries[number].state == "leased":
                at = next(i for i, (n, e) in enumerate(self._having("leased")) if n == number)
                self.a_group_is_reported(at, True, 0, 1)
            if self.entries[number].state == "reported" and self.entries[number].purpose != "eval":
                self.move("assign", number, self.ledger.assign)
            if self.entries[number].state in ("reported", "assigned"):
                consumed = self.move("consume", number, lambda g: self.ledger.consume(g, self.lineage))
                if consumed is not None:  # a judged row that another move has assigned never is
                    self.account.consumed.add(number)

    def _having(self, state: str, purpose: str | None = None) -> list[tuple[int, Entry]]:
        return [(n, e) for n, e in self.entries.items() if e.state == state and purpose in (None, e.purpose)]

    @precondition(lambda self: all(entry.purpose != "eval" for entry in self.entries.values()))
    @rule()
    def the_run_rolls_back(self) -> None:
        """Everything that is not settled moves to a new lineage; what was consumed is to be trained again."""
        before, self.lineage = self.lineage, self.lineage + 1
        new = self.accounts[self.lineage] = Account()
        for number, entry in sorted(self.entries.items()):
            self.ledger.carry(self.ledger.groups[number], before, self.lineage)
            new.issued.add(number)
            self.accounts[before].discarded[number] = "rollback"
            self.accounts[before].consumed.discard(number)
            if entry.state == "consumed":
                self.moves += 1
                entry.state, entry.came = "assigned", self.moves

    @rule()
    def the_mean_reward_is_taken(self) -> None:
        mean = sum(self.reported) / len(self.reported) if self.reported else None
        assert self.ledger.take_reward() == mean
        self.reported = []

    @rule()
    def another_process_reads_the_snapshot(self) -> None:
        self.ledger = msgspec.msgpack.decode(msgspec.msgpack.encode(self.ledger), type=Ledger)

    # -- what always holds ---

    @invariant()
    def each_group_is_where_its_last_move_took_it(self) -> None:
        found = {
            number: (g.purpose, g.state, g.attempt, g.replica, g.version, g.rewards, g.kept, g.begun)
            for number, g in self.ledger.groups.items()
        }
        assert found == {
            number: (e.purpose, e.state, e.attempt, e.replica, e.version, e.rewards, e.kept, e.begun)
            for number, e in self.entries.items()
        }

    @invariant()
    def each_group_is_on_exactly_one_shelf_and_each_shelf_counts_its_groups(self) -> None:
        shelved = Counter(number for shelf in self.ledger.shelves.values() for number in shelf)
        assert shelved == Counter(self.entries.keys())
        for state in STATES:
            for purpose in PURPOSES:
                having = self._having(state, purpose)
                assert [g.id for g in self.ledger.having(state, purpose)] == sorted(n for n, _ in having)  # type: ignore[arg-type]
                assert self.ledger.count(state, purpose) == len(having)  # type: ignore[arg-type]
                first = self.ledger.first(state, purpose)  # type: ignore[arg-type]
                expected = min(having, key=lambda pair: pair[1].came, default=None)
                assert (first and first.id) == (expected and expected[0])
            assert [g.id for g in self.ledger.having(state)] == sorted(n for n, _ in self._having(state))  # type: ignore[arg-type]
        for purpose in PURPOSES:
            still = [e for e in self.entries.values() if e.purpose == purpose and e.state not in ("queued", "consumed")]
            assert self.ledger.accepted_and_running(purpose) == len(still)

    @invariant()
    def the_oldest_version_that_may_hold_the_run_back_is_known(self) -> None:
        for purpose in PURPOSES:
            entries = [entry for _, entry in self._having("leased", purpose)]
            leased = [min(e.version, e.partial[1]) if e.partial is not None else e.version for e in entries]
            reported = [entry.oldest for _, entry in self._having("reported", purpose)]
            assert self.ledger.oldest("leased", purpose) == min(leased, default=None)
            assert self.ledger.oldest("reported", purpose) == min(reported, default=None)
            for version in range(-1, 7):
                older = sum(age <= version for age in (*leased, *reported))
                assert self.ledger.sampled_by(version, purpose) == older  # type: ignore[arg-type]

    @invariant()
    def each_replica_has_the_load_that_it_was_leased(self) -> None:
        for replica in (*REPLICAS, "a stranger"):
            held = [(number, entry) for number, entry in self._having("leased") if entry.replica == replica]
            assert [group.id for group in self.ledger.held_by(replica)] == sorted(number for number, _ in held)
            assert self.ledger.load(replica) == sum(entry.samples for _, entry in held)
        assert set(self.ledger.hungry) == self.hungry

    @invariant()
    def the_filter_sees_each_reported_training_group_once(self) -> None:
        assert [g.id for g in self.ledger.fresh()] == sorted(n for n, e in self.entries.items() if not e.filtered)

    @invariant()
    def no_spooled_payload_that_is_needed_is_let_go(self) -> None:
        entries = list(self.entries.values())
        segments = [entry.segment for entry in entries if entry.segment is not None]
        segments += [entry.partial[2] for entry in entries if entry.partial is not None]
        assert self.ledger.first_segment() == min(segments, default=self.ledger.segment)

    @invariant()
    def ids_issued_are_consumed_discarded_or_open(self) -> None:
        still = {number for number, entry in self.entries.items() if entry.state != "consumed"}
        for lineage, account in self.accounts.items():
            book = self.ledger.book(lineage)
            assert (book.issued, book.consumed) == (len(account.issued), len(account.consumed))
            assert (book.handed_over, book.partials_dropped) == (account.handed_over, account.dropped)
            assert (book.settled, book.discarded) == (len(account.settled), Counter(account.discarded.values()))
            parts = [account.consumed, set(account.discarded), still if lineage == self.lineage else set()]
            assert set().union(*parts) == account.issued
            assert sum(map(len, parts)) == len(account.issued), "one fate for each id"
            assert account.settled <= account.consumed
            assert book.issued == book.consumed + sum(book.discarded.values()) + len(parts[2])
        assert self.ledger.next_id == self.drawn + 1


LedgerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLedger = LedgerMachine.TestCase
