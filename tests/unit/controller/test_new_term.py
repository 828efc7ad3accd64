"""The controller may die after any event: the new term replays its journal, and the run completes with clean books."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.controller.core.core import Core
from services.controller.core.outcome import Committed, Consumed, Gone, RolledBack, Send, Welcome
from shared.messages import (
    CommitStep,
    GradientsReady,
    Lease,
    LeaseRef,
    LoadState,
    Position,
    RevokeMesh,
    StateLoaded,
    StepApplied,
    TrainStep,
)
from tests.unit.controller.world import World, recipe, small_world

WHOLE = {
    "sft": {"dataset": "train", "batches": 2, "batch_size": 4, "lr": 1e-3, "stop": {"accuracy": 0.9, "every": 1}},
    "train": {"batches": 3, "mu": 2, "minibatches": 2},
    "evaluation": {"every": 1, "suites": {"heldout": {"problems": 2}}},
    "checkpoint": {"every": 1},
}


def whole_world() -> World:
    return small_world(check_replay=False, rollouts=2, **WHOLE)


def length() -> int:
    world = whole_world()
    return world.deliver()


@pytest.mark.parametrize("survivors", ["all", "no rollout", "no policy", "nobody"])
def test_a_crash_after_any_single_event_loses_nothing(survivors: str, tmp_path: Path) -> None:
    for events in range(0, length(), 1 if survivors == "all" else 3):
        world = whole_world()
        world.deliver(limit=events)
        for name in list(world.models):
            if survivors == "nobody" or survivors == f"no {name.partition('-')[0]}":
                world.models[name].alive = False
        world._queue = type(world._queue)(entry for entry in world._queue if entry[0].alive)
        world.crash()
        for name, model in list(world.models.items()):
            if not model.alive:
                world.join(name, model.role)
        world.deliver()
        world.pass_time(100.0)
        assert world.ended is not None and world.ended.outcome == "complete", f"crash after {events} messages"
        audit = world.audit(tmp_path)
        assert audit.faults == [], f"crash after {events} messages"
        assert (audit.terms, audit.outcome) == (2, "complete")
        if survivors in ("all", "no rollout"):
            assert audit.rollbacks == []


@pytest.mark.parametrize("messages", [7, 11])
def test_a_controller_that_crashes_again_and_again_comes_to_the_end(messages: int, tmp_path: Path) -> None:
    world = whole_world()
    for _ in range(100):
        delivered = world.deliver(limit=messages)
        if world.ended is not None:
            break
        if delivered < messages:
            world.pass_time(max(world.core.next_deadline() - world.now, 0.0) + 0.001)
        world.crash()
    assert world.ended is not None and world.ended.outcome == "complete"
    audit = world.audit(tmp_path)
    assert audit.faults == []
    assert audit.terms > 5


def test_replaying_from_a_snapshot_after_any_event_gives_the_same_as_replaying_all() -> None:
    world = whole_world()
    world.deliver()
    for at in range(0, len(world.events), 7):
        core = Core(world.recipe)
        for event in world.events[:at]:
            core.step(event)
        core = Core.restore(world.recipe, core.snapshot())
        for event in world.events[at:]:
            core.step(event)
        assert core.snapshot() == world.core.snapshot()


def test_a_rank_that_does_not_come_back_in_a_new_term_is_the_replicas_loss() -> None:
    world = World(recipe(timeouts={"rejoin_s": 5.0}))
    world.join("policy-0", "policy")
    rollout = world.join("rollout-0", "rollout", ranks=3, slow=True)
    for rank in (1, 2):
        world.register(rollout, rank)
    world.run(lambda: len(rollout.working) == 8)
    world.crash(rejoin=False)
    world.register(world.models["policy-0"])
    told = len(rollout.seen)
    for rank in (0, 2):
        assert world.register(rollout, rank) is None
    world.pass_time(4.0)
    assert world.state_of("rollout-0") == "ready"
    assert len(rollout.seen) == told, "it has no orders before all of its ranks are back"
    world.pass_time(2.0)
    (gone,) = world.of(Gone)
    assert (gone.state, "timeouts.rejoin_s" in gone.cause) == ("lost", True)  # type: ignore[attr-defined]
    assert gone.cause.endswith("of its 3 ranks these did not register: 1")  # type: ignore[attr-defined]


def test_rank_0_that_loads_in_a_new_term_does_not_hide_a_rank_that_is_gone() -> None:
    world = World(recipe(timeouts={"rejoin_s": 5.0}))
    rollout = world.join("rollout-0", "rollout", ranks=2, silent={LoadState})
    world.register(rollout, 1)
    world.crash(rejoin=False)
    world.register(rollout, 0)
    world.say(rollout, StateLoaded(Position(1, 0, 0)))
    assert world.state_of("rollout-0") == "stale"
    world.pass_time(6.0)
    assert world.state_of("rollout-0") == "lost"


def test_an_engine_that_starts_while_the_controller_dies_has_its_time_anew() -> None:
    world = World(recipe(timeouts={"rejoin_s": 5.0, "load_s": 60.0}))
    rollout = world.join("rollout-0", "rollout", ranks=3)
    world.register(rollout, 1)
    world.crash(rejoin=False)
    for rank in (2, 0, 1):  # the last worker registers for the first time
        world.register(rollout, rank)
    assert world.state_of("rollout-0") == "loading"
    assert world.core.state.fleet.replicas["rollout-0"].deadline == world.now + 60.0


def test_nobody_is_given_orders_before_it_has_registered_in_the_new_term() -> None:
    world = small_world()
    world.run(lambda: world.core.state.version == 1)
    world.crash(rejoin=False)
    before = len(world.effects)
    world.pass_time(5.0)
    assert not [effect for effect in world.effects[before:] if isinstance(effect, Send)]
    world.register(world.models["policy-0"])
    sends = [effect for effect in world.effects[before:] if isinstance(effect, Send)]
    assert {effect.replica for effect in sends} <= {"policy-0"}


def test_who_does_not_come_back_in_time_is_lost() -> None:
    world = small_world(timeouts={"rejoin_s": 12.0})
    world.run(lambda: world.core.state.version == 1)
    world.models["rollout-0"].alive = False
    world.crash()
    world.pass_time(11.0)
    assert world.state_of("rollout-0") == "ready"
    world.pass_time(2.0)
    assert world.state_of("rollout-0") == "lost"
    assert "timeouts.rejoin_s" in world.of(Gone)[-1].cause  # type: ignore[attr-defined]


def test_leases_in_hand_go_on_and_those_that_the_replica_does_not_hold_are_granted_again() -> None:
    world = World(recipe())
    world.join("policy-0", "policy")
    slow = world.join("rollout-0", "rollout", slow=True)
    world.deliver()
    kept = list(slow.working)
    forgotten = kept.pop()
    del slow.working[forgotten]
    before = len(slow.told(Lease))
    world.crash()
    welcome = [effect for effect in world.effects if isinstance(effect, Welcome)][-1]
    assert sorted(welcome.leases) == sorted(kept)
    again = [grant for order in slow.told(Lease)[before:] for grant in order.grants]
    assert [(grant.group, grant.attempt) for grant in again] == [forgotten]


def test_what_a_replica_holds_beyond_its_leases_is_void() -> None:
    world = World(recipe(timeouts={"lease_s": 20.0}))
    world.join("policy-0", "policy")
    slow = world.join("rollout-0", "rollout", slow=True)
    world.deliver()
    slow.working[999, 1] = next(iter(slow.working.values()))
    world.crash()
    assert (999, 1) not in slow.working
    assert LeaseRef(999, 1) not in slow.register().leases


def test_a_vote_that_was_on_its_way_counts_in_the_new_term() -> None:
    world = small_world()
    policy = world.models["policy-0"]
    world.run(lambda: bool(world.under_way(policy, GradientsReady)))
    attempt = policy.told(TrainStep)[-1].attempt
    world.crash()
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    first = world.of(Committed)[0]
    assert isinstance(first, Committed)
    assert first.attempt == attempt, "the gradients in hand were used"


def test_a_commit_on_record_is_ordered_again_and_applied_once() -> None:
    world = small_world()
    policy = world.models["policy-0"]
    world.run(lambda: bool(world.under_way(policy, StepApplied)))
    world._queue.clear()  # the answer was lost with the old session
    world.crash()
    assert [order.step for order in policy.told(CommitStep)] == [0, 0]
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert [fact.step for fact in world.of(Committed)] == [0, 1, 2]


def test_waits_are_granted_anew_by_the_new_term() -> None:
    world = small_world(timeouts={"lease_s": 20.0, "step_s": 20.0})
    world.models["policy-0"].silent = {TrainStep}
    world.deliver()
    world.now += 100.0  # the controller was away for longer than any wait
    world.crash()
    assert not world.of(Gone)
    world.pass_time(19.0)
    assert not world.of(Gone)
    world.pass_time(2.0)
    assert world.of(Gone)


def test_a_policy_that_dies_with_the_controller_costs_only_what_was_not_settled(tmp_path: Path) -> None:
    world = small_world(train={"batches": 6}, checkpoint={"every": 2})
    world.run(lambda: world.core.state.version == 5 and world.core.state.lineages.settled.version == 4)
    world.models["policy-0"].alive = False
    world._queue.clear()
    world.crash()
    world.join("policy-0", "policy")
    world.deliver()
    [back] = world.of(RolledBack)
    assert isinstance(back, RolledBack)
    assert (back.version, back.redo_batches) == (4, 1)
    world.pass_time(200.0)
    assert world.ended is not None and world.ended.outcome == "complete"
    assert world.audit(tmp_path).faults == []
    assert len(world.of(Consumed)) == 7


def test_whoever_was_away_when_a_mesh_was_revoked_hears_of_it_when_it_is_back() -> None:
    world = small_world(rollouts=2)
    world.run(lambda: any(mesh.state == "formed" for mesh in world.core.state.meshes.meshes.values()))
    world.crash(rejoin=False)
    world.lose("policy-0")
    world.effects.clear()
    world.register(world.models["rollout-0"])
    kinds = [type(effect) for effect in world.effects]
    told = [effect for effect in world.effects if isinstance(effect, Send) and isinstance(effect.message, RevokeMesh)]
    assert [(effect.replica, effect.message.epoch) for effect in told] == [("rollout-0", 1)]
    assert kinds.index(Welcome) < world.effects.index(told[0]), "not before its session is open"


def test_a_fresh_process_is_told_of_no_mesh_that_it_never_knew() -> None:
    world = small_world(rollouts=2)
    world.run(lambda: any(mesh.state == "formed" for mesh in world.core.state.meshes.meshes.values()))
    world.effects.clear()
    world.replace("rollout-0")
    sent = [e for e in world.effects if isinstance(e, Send) and isinstance(e.message, RevokeMesh)]
    assert "rollout-0" not in [effect.replica for effect in sent]
