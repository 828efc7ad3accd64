"""Weights: a replica is ready only with the source's digest, whichever answer comes first."""

from __future__ import annotations

from services.controller.core.outcome import Gone, Requeued, Synced
from shared.messages import (
    FormMesh,
    Lease,
    Position,
    ReceiveWeights,
    RevokeLease,
    RevokeMesh,
    SendWeights,
    TrainStep,
    WeightsFailed,
    WeightsLoaded,
    WeightsSent,
)
from tests.unit.controller.world import World, small_world

FIRST = Position(1, 0, 0)


def transferring(rollouts: int = 1, **tables: dict[str, object] | None) -> World:
    """A world whose first transfer was ordered and is not answered."""
    world = small_world(rollouts=rollouts, **tables)
    for model in world.models.values():
        model.silent = {SendWeights, ReceiveWeights}
    world.deliver()
    assert world.core.state.weights.transfer is not None
    return world


def sent(world: World, digest: str = "d") -> str:
    return world.say(world.models["policy-0"], WeightsSent(1, FIRST, digest, 10, 0.1))


def loaded(world: World, digest: str = "d", name: str = "rollout-0") -> str:
    return world.say(world.models[name], WeightsLoaded(1, FIRST, digest, 0.1))


def test_a_receiver_is_ready_when_its_digest_equals_the_one_the_source_told_before() -> None:
    world = transferring()
    assert sent(world) == "fresh"
    assert world.state_of("rollout-0") == "stale"
    assert loaded(world) == "fresh"
    assert world.state_of("rollout-0") == "ready"
    assert world.of(Synced) == [Synced("rollout-0", 1, 0, "d")]


def test_a_receiver_that_loads_before_the_source_told_its_digest_waits_for_it() -> None:
    world = transferring()
    loaded(world)
    assert world.state_of("rollout-0") == "stale"
    assert not world.models["rollout-0"].told(Lease)
    sent(world)
    assert world.state_of("rollout-0") == "ready"
    assert world.models["rollout-0"].told(Lease)


def test_each_receiver_is_ready_by_itself_and_the_slow_one_holds_nobody_back() -> None:
    world = transferring(rollouts=2)
    sent(world)
    loaded(world, name="rollout-1")
    assert (world.state_of("rollout-0"), world.state_of("rollout-1")) == ("stale", "ready")
    assert world.models["rollout-1"].told(Lease)


def test_a_receiver_with_another_digest_stays_stale_and_is_sent_the_weights_again() -> None:
    world = transferring()
    sent(world)
    loaded(world, "other")
    assert world.state_of("rollout-0") == "stale"
    assert not world.of(Synced)
    assert not world.models["rollout-0"].told(Lease)
    assert world.core.state.weights.mismatches == 1
    world.models["policy-0"].silent = world.models["rollout-0"].silent = set()
    world.pass_time(5.0)
    assert world.ended is not None and world.ended.outcome == "complete"


def test_after_a_wrong_digest_the_next_attempt_has_an_epoch_of_its_own() -> None:
    world = transferring(rollouts=2)
    sent(world)
    loaded(world, "other", name="rollout-0")
    loaded(world, name="rollout-1")
    assert world.core.state.weights.mismatches == 1
    world.models["policy-0"].silent = world.models["rollout-0"].silent = world.models["rollout-1"].silent = set()
    world.pass_time(5.0)
    orders = world.models["rollout-0"].told(ReceiveWeights)
    assert [order.epoch for order in orders[:2]] == [1, 2]
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_ready_receiver_whose_new_weights_are_wrong_becomes_stale_and_loses_its_leases() -> None:
    world = small_world(train={"batches": 6})
    model = world.models["rollout-0"]
    model.slow = True
    world.deliver()
    assert len(model.working) == 8
    for _ in range(4):
        world.finish(model)
    model.digest = "broken"
    world.run(lambda: world.core.state.weights.mismatches > 0)
    assert world.state_of("rollout-0") == "stale"
    assert world.core.state.fleet.replicas["rollout-0"].position is None
    assert not world.core.state.ledger.held_by("rollout-0")
    assert {fact.cause for fact in world.of(Requeued)} == {"rollout-0 holds weights with a wrong digest"}
    assert model.told(RevokeLease)
    assert not model.working

    model.digest, model.slow = "same", False
    world.pass_time(5.0)
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_failed_transfer_revokes_its_mesh_and_is_tried_again_over_a_new_one() -> None:
    world = transferring(rollouts=2)
    assert world.say(world.models["rollout-0"], WeightsFailed(1, FIRST, "reset by peer")) == "fresh"
    for model in world.models.values():
        assert model.told(RevokeMesh) == [RevokeMesh(1, "rollout-0: reset by peer")]
        model.silent = set()
    assert world.core.state.weights.transfer is None
    assert world.say(world.models["policy-0"], WeightsFailed(1, FIRST, "reset by peer")) == "duplicate"
    assert sent(world) in ("duplicate", "epoch")
    world.pass_time(2.0)
    assert world.ended is not None and world.ended.outcome == "complete"
    assert [order.identity.epoch for order in world.models["policy-0"].told(FormMesh)] == [1, 2]


def test_receivers_that_have_loaded_stay_ready_when_the_transfer_fails_for_another() -> None:
    world = transferring(rollouts=2)
    sent(world)
    loaded(world, name="rollout-1")
    world.say(world.models["rollout-0"], WeightsFailed(1, FIRST, "out of memory"))
    assert (world.state_of("rollout-0"), world.state_of("rollout-1")) == ("stale", "ready")


def test_a_transfer_that_takes_too_long_is_given_up_by_name() -> None:
    world = transferring(timeouts={"transfer_s": 25.0})
    world.pass_time(26.0)
    [revoke] = world.models["rollout-0"].told(RevokeMesh)
    assert revoke == RevokeMesh(1, "the transfer took longer than timeouts.transfer_s")
    assert world.state_of("rollout-0") == "stale"
    assert not world.of(Gone), "slowness is no death"


def test_answers_to_a_transfer_that_was_given_up_are_refused() -> None:
    world = transferring(timeouts={"transfer_s": 25.0})
    world.pass_time(26.0)
    assert loaded(world) == "epoch"
    assert world.state_of("rollout-0") == "stale"


def test_training_does_not_wait_for_a_transfer_that_it_does_not_need() -> None:
    world = small_world(train={"batches": 6, "max_staleness": 2})
    world.run(lambda: world.core.state.version == 1)
    world.models["rollout-0"].silent = {ReceiveWeights}
    world.deliver()
    assert world.core.state.weights.transfer is not None
    assert world.core.state.weights.transfer.position.version == 1
    assert world.core.state.version == 3, "three batches were leased at version 0 under a bound of 2"


def test_weights_are_sent_only_of_the_state_that_the_source_holds() -> None:
    world = small_world(train={"mu": 2, "minibatches": 2, "batches": 4})
    world.deliver()  # the model of the policy asserts nothing else in `SendWeights`
    assert not any(isinstance(event, WeightsFailed) for event in world.events)
    orders = world.models["policy-0"].told(SendWeights)
    steps = [order.position.step for order in orders if isinstance(order, SendWeights)]
    assert all(step % 4 == 0 for step in steps), "only whole batches are published"


def test_the_source_stages_before_it_is_told_to_commit_the_next_step() -> None:
    world = small_world(train={"batches": 4})
    world.deliver()
    seen = world.models["policy-0"].seen
    for order in [order for order in seen if isinstance(order, SendWeights)]:
        steps = [m for m in seen[: seen.index(order)] if isinstance(m, TrainStep)]
        assert all(step.position.version < order.position.version for step in steps)


def test_what_was_sampled_with_weights_that_nobody_has_compared_is_sampled_again() -> None:
    world = small_world(train={"batches": 6})
    policy, rollout = world.models["policy-0"], world.models["rollout-0"]
    rollout.slow = True
    world.deliver()
    policy.silent = {SendWeights}
    for _ in range(4):
        world.finish(rollout)
    world.deliver()
    assert rollout.holds == Position(1, 1, 1), "swapped in, and the source has not told its digest"
    unchecked, checked = list(rollout.working)[:2]
    assert world.say(rollout, rollout.report(unchecked)) == "fresh"
    assert [fact.group for fact in world.of(Requeued)] == [unchecked[0]]

    policy.silent = set()
    order = policy.told(SendWeights)[-1]
    for answer in policy.take(order):
        world.say(policy, answer)
    assert world.say(rollout, rollout.report(checked)) == "fresh"
    assert [fact.group for fact in world.of(Requeued)] == [unchecked[0]]
    assert checked[0] in {group.id for group in world.core.state.ledger.having("reported")}
