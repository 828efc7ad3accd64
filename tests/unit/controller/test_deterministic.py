"""Deterministic runs: fixed batch composition, whoever is interrupted when."""

from __future__ import annotations

import pytest

from services.controller.core.outcome import Consumed, Discarded, Evaluated, Requeued
from shared.messages import Lease, TrainStep
from tests.unit.controller.world import Model, World, picker, recipe, small_world

TABLES = {"run": {"deterministic": True}, "train": {"max_staleness": 0, "batches": 4}}
JUDGED = {"evaluation": {"every": 2, "suites": {"heldout": {"problems": 20}}}, "rollout": {"slots": 1}}


def filtered(group: int, samples: int) -> list[float]:
    """Every fifth group teaches nothing."""
    return [1.0] * samples if group % 5 == 0 else [float(i % 2) for i in range(samples)]


def slow_world() -> tuple[World, Model]:
    world = World(recipe(**TABLES))
    slow = world.join("rollout-0", "rollout", slow=True)
    world.join("policy-0", "policy")
    world.deliver()
    return world, slow


def waves(model: Model) -> list[list[int]]:
    """The groups of each Lease message."""
    return [[grant.group for grant in order.grants] for order in model.told(Lease) if isinstance(order, Lease)]


def batches(world: World) -> list[list[int]]:
    return [fact.groups for fact in world.of(Consumed) if isinstance(fact, Consumed)]


def test_one_lease_message_holds_a_whole_wave_and_the_next_waits_for_all_of_it() -> None:
    world, slow = slow_world()
    assert waves(slow) == [[1, 2, 3, 4]]
    for _ in range(3):
        world.finish(slow)
        world.deliver()
    assert waves(slow) == [[1, 2, 3, 4]]
    world.finish(slow)
    world.deliver()
    assert waves(slow) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_groups_are_filtered_only_when_their_wave_is_complete() -> None:
    world, slow = slow_world()
    slow.rewards = lambda group, samples: [1.0, 1.0] if group == 1 else [0.0, 1.0]
    for _ in range(3):
        world.finish(slow)
        world.deliver()
    assert not world.of(Discarded)
    world.finish(slow)
    world.deliver()
    assert [(fact.group, fact.cause) for fact in world.of(Discarded)] == [(1, "equal_rewards")]
    assert waves(slow)[1] == [5], "the replacement is a wave of its own"


@pytest.mark.parametrize("reported", [0, 1, 3])
def test_an_interrupted_wave_is_leased_again_whole(reported: int) -> None:
    world, slow = slow_world()
    for _ in range(reported):
        world.finish(slow)
        world.deliver()
    new = world.replace("rollout-0", slow=True)
    world.deliver()
    assert waves(new) == [[1, 2, 3, 4]]
    assert {fact.group for fact in world.of(Requeued)} == {1, 2, 3, 4}
    assert {grant.attempt for order in new.told(Lease) for grant in order.grants} == {2}


def test_groups_that_an_earlier_wave_has_settled_on_are_not_sampled_again() -> None:
    world, slow = slow_world()
    slow.rewards = lambda group, samples: [1.0, 1.0] if group == 1 else [0.0, 1.0]
    for _ in range(4):
        world.finish(slow)
    world.deliver()
    new = world.replace("rollout-0", slow=True)
    world.deliver()
    assert waves(new) == [[5]]


def composition(world: World) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """(step, (group, row, seed)...) of every step as assigned."""
    grants = {
        grant.group: grant
        for model in world.everyone
        for order in model.told(Lease)
        if isinstance(order, Lease)
        for grant in order.grants
    }
    return [
        (order.step, [(g.group, grants[g.group].row, grants[g.group].seed) for g in order.groups])
        for order in world.models["policy-0"].told(TrainStep)
        if isinstance(order, TrainStep)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_every_order_of_messages_gives_the_same_batches(seed: int) -> None:
    expected = small_world(**TABLES)
    expected.models["rollout-0"].rewards = filtered
    expected.deliver()
    world = small_world(**TABLES)
    world.models["rollout-0"].rewards = filtered
    world.deliver(pick=picker(seed))
    assert world.ended is not None and world.ended.outcome == "complete"
    assert batches(world) == batches(expected)
    assert composition(world) == composition(expected)


def test_a_crash_of_controller_and_rollout_after_any_event_gives_the_same_batches() -> None:
    expected = small_world(**TABLES)
    expected.models["rollout-0"].rewards = filtered
    for events in range(expected.deliver()):
        world = small_world(check_replay=False, **TABLES)
        world.models["rollout-0"].rewards = filtered
        world.deliver(limit=events)
        if world.ended is not None:
            break
        if world.state_of("rollout-0") not in ("lost", "left"):
            world.replace("rollout-0", rewards=filtered)
        world.crash()
        world.deliver()
        world.pass_time(100.0)
        assert world.ended is not None and world.ended.outcome == "complete", f"after {events} messages"
        assert batches(world) == batches(expected), f"after {events} messages"


def test_evaluation_rows_are_leased_in_one_message_of_their_own() -> None:
    world = small_world(**TABLES, **JUDGED)
    world.deliver()
    messages = [order.grants for order in world.models["rollout-0"].told(Lease) if isinstance(order, Lease)]
    assert all(len({grant.purpose for grant in grants}) == 1 for grants in messages)
    assert [len(grants) for grants in messages if grants[0].purpose == "eval"] == [20, 20, 20]


def test_whoever_is_lost_when_the_same_versions_are_judged_and_the_same_rows_sampled_alike() -> None:
    expected = small_world(check_replay=False, **TABLES, **JUDGED)
    for events in range(expected.deliver()):
        world = small_world(check_replay=False, **TABLES, **JUDGED)
        world.deliver(limit=events)
        if world.state_of("rollout-0") not in ("lost", "left"):
            world.replace("rollout-0")
        world.deliver()
        world.pass_time(100.0)
        assert world.ended is not None and world.ended.outcome == "complete", f"after {events} messages"
        judged = [(fact.version, fact.why) for fact in world.of(Evaluated) if isinstance(fact, Evaluated)]
        assert judged == [(0, "first"), (2, "periodic"), (4, "last")], f"after {events} messages"
        rows = [[(row, seed) for _, row, seed in groups] for _, groups in composition(world)]
        assert rows == [[(row, seed) for _, row, seed in groups] for _, groups in composition(expected)]


def test_no_wave_is_sampled_and_no_version_passes_while_a_round_is_open() -> None:
    world = small_world(**TABLES, **JUDGED)
    rollout = world.models["rollout-0"]
    rollout.slow = True
    for _ in range(200):
        world.deliver()
        judged = world.core.state.evaluation.round
        if judged is not None and judged.why == "periodic":
            break
        world.finish(rollout)
    assert world.core.state.version == 2
    for key in list(rollout.working):
        assert {grant.purpose for grant, _ in rollout.working.values()} == {"eval"}
        world.finish(rollout, key)
        world.deliver()
    assert world.core.state.version == 2
    assert [grant.purpose for grant, _ in rollout.working.values()] == ["train"] * 4
    for key in list(rollout.working):
        world.finish(rollout, key)
    world.deliver()
    assert world.core.state.version == 3


def test_after_a_rollback_the_same_versions_are_judged_while_recorded_batches_wait() -> None:
    world = small_world(**TABLES, **JUDGED)
    world.run(lambda: world.core.state.version == 3)
    policy = world.replace("policy-0")
    world.deliver(pick=lambda models: policy if policy in models else models[0])  # the engine is the slow one
    world.pass_time(100.0)
    assert world.ended is not None and world.ended.outcome == "complete"
    judged = [f for f in world.of(Evaluated) if isinstance(f, Evaluated)]
    assert [(f.version, f.why) for f in judged if f.lineage == 1] == [(0, "first"), (2, "periodic")]
    assert [(f.version, f.why) for f in judged if f.lineage == 2] == [(0, "first"), (2, "periodic"), (4, "last")]
