"""The audit: clean runs are clean, and a journal that was tampered with is told what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from services.controller.core.outcome import (
    AnyFact,
    Assigned,
    Committed,
    Consumed,
    Discarded,
    Evaluated,
    Issued,
    Judged,
    Leased,
    Reported,
    RolledBack,
    Settled,
)
from tests.unit.controller.world import World, small_world

Records = list[tuple[int, object, list[AnyFact]]]


def rich_world() -> World:
    """A run with everything in it: stages, evaluations, filtered groups, a redo, a rollback and two terms."""
    world = small_world(
        check_replay=False,
        sft={"dataset": "train", "batches": 2, "batch_size": 4, "lr": 1e-3},
        evaluation={"every": 2, "suites": {"heldout": {"problems": 3}}},
        train={"batches": 5},
        checkpoint={"every": 2},
    )
    world.models["rollout-0"].rewards = lambda group, samples: (
        [1.0] * samples if group % 7 == 0 else [float(i % 2) for i in range(samples)]
    )
    world.run(lambda: world.core.state.version == 5)
    world.replace("policy-0")
    world.crash()
    world.deliver()
    world.pass_time(60.0)
    assert world.ended is not None and world.ended.outcome == "complete"
    return world


@pytest.fixture(scope="module")
def rich() -> World:
    return rich_world()


def without(records: Records, kind: type, nth: int = 0) -> Records:
    """The records less one fact of a kind."""
    return changed(records, kind, lambda fact: None, nth)


def changed(records: Records, kind: type, change: Callable[..., object], nth: int = 0) -> Records:
    """The records with one fact of a kind changed: into another, several, or none."""
    seen, edited = 0, []
    for term, event, facts in records:
        kept: list[AnyFact] = []
        for fact in facts:
            if isinstance(fact, kind):
                seen += 1
                if seen == nth + 1:
                    new = change(fact)
                    kept += new if isinstance(new, list) else [new] if new is not None else []
                    continue
            kept.append(fact)
        edited.append((term, event, kept))
    assert seen > nth
    return edited


def faults(world: World, records: Records, folder: Path) -> str:
    audit = world.audit(folder, records)  # type: ignore[arg-type]
    assert not audit.clean
    assert audit.lines()[-1] == f"audit: {len(audit.faults)} faults"
    return "\n".join(audit.faults)


def test_a_run_with_everything_in_it_is_clean_and_its_books_balance(rich: World, tmp_path: Path) -> None:
    audit = rich.audit(tmp_path)
    assert (audit.faults, audit.outcome, audit.terms, len(audit.books)) == ([], "complete", 2, 2)
    for book in audit.books.values():
        assert len(book.issued) == len(book.consumed) + len(book.discarded)
        assert not book.open
        assert not book.consumed & book.discarded.keys()
    assert audit.staleness <= audit.bound == 1
    text = "\n".join(audit.lines())
    assert "rollback: lineage 1 -> 2 at version 4 (step 4)" in text
    assert "equal_rewards" in text
    assert text.endswith("audit: clean")


def test_the_audits_books_are_the_cores(rich: World, tmp_path: Path) -> None:
    audit = rich.audit(tmp_path)
    for lineage, book in rich.core.state.ledger.books.items():
        found = audit.books[lineage]
        assert (book.issued, book.settled) == (len(found.issued), len(found.settled))
        assert book.consumed == len(found.consumed)
        assert sum(book.discarded.values()) == len(found.discarded)


def test_a_journal_that_ends_anywhere_is_clean_so_far(rich: World, tmp_path: Path) -> None:
    for length in range(1, len(rich.records), 9):
        assert rich.audit(tmp_path, rich.records[:length]).faults == []


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (Issued, "though it was not open"),
        (Leased, "a report of attempt 1, not of the last lease"),
        (Reported, "was consumed without a report of its last attempt"),
        (Committed, "was consumed without a committed step"),
        (Judged, "groups are still open"),
        (Discarded, "groups are still open"),
        (Consumed, "was settled in lineage 1 though it was not consumed"),
        (Assigned, "committed without being assigned"),
    ],
)
def test_a_fact_that_was_dropped_is_missed(rich: World, tmp_path: Path, kind: type, fault: str) -> None:
    assert fault in faults(rich, without(rich.records, kind), tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (Issued, "was issued twice in lineage 1"),
        (Leased, "attempt 1 follows 1"),
        (Committed, "step 0 committed, expected step 1"),
        (Consumed, "was consumed in lineage 1 though it was not open"),
        (Judged, "was judged though it was not open"),
        (Discarded, "though it was not open"),
    ],
)
def test_a_fact_that_came_twice_is_noticed(rich: World, tmp_path: Path, kind: type, fault: str) -> None:
    doubled = changed(rich.records, kind, lambda fact: [fact, fact])  # type: ignore[arg-type]
    assert fault in faults(rich, doubled, tmp_path)


def replaced(fact: AnyFact, **fields: object) -> AnyFact:
    return msgspec.structs.replace(fact, **fields)


def test_a_group_consumed_in_two_batches_is_noticed(rich: World, tmp_path: Path) -> None:
    first = next(fact for fact in rich.of(Consumed) if isinstance(fact, Consumed))
    records = changed(
        rich.records, Consumed, lambda fact: replaced(fact, groups=[*fact.groups, first.groups[0]]), nth=1  # type: ignore[arg-type]
    )  # fmt: skip
    found = faults(rich, records, tmp_path)
    assert f"group {first.groups[0]} was consumed in lineage 1 though it was not open" in found
    assert f"group {first.groups[0]} was consumed without a committed step of version 1" in found


def test_tokens_older_than_the_bound_are_noticed_whatever_the_fact_claims(tmp_path: Path) -> None:
    world = small_world(train={"batches": 5})
    world.deliver()
    last = world.of(Consumed)[-1].groups[0]

    def older(fact: Reported) -> AnyFact:
        return replaced(fact, oldest=0) if fact.group == last else fact

    records = [
        (term, event, [older(fact) if isinstance(fact, Reported) else fact for fact in facts])
        for term, event, facts in world.records
    ]
    assert f"group {last} was trained 4 versions late, the bound is 1" in faults(world, records, tmp_path)  # type: ignore[arg-type]


def test_a_skipped_step_is_noticed(tmp_path: Path) -> None:
    world = small_world()
    world.deliver()
    records = changed(world.records, Committed, lambda fact: replaced(fact, step=2), nth=1)  # type: ignore[arg-type]
    found = faults(world, records, tmp_path)
    assert "lineage 1: step 2 committed, expected step 1" in found
    assert "step 2 attempt 2 committed without being assigned" in found


def test_an_attempt_that_was_never_assigned_cannot_commit(tmp_path: Path) -> None:
    world = small_world()
    world.deliver()
    records = changed(world.records, Committed, lambda fact: replaced(fact, attempt=77))  # type: ignore[arg-type]
    assert "step 0 attempt 77 committed without being assigned" in faults(world, records, tmp_path)


def test_a_rollback_to_anywhere_but_the_last_checkpoint_is_noticed(rich: World, tmp_path: Path) -> None:
    records = changed(rich.records, RolledBack, lambda fact: replaced(fact, version=3, step=3))  # type: ignore[arg-type]
    assert "lineage 2 began at (3, 3), settled was (4, 4)" in faults(rich, records, tmp_path)


def test_a_closed_group_cannot_be_carried_into_the_next_lineage(rich: World, tmp_path: Path) -> None:
    settled = next(fact for fact in rich.of(Settled) if isinstance(fact, Settled)).groups[0]
    records = changed(
        rich.records, RolledBack, lambda fact: [Issued(2, settled, "sft", True), fact]  # type: ignore[arg-type]
    )  # fmt: skip
    assert f"group {settled} was carried into lineage 2 though it was closed in 1" in faults(rich, records, tmp_path)


def test_a_term_that_does_not_follow_the_one_before_is_noticed(rich: World, tmp_path: Path) -> None:
    records = [
        (term, replaced(event, term=9) if getattr(event, "term", 0) == 2 else event, facts)  # type: ignore[arg-type]
        for term, event, facts in rich.records
    ]
    assert "term 9 follows term 1" in faults(rich, records, tmp_path)  # type: ignore[arg-type]


def test_an_unfinished_run_says_so_and_open_groups_are_no_fault(tmp_path: Path) -> None:
    world = small_world()
    world.deliver(limit=12)
    audit = world.audit(tmp_path)
    assert (audit.clean, audit.outcome) == (True, "unfinished")
    assert audit.books[1].open


def test_evaluations_are_listed(rich: World, tmp_path: Path) -> None:
    audit = rich.audit(tmp_path)
    assert len(audit.evaluations) == len(rich.of(Evaluated))
    assert any(line.startswith("evaluated version 2 (first) on heldout: 0/3") for line in audit.lines())
