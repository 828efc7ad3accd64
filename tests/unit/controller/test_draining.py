"""Leaving in good order: nothing new for who leaves, nothing lost with it, and never longer than its deadline."""

from __future__ import annotations

from services.controller.core.events import Steered
from services.controller.core.outcome import Draining, Gone, RolledBack
from shared.messages import (
    CheckpointFailed,
    CommitStep,
    Drain,
    DrainReplica,
    Goodbye,
    GradientsReady,
    Lease,
    LeaseReturned,
    Leaving,
    Position,
    SaveCheckpoint,
    SendWeights,
    TrainStep,
)
from tests.unit.controller.world import Model, World, recipe, small_world


def leave(world: World, model: Model) -> None:
    """A model that was told `Drain` hands back what it has and goes."""
    for grant, _ in list(model.working.values()):
        world.say(model, LeaseReturned(grant.group, grant.attempt, grant.lineage, "handed_back", "draining"))
    world.say(model, Goodbye("drained"))
    model.alive = False


def two_rollouts() -> tuple[World, Model, Model]:
    world = World(recipe(train={"batches": 6}))
    world.join("policy-0", "policy")
    slow = [world.join(f"rollout-{number}", "rollout", slow=True) for number in (0, 1)]
    world.deliver()
    return world, slow[0], slow[1]


def test_a_rollout_that_drains_is_leased_nothing_more_and_others_get_what_it_hands_back() -> None:
    world, leaving, stays = two_rollouts()
    held = len(leaving.told(Lease))
    world.step(Steered(at=world.now, order=DrainReplica("rollout-0", "enough")))
    assert [fact.replica for fact in world.of(Draining)] == ["rollout-0"]
    assert len(leaving.told(Drain)) == 1
    groups = {group for group, _ in leaving.working}
    leave(world, leaving)
    world.deliver()
    assert world.state_of("rollout-0") == "left"
    assert len(leaving.told(Lease)) == held
    assert groups <= {group for group, _ in stays.working}
    stays.slow = False
    for key in list(stays.working):
        world.finish(stays, key)
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_draining_replica_may_still_report_what_it_has() -> None:
    world, leaving, _ = two_rollouts()
    assert world.say(leaving, Leaving("SIGTERM")) == "fresh"
    assert world.say(leaving, Leaving("SIGTERM")) == "duplicate"
    assert world.say(leaving, leaving.report(next(iter(leaving.working)))) == "fresh"


def test_a_replica_that_drains_and_does_not_leave_is_lost_at_its_deadline() -> None:
    world, leaving, _ = two_rollouts()
    world.say(leaving, Leaving("SIGTERM"))
    world.pass_time(world.recipe.timeouts.exit_s + 0.1)
    assert world.state_of("rollout-0") == "lost"
    assert "timeouts.exit_s" in world.of(Gone)[-1].cause


def test_a_drain_is_ordered_again_in_a_new_term() -> None:
    world, leaving, _ = two_rollouts()
    world.say(leaving, Leaving("SIGTERM"))
    world.crash()
    assert world.state_of("rollout-0") == "draining"
    assert len(leaving.told(Drain)) == 2


def test_a_replica_that_is_starting_leaves_at_once() -> None:
    world = World(recipe())
    starting = world.join("rollout-0", "rollout")
    world.join("policy-0", "policy", silent=set())
    world.step(Steered(at=world.now, order=DrainReplica("rollout-0", "")))
    assert len(starting.told(Drain)) == 1
    assert world.core.state.scaling.count("rollout") == 0


def test_the_only_policy_commits_its_batch_and_writes_a_checkpoint_before_it_goes() -> None:
    world = small_world(train={"batches": 6, "minibatches": 2}, checkpoint={"every": 100})
    policy = world.models["policy-0"]
    world.run(lambda: len(policy.told(TrainStep)) == 3)  # the first step of the second batch
    world.say(policy, Leaving("SIGTERM"))
    assert not policy.told(Drain)
    world.deliver()
    assert world.core.state.version == 2
    assert [order.position.version for order in policy.told(SaveCheckpoint)] == [2]  # type: ignore[union-attr]
    assert len(policy.told(Drain)) == 1
    assert policy.seen.index(policy.told(Drain)[0]) > policy.seen.index(policy.told(SaveCheckpoint)[0])
    leave(world, policy)
    world.join("policy-0", "policy")
    world.deliver()
    assert world.of(RolledBack) == []
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_checkpoint_that_fails_late_is_not_the_failure_of_what_was_committed_meanwhile() -> None:
    world = small_world(train={"batches": 6}, checkpoint={"every": 1})
    policy = world.models["policy-0"]
    policy.silent = {SaveCheckpoint}
    world.run(lambda: len(policy.told(CommitStep)) == 3)
    assert [order.position.version for order in policy.told(SaveCheckpoint)] == [1], "one at a time"  # type: ignore[union-attr]
    world.say(policy, Leaving("SIGTERM"))
    policy.silent = set()
    world.say(policy, CheckpointFailed(Position(1, 1, 1), "No space left on device"))
    world.deliver()
    assert world.core.state.lineages.settled == world.core.state.lineages.committed == Position(1, 3, 3)
    assert len(policy.told(Drain)) == 1


def test_a_policy_that_cannot_write_goes_all_the_same() -> None:
    world = small_world(train={"batches": 6}, checkpoint={"every": 100})
    policy = world.models["policy-0"]
    policy.disk_full = lambda: True
    world.run(lambda: len(policy.told(CommitStep)) == 2)
    world.say(policy, Leaving("SIGTERM"))
    world.deliver()
    assert len(policy.told(Drain)) == 1


def test_a_policy_is_not_told_to_go_in_the_middle_of_a_transfer() -> None:
    world = small_world(train={"batches": 6}, checkpoint={"every": 1})
    policy = world.models["policy-0"]
    policy.silent = {SendWeights}
    world.deliver()
    assert [edge.position for edge in world.core.state.weights.edges.values()] != [None]
    world.say(policy, Leaving("SIGTERM"))
    world.deliver()
    assert not policy.told(Drain)


def test_a_policy_that_goes_before_its_vote_costs_a_redo_and_no_sample() -> None:
    world = small_world(train={"batches": 4}, checkpoint={"every": 1})
    policy = world.models["policy-0"]
    policy.silent = {TrainStep}
    world.run(lambda: len(policy.told(TrainStep)) == 1)
    world.say(policy, Leaving("SIGTERM"))
    world.say(policy, Goodbye("its time is up"))
    policy.alive = False
    assert world.say(policy, GradientsReady(0, 1, 1, True, {})) == "unknown_sender"
    world.join("policy-0", "policy")
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
