"""Weights: ready is only who holds what a policy told the digest of; whoever is done serves others."""

from __future__ import annotations

import pytest

from services.controller.core.outcome import Gone, Requeued, Synced
from services.controller.core.weights import Publication
from shared.messages import (
    FormMesh,
    Lease,
    MeshFailed,
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
from tests.unit.controller.world import Model, World, small_world

FIRST = Position(1, 0, 0)


def transferring(rollouts: int = 1, **tables: dict[str, object] | None) -> World:
    """A world whose first transfers were ordered and are not answered."""
    world = small_world(rollouts=rollouts, **tables)
    for model in world.models.values():
        model.silent, model.slow = {SendWeights, ReceiveWeights}, True
    world.deliver()
    assert all(edge.position == FIRST for edge in world.core.state.weights.edges.values())
    return world


def edges(world: World) -> dict[str, str]:
    """Who is paired with whom: receiver -> source."""
    return {edge.receiver: edge.source for edge in world.core.state.weights.edges.values()}


def epoch_to(world: World, name: str) -> int:
    [epoch] = [epoch for epoch, edge in world.core.state.weights.edges.items() if edge.receiver == name]
    return epoch


def sent(world: World, digest: str = "d", *, to: str = "rollout-0") -> str:
    """The source of the edge to a receiver tells its digest."""
    edge = world.core.state.weights.edges[epoch_to(world, to)]
    return world.say(world.models[edge.source], WeightsSent(edge.epoch, FIRST, digest, 10, 0.1))


def loaded(world: World, digest: str = "d", name: str = "rollout-0") -> str:
    world.models[name].holds = FIRST
    return world.say(world.models[name], WeightsLoaded(epoch_to(world, name), FIRST, digest, 0.1))


def obey(world: World) -> None:
    """From now on everybody answers, and as long as it takes for failed attempts to be made again passes."""
    for model in world.models.values():
        model.silent, model.digest, model.slow = set(), "same", False
        for key in list(model.working):
            world.finish(model, key)
    world.deliver()
    world.pass_time(40.0)


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
    loaded(world, name="rollout-1")
    sent(world)
    assert (world.state_of("rollout-0"), world.state_of("rollout-1")) == ("stale", "ready")
    assert world.models["rollout-1"].told(Lease)


def test_a_source_has_no_more_edges_than_the_fanout_and_who_is_done_serves_the_next() -> None:
    world = transferring(rollouts=7, weights={"fanout": 2})
    assert edges(world) == {"rollout-0": "policy-0", "rollout-1": "policy-0"}
    sent(world)
    assert loaded(world, name="rollout-0") == "fresh"
    world.deliver()
    assert edges(world) == {
        "rollout-1": "policy-0", "rollout-2": "policy-0", "rollout-3": "rollout-0", "rollout-4": "rollout-0"
    }  # fmt: skip
    assert loaded(world, name="rollout-1") == "fresh"
    world.deliver()
    assert edges(world)["rollout-5"] == edges(world)["rollout-6"] == "rollout-1"


def test_a_relay_serves_while_its_own_source_has_not_answered_yet() -> None:
    world = transferring(rollouts=3, weights={"fanout": 1})
    loaded(world)
    sent(world)
    world.deliver()
    assert edges(world) == {"rollout-1": "policy-0", "rollout-2": "rollout-0"}
    assert sent(world, to="rollout-2") == "fresh"
    assert loaded(world, name="rollout-2") == "fresh"
    assert world.state_of("rollout-2") == "ready"


def test_the_same_tree_is_used_for_the_next_version() -> None:
    world = small_world(rollouts=5, train={"batches": 6})
    world.deliver()
    assert world.ended is not None
    formed = {name: len(world.models[name].told(FormMesh)) for name in world.models}
    assert sum(formed.values()) == 2 * 5, formed
    served = {name: len(model.told(SendWeights)) for name, model in world.models.items()}
    assert sum(served.values()) >= 5 * 3
    assert sum(count for name, count in served.items() if name != "policy-0") > 0, "relays served too"


def test_relays_serve_a_joiner_while_the_policy_is_in_the_middle_of_a_batch() -> None:
    world = small_world(train={"mu": 2, "minibatches": 2, "batches": 2})
    policy = world.models["policy-0"]
    world.run(lambda: world.core.state.lineages.committed.step == 1)
    policy.silent = {TrainStep}
    world.deliver()
    assert world.core.state.lineages.committed == Position(1, 0, 1)
    world.join("rollout-1", "rollout")
    world.deliver()
    assert world.of(Synced)[-1] == Synced("rollout-1", 1, 0, "same")
    assert [order.position for order in world.models["rollout-0"].told(SendWeights)] == [FIRST]


def test_what_a_policy_told_first_is_what_everybody_is_compared_with() -> None:
    world = transferring(rollouts=3, weights={"fanout": 1})
    sent(world, "true")
    loaded(world, "true")
    world.deliver()
    assert edges(world)["rollout-2"] == "rollout-0"
    assert sent(world, "wrong", to="rollout-2") == "fresh"
    assert loaded(world, "wrong", name="rollout-2") == "fresh"
    assert world.state_of("rollout-2") == "stale", "source and receiver agree, and both are wrong"
    assert world.core.state.weights.mismatches == 1
    assert len(world.of(Synced)) == 1


def test_a_relay_that_passes_on_something_else_is_no_source_any_more_once_another_source_has_shown_it() -> None:
    world = transferring(rollouts=2, weights={"fanout": 1})
    sent(world, "true")
    loaded(world, "true")
    world.deliver()
    first = edges(world)["rollout-1"]
    while edges(world).get("rollout-1", first) == "policy-0":  # have it served by the relay
        world.say(world.models["policy-0"], MeshFailed(epoch_to(world, "rollout-1"), "reset"))
        world.pass_time(40.0)
    assert edges(world)["rollout-1"] == "rollout-0"
    loaded(world, "wrong", name="rollout-1")
    assert world.state_of("rollout-1") == "stale"
    world.pass_time(20.0)
    assert edges(world)["rollout-1"] == "policy-0", "another source is tried next"
    loaded(world, "true", name="rollout-1")
    assert world.state_of("rollout-1") == "ready"
    [publication] = world.core.state.weights.publications
    assert list(publication.barred) == ["rollout-0"]
    for name in ("rollout-2", "rollout-3", "rollout-4"):
        world.join(name, "rollout", slow=True, silent={SendWeights, ReceiveWeights})
    world.deliver()
    assert "rollout-0" not in edges(world).values()
    assert "rollout-4" not in edges(world), "it waits for another source rather"


def test_a_receiver_that_is_wrong_itself_bars_nobody() -> None:
    publication = Publication(FIRST, 0.0)
    publication.accuse("rollout-0", "rollout-9")
    publication.accuse("rollout-1", "rollout-9")
    assert (publication.barred, publication.suspects) == ({}, {})
    publication.accuse("rollout-0", "rollout-9")
    publication.accuse("rollout-0", "rollout-9")
    assert list(publication.barred) == ["rollout-0"], "twice from one source"


def test_a_receiver_with_another_digest_stays_stale_and_is_sent_the_weights_again() -> None:
    world = transferring()
    sent(world)
    loaded(world, "other")
    assert world.state_of("rollout-0") == "stale"
    assert not world.of(Synced)
    assert not world.models["rollout-0"].told(Lease)
    assert world.core.state.weights.mismatches == 1
    obey(world)
    assert world.ended is not None and world.ended.outcome == "complete"


def test_after_a_wrong_digest_the_next_attempt_has_an_epoch_of_its_own() -> None:
    world = transferring(rollouts=2)
    sent(world, "same")
    loaded(world, "other", name="rollout-0")
    loaded(world, "same", name="rollout-1")
    assert world.core.state.weights.mismatches == 1
    obey(world)
    orders = world.models["rollout-0"].told(ReceiveWeights)
    assert orders[0].epoch == 1 and orders[1].epoch > 2
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


def test_a_failed_transfer_revokes_its_mesh_and_no_other_and_is_tried_again_over_a_new_one() -> None:
    world = transferring(rollouts=2)
    assert world.say(world.models["rollout-0"], WeightsFailed(1, FIRST, "reset by peer")) == "fresh"
    assert world.models["rollout-0"].told(RevokeMesh) == [RevokeMesh(1, "rollout-0: reset by peer")]
    assert not world.models["rollout-1"].told(RevokeMesh)
    assert edges(world) == {"rollout-1": "policy-0"}
    assert world.say(world.models["policy-0"], WeightsFailed(1, FIRST, "reset by peer")) == "duplicate"
    late = WeightsSent(1, FIRST, "d", 10, 0.1)
    assert world.say(world.models["policy-0"], late) in ("duplicate", "epoch")
    sent(world, "same", to="rollout-1")
    loaded(world, "same", name="rollout-1")
    obey(world)
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_receiver_that_failed_with_one_source_is_paired_with_another_one_first() -> None:
    world = transferring(rollouts=2, weights={"fanout": 1})
    world.say(world.models["rollout-0"], WeightsFailed(1, FIRST, "reset by peer"))
    world.deliver()
    sent(world, to="rollout-1")
    loaded(world, name="rollout-1")
    world.pass_time(2.0)
    assert edges(world) == {"rollout-0": "rollout-1"}


def test_a_receiver_that_hangs_holds_its_sources_slot_no_longer_than_slow_s() -> None:
    world = transferring(rollouts=3, weights={"fanout": 2, "slow_s": 5.0}, timeouts={"transfer_s": 60.0})
    assert set(edges(world)) == {"rollout-0", "rollout-1"}, "both hang"
    world.pass_time(4.9)
    assert set(edges(world)) == {"rollout-0", "rollout-1"}
    world.pass_time(0.2)
    assert set(edges(world)) == {"rollout-0", "rollout-1", "rollout-2"}


@pytest.mark.parametrize("who", ["policy-0", "rollout-0"])
def test_a_source_that_dies_in_mid_transfer_leaves_its_receivers_to_others(who: str) -> None:
    world = transferring(rollouts=5, weights={"fanout": 2})
    for name in ("rollout-0", "rollout-1"):
        sent(world, to=name)
        loaded(world, name=name)
    world.deliver()
    mine = [receiver for receiver, source in edges(world).items() if source == who]
    assert mine
    world.lose(who)
    assert all(order.epoch for name in mine for order in world.models[name].told(RevokeMesh))
    now = edges(world)
    assert all(source != who for source in now.values())
    assert set(now) == {"rollout-2", "rollout-3", "rollout-4"}, "paired anew at once, without a pause"


def test_receivers_that_have_loaded_stay_ready_when_the_transfer_fails_for_another() -> None:
    world = transferring(rollouts=2)
    sent(world, to="rollout-1")
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
    world.pass_time(25.5)
    assert world.say(world.models["rollout-0"], WeightsLoaded(1, FIRST, "d", 0.1)) == "epoch"
    assert world.state_of("rollout-0") == "stale"


def test_only_the_ends_of_an_edge_answer_for_it() -> None:
    world = transferring(rollouts=2)
    assert world.say(world.models["rollout-1"], WeightsLoaded(1, FIRST, "d", 0.1)) == "role"
    assert world.say(world.models["rollout-0"], WeightsSent(1, FIRST, "d", 10, 0.1)) == "role"
    assert world.say(world.models["rollout-1"], WeightsFailed(1, FIRST, "mischief")) == "duplicate"
    assert set(edges(world)) == {"rollout-0", "rollout-1"}


def test_a_policy_that_tells_another_digest_is_believed_only_when_nobody_holds_the_first_one() -> None:
    world = transferring()
    sent(world, "first")
    loaded(world, "first")
    world.join("rollout-1", "rollout", slow=True, silent={SendWeights, ReceiveWeights})
    world.deliver()
    assert edges(world) == {"rollout-1": "policy-0"}
    sent(world, "second", to="rollout-1")
    loaded(world, "second", name="rollout-1")
    assert world.state_of("rollout-1") == "stale"
    world.lose("rollout-0")
    world.pass_time(2.0)
    sent(world, "second", to="rollout-1")
    loaded(world, "second", name="rollout-1")
    assert world.state_of("rollout-1") == "ready"


def test_sync_figures_run_from_publishing_to_the_last_receiver_and_add_up_all_edges() -> None:
    world = transferring(rollouts=3, weights={"fanout": 1})
    began = world.now
    for number, name in enumerate(("rollout-0", "rollout-1", "rollout-2")):
        world.now = began + 1.0 + number
        sent(world, to=name)
        loaded(world, name=name)
        world.deliver()
    weights = world.core.state.weights
    assert (weights.last_seconds, weights.last_bytes) == (pytest.approx(3.0, abs=0.1), 30)
    world.now = began + 100.0
    world.join("rollout-3", "rollout", slow=True, silent={SendWeights, ReceiveWeights})
    world.deliver()
    world.now = began + 102.0
    sent(world, to="rollout-3")
    loaded(world, name="rollout-3")
    assert (weights.last_seconds, weights.last_bytes) == (pytest.approx(2.0, abs=0.1), 10), (
        "who comes late has an account of its own"
    )


def test_training_does_not_wait_for_a_transfer_that_it_does_not_need() -> None:
    world = small_world(train={"batches": 6, "max_staleness": 2})
    world.run(lambda: world.core.state.version == 1)
    world.models["rollout-0"].silent = {ReceiveWeights}
    world.deliver()
    [edge] = world.core.state.weights.edges.values()
    assert edge.position is not None and edge.position.version == 1
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


def swapped_in_unchecked() -> tuple[World, Model, Model]:
    """A rollout has swapped version 1 in while it samples, and the policy has not told its digest."""
    world = small_world(train={"batches": 6})
    policy, rollout = world.models["policy-0"], world.models["rollout-0"]
    rollout.slow = True
    world.deliver()
    policy.silent = {SendWeights}
    for _ in range(4):
        world.finish(rollout)
    world.deliver()
    assert rollout.holds == Position(1, 1, 1)
    return world, policy, rollout


def test_what_was_sampled_with_weights_that_nobody_has_compared_is_sampled_again() -> None:
    world, policy, rollout = swapped_in_unchecked()
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


def test_after_a_transfer_that_was_given_up_samples_of_what_it_brought_are_drawn_again() -> None:
    world, policy, rollout = swapped_in_unchecked()
    sampled = list(rollout.working)
    rollout.silent = {FormMesh, ReceiveWeights}
    world.say(rollout, MeshFailed(epoch_to(world, "rollout-0"), "the line went dead"))
    assert world.core.state.weights.edges == {}
    policy.silent, rollout.silent = {TrainStep}, set()
    world.pass_time(5.0)
    assert world.core.state.fleet.replicas["rollout-0"].position == Position(1, 1, 1), "the next attempt has proved it"
    for key in sampled:
        world.say(rollout, rollout.report(key))
    assert {fact.group for fact in world.of(Requeued)} >= {key[0] for key in sampled}


def versions_sent(world: World) -> list[int]:
    """The versions that the first rollout was sent, in order."""
    told = world.models["rollout-0"].told(ReceiveWeights)
    return [order.position.version for order in told if isinstance(order, ReceiveWeights)]


def test_rollouts_may_be_sent_every_second_version() -> None:
    world = small_world(train={"batches": 7, "max_staleness": 4}, weights={"every": 2})
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert versions_sent(world) == [0, 2, 4, 6]


def test_rollouts_are_sent_versions_often_enough_to_have_something_to_do() -> None:
    world = small_world(train={"batches": 6, "max_staleness": 2}, weights={"every": 50})
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert versions_sent(world) == [0, 2, 4, 6]


def test_how_often_rollouts_are_sent_versions_may_change_at_any_time() -> None:
    world = small_world(train={"batches": 8, "max_staleness": 4}, weights={"every": 4})
    world.change({"weights.every": 1}, at_step=5)
    world.deliver()
    assert versions_sent(world) == [0, 4, 5, 6, 7, 8]
