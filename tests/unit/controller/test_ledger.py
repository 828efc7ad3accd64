"""A prompt group's life: attempts, transitions that must not exist, and leases through the whole core."""

from __future__ import annotations

import pytest

from services.controller.core.events import Spooled
from services.controller.core.ledger import Group, Ledger
from services.controller.core.outcome import Discarded, Gone, Issued, Leased, Requeued
from shared.messages import ArrayHeader, DatasetIdentity, GroupReport, Lease, LeaseReturned, RevokeLease, Sampling
from tests.unit.controller.world import World, ready_at_once, recipe, small_world

DATASET = DatasetIdentity("train", 100, "aa")
SAMPLING = Sampling(1.0, 1.0, 0, 16)
PLACE = Spooled(3, 0, [8], 1)


def a_report(group: Group, rewards: list[float] | None = None) -> GroupReport:
    rewards = rewards or [0.0, 1.0]
    return GroupReport(
        group.id, group.attempt, 1, rewards, {}, 3, [2, 2], [False, True], 0, 1, 0.5, [ArrayHeader("t", "int32", [4])]
    )


def a_group(ledger: Ledger, state: str = "queued") -> Group:
    """A train group that came to a state by the usual way."""
    group = ledger.draw(1, "train", DATASET, 0, 5, 2, SAMPLING, 7)
    steps = {
        "leased": lambda: ledger.lease(group, "rollout-0", 1, 0, 10.0, 20.0),
        "reported": lambda: ledger.report(group, a_report(group), PLACE),
        "assigned": lambda: ledger.assign(group),
        "consumed": lambda: ledger.consume(group, 1),
    }
    for name, move in steps.items():
        if state == "queued":
            break
        move()
        if name == state:
            break
    assert group.state == state
    return group


def test_every_lease_is_a_new_attempt_at_the_same_group() -> None:
    ledger = Ledger(seed=1)
    group = a_group(ledger, "leased")
    alike = (group.seed, group.row, group.samples, group.sampling, group.revision)
    ledger.requeue(group)
    ledger.lease(group, "rollout-1", 4, 2, 30.0, 40.0)
    assert (group.attempt, group.replica, group.incarnation, group.version) == (2, "rollout-1", 4, 2)
    assert (group.seed, group.row, group.samples, group.sampling, group.revision) == alike


def test_a_requeued_group_keeps_nothing_of_what_was_sampled() -> None:
    ledger = Ledger(seed=1)
    group = a_group(ledger, "reported")
    ledger.requeue(group)
    assert (group.rewards, group.lengths, group.arrays, group.spooled, group.kept) == ([], [], [], None, False)
    assert ledger.first_segment() == ledger.segment, "only the newest, which may be in use"


@pytest.mark.parametrize(
    ("move", "allowed"),
    [
        ("lease", {"queued"}),
        ("report", {"leased"}),
        ("requeue", {"leased", "reported"}),
        ("assign", {"reported"}),
        ("consume", {"assigned"}),
        ("settle", {"consumed"}),
        ("discard", {"queued", "leased", "reported", "assigned"}),
    ],
)
@pytest.mark.parametrize("state", ["queued", "leased", "reported", "assigned", "consumed"])
def test_a_group_moves_only_along_its_life(move: str, allowed: set[str], state: str) -> None:
    ledger = Ledger(seed=1)
    group = a_group(ledger, state)
    moves = {
        "lease": lambda: ledger.lease(group, "r", 1, 0, 0.0, 1.0),
        "report": lambda: ledger.report(group, a_report(group), PLACE),
        "requeue": lambda: ledger.requeue(group),
        "assign": lambda: ledger.assign(group),
        "consume": lambda: ledger.consume(group, 1),
        "settle": lambda: ledger.settle(group, 1),
        "discard": lambda: ledger.discard(group, 1, "stale"),
    }
    if state in allowed:
        moves[move]()
    else:
        with pytest.raises(ValueError, match=f"group 1 is {state}, expected"):
            moves[move]()


def test_an_evaluation_group_is_consumed_from_reported_and_leaves_the_ledger() -> None:
    ledger = Ledger(seed=1)
    group = ledger.draw(1, "eval", DATASET, 0, 5, 1, SAMPLING, 0)
    ledger.lease(group, "rollout-0", 1, 0, 0.0, 1.0)
    ledger.report(group, a_report(group), None)
    ledger.consume(group, 1)
    assert (ledger.groups, ledger.book(1).consumed) == ({}, 1)


def seeds_of(ledger: Ledger, purpose: str = "train") -> list[int]:
    rows = [(epoch, row) for epoch in range(3) for row in range(20)]
    return [ledger.draw(1, purpose, DATASET, *place, 2, SAMPLING, 0).seed for place in rows]  # type: ignore[arg-type]


def test_seeds_of_groups_differ_and_follow_from_the_runs_seed_and_the_row() -> None:
    ledger = Ledger(seed=1)
    ledger.draw(1, "eval", DATASET, 0, 0, 1, SAMPLING, 0)
    seeds = seeds_of(ledger)
    assert seeds == seeds_of(Ledger(seed=1)), "whatever else was drawn before"
    assert len(set(seeds)) == 60
    assert set(seeds).isdisjoint(seeds_of(Ledger(seed=2)))
    assert set(seeds).isdisjoint(seeds_of(Ledger(seed=1), "sft"))
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_rollback_carries_open_groups_and_takes_consumption_back() -> None:
    ledger = Ledger(seed=1)
    consumed, queued = a_group(ledger, "consumed"), a_group(ledger, "queued")
    ledger.carry(consumed, 1, 2)
    ledger.carry(queued, 1, 2)
    assert (consumed.state, queued.state) == ("assigned", "queued")
    assert (ledger.book(1).issued, ledger.book(1).consumed, ledger.book(1).discarded) == (2, 0, {"rollback": 2})
    assert ledger.book(2).issued == 2


# --- leases, through the whole core ----------------------------------------------------------------------------------


def test_pacing_admits_one_batch_for_each_version_of_the_bound_and_no_more() -> None:
    for bound in (0, 1, 3):
        world = World(recipe(train={"max_staleness": bound, "batches": 10}))
        world.join("policy-0", "policy")
        slow = world.join("rollout-0", "rollout", slow=True)
        world.deliver()
        assert len(slow.working) == (bound + 1) * 4


def test_no_more_is_leased_than_the_stage_will_train() -> None:
    world = World(recipe(train={"max_staleness": 4, "batches": 2}))
    world.join("policy-0", "policy")
    slow = world.join("rollout-0", "rollout", slow=True)
    world.deliver()
    assert len(slow.working) == 2 * 4


def test_leases_and_evaluation_rows_are_spread_evenly_over_the_fleet() -> None:
    world = World(recipe(evaluation={"suites": {"heldout": {"problems": 9}}}, weights={"fanout": 3}))
    slow = [world.join(f"rollout-{n}", "rollout", slow=True) for n in range(3)]
    world.join("policy-0", "policy")
    ready_at_once(world)
    purposes = [sorted(grant.purpose for grant, _ in model.working.values()) for model in slow]
    assert [each.count("eval") for each in purposes] == [3, 3, 3]
    assert sorted(each.count("train") for each in purposes) == [2, 3, 3]


def test_leases_fill_no_engine_beyond_twice_its_slots() -> None:
    world = World(recipe(train={"max_staleness": 4, "batches": 20}, rollout={"slots": 4}))
    world.join("policy-0", "policy")
    slow = [world.join(f"rollout-{n}", "rollout", slow=True) for n in range(2)]
    world.deliver()
    assert [len(model.working) for model in slow] == [4, 4], "4 groups of 2 samples are twice 4 slots"


def test_a_lease_that_runs_out_is_revoked_and_leased_again_as_a_new_attempt() -> None:
    world = World(recipe(timeouts={"lease_s": 30.0}))
    world.join("policy-0", "policy")
    slow = world.join("rollout-0", "rollout", slow=True)
    world.deliver()
    world.finish(slow)
    world.deliver()
    old = dict(slow.working)
    world.pass_time(31.0)
    revoked = {(ref.group, ref.attempt) for message in slow.told(RevokeLease) for ref in message.leases}
    assert revoked == set(old)
    assert set(slow.working) == {(group, 2) for group, _ in old}
    assert {fact.cause for fact in world.of(Requeued)} == {"lease of rollout-0 ran out (timeouts.lease_s)"}


def test_a_report_of_an_older_attempt_is_refused_even_from_the_same_replica() -> None:
    world = World(recipe(timeouts={"lease_s": 30.0}))
    world.join("policy-0", "policy")
    slow = world.join("rollout-0", "rollout", slow=True)
    world.deliver()
    world.finish(slow, (2, 1))
    world.deliver()
    grant, version = slow.working[1, 1]
    world.pass_time(31.0)
    slow.working[1, 1] = (grant, version)
    assert world.say(slow, slow.report((1, 1))) == "attempt"


def test_a_replica_that_answers_nothing_of_what_it_was_leased_is_lost_at_the_deadline() -> None:
    world = World(recipe(timeouts={"lease_s": 30.0}))
    world.join("policy-0", "policy")
    stuck = world.join("rollout-0", "rollout", slow=True)
    world.deliver()
    held = {group for group, _ in stuck.working}
    world.pass_time(29.0)
    assert world.state_of("rollout-0") == "ready"
    world.pass_time(2.0)
    assert world.state_of("rollout-0") == "lost"
    assert "timeouts.lease_s" in world.of(Gone)[-1].cause
    assert {fact.group for fact in world.of(Requeued)} == held
    assert world.say(stuck, stuck.report((1, 1))) == "unknown_sender"


def test_a_group_is_given_up_after_five_attempts_and_its_slot_goes_to_another() -> None:
    world = World(recipe(timeouts={"lease_s": 30.0}))
    world.join("policy-0", "policy")
    slow = world.join("rollout-0", "rollout", slow=True)
    world.deliver()
    first = {group for group, _ in slow.working}
    for _ in range(5):
        slow = world.replace("rollout-0", slow=True)
        world.deliver()
    assert {(fact.group, fact.cause) for fact in world.of(Discarded)} == {(group, "attempts") for group in first}
    assert len(slow.working) == len(first)
    assert first.isdisjoint(group for group, _ in slow.working)


def test_what_a_replica_hands_back_is_leased_again_and_what_cannot_be_done_is_discarded() -> None:
    world = World(recipe())
    world.join("policy-0", "policy")
    slow = world.join("rollout-0", "rollout", slow=True)
    world.deliver()
    world.say(slow, LeaseReturned(1, 1, 1, "handed_back", ""))
    world.say(slow, LeaseReturned(2, 1, 1, "reward_failed", "the verifier crashed"))
    world.deliver()
    assert [(fact.group, fact.cause) for fact in world.of(Discarded)] == [(2, "reward_failed")]
    leased = {(fact.group, fact.attempt) for fact in world.of(Leased)}
    assert (1, 2) in leased
    assert (2, 2) not in leased
    assert len(world.core.state.ledger.having("leased")) == 8, "the discarded group's slot went to a new one"


def test_leases_of_a_lost_replica_go_to_the_others() -> None:
    world = World(recipe())
    world.join("policy-0", "policy")
    lost = world.join("rollout-0", "rollout", slow=True)
    world.join("rollout-1", "rollout", slow=True)
    world.deliver()
    keys = set(lost.working)
    assert keys
    world.lose("rollout-0")
    assert {(group, 2) for group, _ in keys} <= set(world.models["rollout-1"].working)


def test_rows_are_drawn_in_a_permutation_each_once_an_epoch() -> None:
    world = small_world(train={"batches": 3})
    world.deliver()
    grants = [grant for message in world.models["rollout-0"].told(Lease) for grant in message.grants]
    rows = [grant.row for grant in grants]
    assert len(set(rows)) == len(rows) == 12
    assert rows != sorted(rows)
    assert len(world.of(Issued)) == 12


def _leased(ledger: Ledger, at: float, replica: str = "rollout-0") -> Group:
    group = ledger.draw(1, "train", DATASET, 0, ledger.next_id, 2, SAMPLING, 7)
    ledger.lease(group, replica, 1, 0, at, at + 10.0)
    return group


def test_an_answer_prolongs_what_its_lessee_was_leased_with_it_and_since() -> None:
    ledger = Ledger(seed=1)
    first, second, third = _leased(ledger, 1.0), _leased(ledger, 5.0), _leased(ledger, 5.0)
    later, another = _leased(ledger, 6.0), _leased(ledger, 5.0, "rollout-1")
    ledger.report(second, a_report(second), PLACE)
    ledger.prolong(second, 19.0)
    deadlines = [group.deadline for group in (first, third, later, another)]
    assert deadlines == [11.0, 19.0, 19.0, 15.0], "a lease that was overtaken still runs out"


def test_the_lease_that_ends_first_is_found_after_others_were_prolonged() -> None:
    ledger = Ledger(seed=1)
    groups = [_leased(ledger, float(at), f"rollout-{at % 2}") for at in range(6)]
    ledger.report(groups[0], a_report(groups[0]), PLACE)
    ledger.prolong(groups[0], 16.0)
    order = []
    while (first := ledger.first("leased", "train")) is not None:
        order.append(first.deadline)
        ledger.requeue(first)
    assert order == sorted(order) == [11.0, 13.0, 15.0, 16.0, 16.0]
