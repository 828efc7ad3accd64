"""Partial rollout in the core: what is handed over part-way is gone on from, no staler than the bound, or dropped."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from services.controller.audit import Audit, Auditor
from services.controller.core.events import Spooled
from services.controller.core.outcome import (
    MOST_MERGED_BYTES,
    AnyFact,
    Consumed,
    Discarded,
    FreeSpool,
    HandedOver,
    Issued,
    Leased,
    PartialDropped,
    PartialRefused,
    Reported,
    Requeued,
    RolledBack,
    Send,
    merge_leases,
)
from services.controller.core.rules.leasing import ATTEMPTS
from shared.messages import ArrayHeader, Goodbye, Grant, Lease, LeaseReturned, Leaving, Partial, Sampling
from tests.unit.controller.world import Key, Model, World, recipe


def slow_world(rollouts: int = 1, bound: int = 1, **tables: object) -> tuple[World, list[Model]]:
    """Rollouts with groups in hand, and a policy that waits for them."""
    train = {"max_staleness": bound, **tables.pop("train", {})}  # type: ignore[dict-item]
    world = World(recipe(train=train, **tables))  # type: ignore[arg-type]
    models = [world.join(f"rollout-{number}", "rollout", slow=True) for number in range(rollouts)]
    world.join("policy-0", "policy")
    world.deliver()
    return world, models


def hand_over(world: World, model: Model, key: Key | None = None) -> Key:
    """A rollout leaves a lease (its first) part-way; which."""
    key = key if key is not None else next(iter(model.working))
    assert world.say(model, model.hand_over(key)) == "fresh"
    return key


def last_lease(world: World, group: int) -> Leased:
    return [fact for fact in world.of(Leased) if isinstance(fact, Leased) and fact.group == group][-1]


def finish_all(world: World, *models: Model) -> None:
    """Everybody works until the run ends."""
    for model in models:
        model.slow = False
        for key in list(model.working):
            world.finish(model, key)
    world.deliver()
    world.pass_time(500.0)


def complete_and_clean(world: World, folder: Path) -> Audit:
    assert world.ended is not None and world.ended.outcome == "complete"
    audit = world.audit(folder)
    assert audit.faults == []
    return audit


def test_the_next_lease_brings_what_was_handed_over_and_its_payload(tmp_path: Path) -> None:
    world, [first, second] = slow_world(rollouts=2)
    group, attempt = hand_over(world, first)
    assert world.of(HandedOver) == [HandedOver(1, group, attempt, tokens=2, oldest=0)]
    lease = last_lease(world, group)
    assert (lease.attempt, lease.begun) == (attempt + 1, 2)
    lessee = world.models[lease.replica]
    grant, _ = lessee.working[group, attempt + 1]
    assert grant.partial is not None and (grant.partial.lengths, grant.partial.oldest) == ([1, 1], 0)
    sent = [e for e in world.effects if isinstance(e, Send) and isinstance(e.message, Lease)][-1]
    assert [world.handed[place.segment][0] for place in sent.payload] == [group]
    finish_all(world, first, second)
    audit = complete_and_clean(world, tmp_path)
    assert (audit.handed_over, audit.continued) == (1, 1)
    assert any(line.startswith("handed over part-way: 1 times, 1 ") for line in audit.lines())
    continued = [line["groups/continued"] for line in world.metrics]
    assert sum(continued) == 1  # type: ignore[arg-type]


def test_the_version_waits_for_a_group_that_was_begun_by_older_weights() -> None:
    world, [first, second] = slow_world(rollouts=2, train={"batches": 6})
    left = [*first.working, *second.working][-1]
    owner = first if left in first.working else second
    for model in (first, second):
        for key in [key for key in model.working if key != left]:
            world.finish(model, key)
    world.deliver()
    assert world.core.state.version == 1
    hand_over(world, owner, left)
    lease = last_lease(world, left[0])
    assert (lease.version, lease.begun) == (1, 2), "its lessee holds version 1, its tokens are of version 0"
    for _ in range(20):
        for model in (first, second):
            for key in [key for key in model.working if key[0] != left[0]]:
                world.finish(model, key)
        world.deliver()
    assert world.core.state.version == 1, "version 2 would leave a token two versions behind"
    world.finish(world.models[lease.replica], (left[0], lease.attempt))
    world.deliver()
    assert world.core.state.version >= 2
    assert max(fact.staleness for fact in world.of(Consumed)) <= 1  # type: ignore[attr-defined]


def leaving_with_old_tokens(bound: int = 1, rest: int = 100) -> tuple[World, int]:
    """Group 5 is handed over with tokens of version 0 by a rollout that leaves; `rest` of the others are reported."""
    world, [first] = slow_world(bound=bound, train={"batches": 6})
    for key in list(first.working)[:4]:
        world.finish(first, key)
    world.deliver()
    assert first.holds is not None and first.holds.version == 1
    world.say(first, Leaving("a signal"))
    hand_over(world, first)
    for key in list(first.working)[:rest]:
        world.finish(first, key)
    world.deliver()
    return world, 5


def test_tokens_that_have_become_too_old_in_the_queue_are_dropped_and_the_group_is_sampled_afresh(
    tmp_path: Path,
) -> None:
    world, group = leaving_with_old_tokens()
    assert world.core.state.version >= 2, "what is queued holds nobody up"
    assert world.core.state.ledger.groups[group].partial is not None
    world.say(world.models["rollout-0"], Goodbye("it leaves"))
    second = world.join("rollout-1", "rollout", slow=True)
    world.deliver()
    assert world.of(PartialDropped) == [PartialDropped(1, group, 1, 2, "too old")]
    assert last_lease(world, group).begun == 0
    assert world.core.state.ledger.book(1).partials_dropped == 1
    finish_all(world, second)
    audit = complete_and_clean(world, tmp_path)
    assert (audit.staleness, audit.continued) == (1, 0)


def test_tokens_within_the_bound_are_kept_in_the_queue() -> None:
    world, group = leaving_with_old_tokens(bound=4, rest=4)
    world.say(world.models["rollout-0"], Goodbye("it leaves"))
    world.join("rollout-1", "rollout", slow=True)
    world.deliver()
    assert world.core.state.version == 2
    assert world.of(PartialDropped) == []
    assert last_lease(world, group).begun == 2


def test_a_killed_lessee_loses_what_it_added_and_the_next_one_goes_on_from_what_was_handed_over() -> None:
    world, [first, second] = slow_world(rollouts=2)
    group, attempt = hand_over(world, first)
    lessee = last_lease(world, group).replica
    world.lose(lessee)
    other = first if lessee == second.name else second
    lease = last_lease(world, group)
    assert (lease.replica, lease.attempt, lease.begun) == (other.name, attempt + 2, 2)
    # it leaves without having added anything: what it came with stays
    world.say(other, LeaseReturned(group, lease.attempt, 1, "handed_back", "no token yet"))
    assert last_lease(world, group).begun == 2
    hand_over(world, other, (group, attempt + 3))
    assert last_lease(world, group).begun == 4


def test_a_lease_on_tokens_that_runs_out_is_leased_afresh() -> None:
    world, [first] = slow_world(timeouts={"lease_s": 20.0})
    key = hand_over(world, first)
    world.now += 10.0
    world.finish(first, next(each for each in first.working if each[0] != key[0]))
    world.deliver()
    world.pass_time(25.0)
    assert [(f.group, f.cause) for f in world.of(PartialDropped)] == [(key[0], "lease ran out")]  # type: ignore[attr-defined]
    assert last_lease(world, key[0]).begun == 0


def test_a_new_term_keeps_what_was_handed_over_and_tells_it_again_to_a_lessee_that_did_not_hear() -> None:
    world, [first, second] = slow_world(rollouts=2)
    for model in (first, second):
        model.silent = {Lease}
    group, attempt = hand_over(world, first)
    lease = last_lease(world, group)
    assert (group, attempt + 1) not in world.models[lease.replica].working
    for model in (first, second):
        model.silent = set()
    world.crash()
    world.deliver()
    grant, _ = world.models[lease.replica].working[group, attempt + 1]
    assert grant.partial is not None and grant.partial.lengths == [1, 1]


def test_a_rollback_drops_the_tokens_and_keeps_the_group(tmp_path: Path) -> None:
    world, [first] = slow_world(train={"batches": 6})
    for key in list(first.working)[:4]:
        world.finish(first, key)
    world.deliver()
    world.say(first, Leaving("a signal"))
    group, _ = hand_over(world, first)
    world.replace("policy-0")
    assert len(world.of(RolledBack)) == 1
    assert [(f.group, f.tokens, f.cause) for f in world.of(PartialDropped)] == [(group, 2, "rollback")]  # type: ignore[attr-defined]
    world.say(first, Goodbye("it leaves"))
    second = world.join("rollout-1", "rollout", slow=True)
    world.deliver()
    assert last_lease(world, group).begun == 0
    finish_all(world, second)
    complete_and_clean(world, tmp_path)


def test_tokens_of_weights_that_were_not_compared_are_not_taken_and_earlier_ones_stay() -> None:
    world, [first] = slow_world()
    group, attempt = hand_over(world, first)
    doubtful = first.hand_over((group, attempt + 1))
    assert doubtful.partial is not None
    doubtful = msgspec.structs.replace(doubtful, partial=msgspec.structs.replace(doubtful.partial, newest=1))
    assert world.say(first, doubtful) == "fresh"
    assert world.of(PartialRefused) == [PartialRefused(1, group, attempt + 1, 4, "weights not compared")]
    assert last_lease(world, group).begun == 2


def test_leases_that_end_in_tokens_do_not_count_as_attempts(tmp_path: Path) -> None:
    world, [first] = slow_world()
    group, _ = key = next(iter(first.working))
    for _ in range(2 * ATTEMPTS):
        hand_over(world, first, key)
        key = (group, key[1] + 1)
    for _ in range(ATTEMPTS):
        assert world.of(Discarded) == []
        world.say(first, LeaseReturned(*key, 1, "handed_back", "it cannot"))
        key = (group, key[1] + 1)
    assert [(f.group, f.cause) for f in world.of(Discarded)] == [(group, "attempts")]  # type: ignore[attr-defined]
    assert len(world.of(Requeued)) == 3 * ATTEMPTS - 1
    finish_all(world, first)
    complete_and_clean(world, tmp_path)


def test_the_payload_stays_spooled_until_the_group_is_reported_and_settled() -> None:
    world, [first] = slow_world(train={"batches": 6}, checkpoint={"every": 1})
    group, attempt = hand_over(world, first)
    ledger = world.core.state.ledger
    place = ledger.groups[group].partial_at
    assert place is not None
    for key in [key for key in first.working if key[0] != group][:4]:
        world.finish(first, key)
    world.deliver()
    assert world.core.state.lineages.settled.version == 1
    assert ledger.first_segment() == place.segment
    assert max((e.segment for e in world.effects if isinstance(e, FreeSpool)), default=0) <= place.segment
    world.finish(first, (group, attempt + 1))
    world.deliver()
    assert ledger.groups[group].partial is None
    assert ledger.first_segment() > place.segment


def partial(lengths: list[int], oldest: int = 0, newest: int = 0, arrays: bool = True) -> Partial:
    return Partial(lengths, oldest, newest, [ArrayHeader("tokens", "int32", [sum(lengths)])] if arrays else [])


@pytest.mark.parametrize(
    ("cause", "handed", "fault"),
    [
        ("reward_failed", partial([1, 1]), "malformed"),
        ("handed_back", partial([1]), "malformed"),
        ("handed_back", partial([0, 0]), "malformed"),
        ("handed_back", partial([2, -1]), "malformed"),
        ("handed_back", partial([1, 1], arrays=False), "malformed"),
        ("handed_back", partial([1, 1], oldest=-1), "state"),
        ("handed_back", partial([1, 0]), "fresh"),
    ],
)
def test_what_may_be_handed_over(cause: str, handed: Partial, fault: str) -> None:
    world, [first] = slow_world()
    key = next(iter(first.working))
    assert world.say(first, LeaseReturned(*key, 1, cause, "", handed)) == fault  # type: ignore[arg-type]
    assert len(world.of(HandedOver)) == (fault == "fresh")


def test_a_row_that_is_judged_is_not_handed_over_with_tokens() -> None:
    world = World(recipe(evaluation={"every": 2, "suites": {"heldout": {"problems": 4}}}))
    first = world.join("rollout-0", "rollout", slow=True)
    world.join("policy-0", "policy")
    world.deliver()
    key = next(key for key, (grant, _) in first.working.items() if grant.purpose == "eval")
    assert world.say(first, LeaseReturned(*key, 1, "handed_back", "", partial([1]))) == "malformed"


def test_a_report_may_go_back_as_far_as_the_tokens_that_it_came_with_and_must() -> None:
    world, group = leaving_with_old_tokens(bound=4, rest=4)
    world.say(world.models["rollout-0"], Goodbye("it leaves"))
    second = world.join("rollout-1", "rollout", slow=True)
    world.deliver()
    lease = last_lease(world, group)
    assert lease.version >= 2
    report = second.report((group, lease.attempt))
    assert (report.oldest, report.newest) == (0, lease.version)
    without = msgspec.structs.replace(report, oldest=lease.version)
    assert world.say(second, without) == "state", "the tokens that it was to go on from are missing"
    older = msgspec.structs.replace(report, oldest=-1)
    assert world.say(second, older) == "state"
    assert world.say(second, report) == "fresh"
    assert world.core.state.ledger.groups[group].oldest == 0


def test_a_deterministic_run_begins_again_whatever_it_is_given(tmp_path: Path) -> None:
    world = World(recipe(run={"deterministic": True}, train={"max_staleness": 0}))
    first = world.join("rollout-0", "rollout", slow=True)
    world.join("policy-0", "policy")
    world.deliver()
    hand_over(world, first)
    assert [fact.cause for fact in world.of(PartialRefused)] == ["deterministic run"]  # type: ignore[attr-defined]
    assert {fact.begun for fact in world.of(Leased)} == {0}  # type: ignore[attr-defined]
    finish_all(world, first)
    complete_and_clean(world, tmp_path)


def lease_of(group: int, *sizes: int, replica: str = "rollout-0") -> Send:
    """A lease of one group, on its way with a payload of these frames."""
    fields: dict[str, object] = dict.fromkeys(Grant.__struct_fields__, 0)
    fields |= {"group": group, "purpose": "train", "sampling": Sampling(1.0, 1.0, 0, 4)}
    places = [Spooled(group, 0, list(sizes), 1)] if sizes else []
    return Send(replica, 0, Lease([Grant(**fields)]), places)  # type: ignore[arg-type]


def test_payloads_of_leases_that_leave_together_stay_in_the_order_of_their_grants() -> None:
    effects = [lease_of(1, 8, 8), lease_of(2), lease_of(3, 4), lease_of(4, 4, replica="rollout-1")]
    merged = merge_leases(list(effects))
    assert [[grant.group for grant in each.message.grants] for each in merged] == [[1, 2, 3], [4]]  # type: ignore[union-attr]
    assert [[place.segment for place in each.payload] for each in merged] == [[1, 3], [4]]  # type: ignore[union-attr]


def test_leases_with_large_payloads_are_messages_of_their_own() -> None:
    large = MOST_MERGED_BYTES // 2 + 1
    merged = merge_leases([lease_of(1, large), lease_of(2), lease_of(3, large), lease_of(4)])
    assert [[grant.group for grant in each.message.grants] for each in merged] == [[1, 2], [3, 4]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        ([Leased(1, 2, "b", 1, 0, 0, 3)], "leased with 3 tokens, 5 were handed over"),
        ([Leased(1, 2, "b", 1, 0, 0, 0)], "leased with 0 tokens, 5 were handed over"),
        ([Leased(1, 2, "b", 1, 3, 0, 5), Reported(1, 2, 3, 3)], "its oldest token is said to be of version 3"),
        ([Leased(1, 2, "b", 1, 3, 0, 5), HandedOver(1, 1, 2, 9, 3)], "its oldest token is said to be of version 3"),
        ([HandedOver(1, 1, 7, 9, 0)], "handed over by attempt 7, not by the last lease"),
        ([PartialDropped(1, 1, 1, 4, "too old")], "4 tokens dropped, 5 were handed over"),
        ([PartialDropped(1, 1, 1, 5, "too old"), Leased(1, 2, "b", 1, 3, 0, 0), Reported(1, 2, 3, 3)], ""),
        ([Leased(1, 2, "b", 1, 3, 0, 5), Reported(1, 2, 1, 3)], ""),
    ],
)
def test_the_audit_follows_tokens_from_lease_to_lease(facts: list[AnyFact], fault: str) -> None:
    auditor = Auditor()
    before = [Issued(1, 1, "train", False), Leased(1, 1, "a", 1, 1, 0), HandedOver(1, 1, 1, 5, 1)]
    auditor.take(1, {"event": {"type": "other"}, "facts": msgspec.to_builtins([*before, *facts])})
    assert [text for text in auditor.audit.faults if fault not in text] == []
    assert bool(auditor.audit.faults) == bool(fault)
