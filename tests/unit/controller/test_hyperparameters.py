"""Live hyper-parameters: one revision at a time, in force from a step boundary, known to every lease and step."""

from __future__ import annotations

from services.controller.core.hyperparameters import Hyperparameters, Revision
from services.controller.core.outcome import Leased, Revised
from shared.messages import Lease, TrainStep
from tests.unit.controller.world import World, small_world


def told(world: World) -> list[TrainStep]:
    return [order for order in world.models["policy-0"].told(TrainStep) if isinstance(order, TrainStep)]


def test_changes_come_into_force_in_the_order_of_their_steps_then_of_asking() -> None:
    live = Hyperparameters({"train.lr": 0.1, "train.kl_weight": 0.0})
    live.request({"train.lr": 0.4}, 9)
    live.request({"train.lr": 0.2}, 3)
    live.request({"train.lr": 0.3}, 3)
    assert live.advance(2, 7.0) == []
    first, second = live.advance(3, 7.0)
    assert first == Revision(1, 7.0, 3, {"train.lr": 0.2}, {"train.lr": 0.1})
    assert second == Revision(2, 7.0, 3, {"train.lr": 0.3}, {"train.lr": 0.2})
    assert (live.revision, live.number("train.lr")) == (2, 0.3)
    assert [revision.changes for revision in live.advance(100, 8.0)] == [{"train.lr": 0.4}]
    assert (live.revision, live.pending) == (3, [])


def test_what_will_hold_at_a_step_counts_what_is_pending_until_then() -> None:
    live = Hyperparameters({"train.lr": 0.1, "train.kl_weight": 0.0})
    live.request({"train.lr": 0.2}, 3)
    assert live.holds({"train.lr": 0.1}, 2)
    assert not live.holds({"train.lr": 0.2}, 2)
    assert live.holds({"train.lr": 0.2, "train.kl_weight": 0.0}, 3)
    assert not live.holds({"train.lr": 0.1}, 7)


def test_a_change_at_once_is_in_force_from_the_next_step_and_not_in_the_one_in_hand() -> None:
    world = small_world(train={"batches": 4})
    policy = world.models["policy-0"]
    world.run(lambda: world.core.state.steps.step is not None)
    in_hand = told(world)[-1].step
    world.change({"train.lr": 5e-4})
    assert world.of(Revised) == []
    world.deliver()
    assert world.of(Revised) == [Revised(1, in_hand + 1, {"train.lr": 5e-4})]
    for order in told(world):
        expected = (1, 5e-4) if order.step > in_hand else (0, 1e-4)
        assert (order.revision, order.hyperparameters["train.lr"]) == expected
    assert policy.told(TrainStep)


def test_a_change_for_a_later_step_waits_for_it() -> None:
    world = small_world(train={"batches": 5})
    world.change({"train.clip_high": 0.5}, at_step=3)
    world.deliver()
    assert world.of(Revised) == [Revised(1, 3, {"train.clip_high": 0.5})]
    assert [order.hyperparameters["train.clip_high"] for order in told(world)] == [0.28, 0.28, 0.28, 0.5, 0.5]
    assert [line["revision"] for line in world.metrics] == [0, 0, 0, 1, 1]


def test_leases_name_the_revision_and_sample_as_it_says() -> None:
    world = small_world(train={"batches": 6})
    world.change({"rollout.temperature": 0.5, "train.samples": 4}, at_step=2)
    world.deliver()
    grants = [g for order in world.models["rollout-0"].told(Lease) if isinstance(order, Lease) for g in order.grants]
    assert {grant.revision for grant in grants} == {0, 1}
    for grant in grants:
        expected = (0.5, 4) if grant.revision else (1.0, 2)
        assert (grant.sampling.temperature, grant.samples) == expected
    assert {fact.revision for fact in world.of(Leased)} == {0, 1}
    assert world.ended is not None and world.ended.outcome == "complete"


def test_revisions_and_what_waits_survive_a_new_term() -> None:
    world = small_world(train={"batches": 6})
    world.change({"train.lr": 5e-4})
    world.change({"train.lr": 7e-4}, at_step=4)
    world.run(lambda: world.core.state.version == 2)
    world.crash()
    assert world.core.state.hyperparameters.revision == 1
    world.deliver()
    assert [(fact.revision, fact.step) for fact in world.of(Revised)] == [(1, 0), (2, 4)]
    last = {order.step: order.hyperparameters["train.lr"] for order in told(world)}
    assert last == {0: 5e-4, 1: 5e-4, 2: 5e-4, 3: 5e-4, 4: 7e-4, 5: 7e-4}


def test_a_retried_attempt_keeps_the_revision_that_is_in_force() -> None:
    world = small_world()
    world.models["policy-0"].silent = {TrainStep}
    world.deliver()
    world.change({"train.lr": 5e-4})
    new = world.replace("policy-0")
    world.deliver()
    orders = [order for order in new.told(TrainStep) if isinstance(order, TrainStep)]
    assert [(order.step, order.revision) for order in orders] == [(0, 0), (1, 1), (2, 1)]


def test_checkpoints_come_as_often_as_the_live_value_says() -> None:
    world = small_world(train={"batches": 8}, checkpoint={"every": 4})
    world.change({"checkpoint.every": 2}, at_step=4)
    world.deliver()
    positions = [(event.body.position.version) for event in world.events if hasattr(event, "body")
                 and type(event.body).__name__ == "CheckpointSaved"]  # fmt: skip
    assert positions == [4, 6, 8]
