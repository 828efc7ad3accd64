"""A replica's life: how it becomes ready, how it is lost, and which way back there isn't."""

from __future__ import annotations

import pytest

from services.controller.core.events import ReplicaLost
from services.controller.core.fleet import Fleet
from services.controller.core.outcome import Gone, Joined, Part, Synced, Welcome
from shared.messages import (
    Goodbye,
    Lease,
    LoadState,
    Position,
    ReceiveWeights,
    Register,
    ReplicaFailed,
    SaveCheckpoint,
    StateLoaded,
)
from tests.unit.controller.world import Model, World, recipe, small_world


def fault_of(world: World, model: Model, rank: int) -> str | None:
    """What the registration of a rank is refused as."""
    refusal = world.core.judge_registration(model.register(rank))
    return refusal.fault if refusal is not None else None


def test_a_rollout_lives_from_loading_over_stale_to_ready() -> None:
    world = World(recipe())
    world.join("policy-0", "policy")
    world.deliver()
    rollout = world.join("rollout-0", "rollout", silent={LoadState, ReceiveWeights})
    assert world.state_of("rollout-0") == "loading"
    assert isinstance(rollout.seen[0], LoadState)

    world.say(rollout, StateLoaded(Position(1, 0, 0)))
    world.deliver()
    assert world.state_of("rollout-0") == "stale"
    assert not rollout.told(Lease), "a stale engine is given no work"

    rollout.silent.clear()
    world.deliver()
    world.pass_time(100.0)
    assert world.of(Synced), "a second attempt at the transfer made it ready"
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_policy_is_ready_when_it_has_loaded_what_it_was_told() -> None:
    world = World(recipe())
    policy = world.join("policy-0", "policy")
    world.deliver()
    assert world.state_of("policy-0") == "ready"
    assert policy.seen == [LoadState("initial", Position(1, 0, 0), "")]
    assert world.core.state.fleet.replicas["policy-0"].position == Position(1, 0, 0)


@pytest.mark.parametrize("state", ["joining", "loading", "stale", "ready", "draining"])
@pytest.mark.parametrize("gone", ["lost", "left"])
def test_nothing_comes_back_from_lost_or_left(gone: str, state: str) -> None:
    fleet = Fleet()
    replica = fleet.enter(Register("rollout", "rollout-0", 0, 1, 1, 1, "here", None, [], []), 0.0)
    fleet.move(replica, gone, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"rollout-0#1 is {gone} and cannot become {state}"):
        fleet.move(replica, state, 2.0)  # type: ignore[arg-type]
    assert replica.position is None


def test_what_comes_back_after_a_loss_is_a_new_incarnation_that_must_sync_again() -> None:
    world = small_world()
    world.run(lambda: world.state_of("rollout-0") == "ready")
    old = world.models["rollout-0"]
    world.lose("rollout-0", dead=False)
    assert world.state_of("rollout-0") == "lost"

    before = len(world.of(Synced))
    world.register(old)
    assert (old.incarnation, world.state_of("rollout-0")) == (2, "loading")
    world.run(lambda: world.state_of("rollout-0") == "ready")
    assert len(world.of(Synced)) > before


def test_the_same_process_registering_again_is_the_same_incarnation() -> None:
    world = small_world()
    world.run(lambda: world.state_of("rollout-0") == "ready")
    model = world.models["rollout-0"]
    world.register(model)
    assert (model.incarnation, world.state_of("rollout-0")) == (1, "ready")
    assert len([fact for fact in world.of(Joined) if fact.replica == "rollout-0"]) == 1


def test_a_new_process_of_a_name_replaces_the_one_before_it() -> None:
    world = small_world()
    world.run(lambda: world.state_of("rollout-0") == "ready")
    new = world.join("rollout-0", "rollout")
    assert new.incarnation == 2
    assert [(fact.incarnation, fact.state) for fact in world.of(Gone)] == [(1, "lost")]
    parted = world.effects.index(Part("rollout-0", 1))
    welcomed = next(i for i, e in enumerate(world.effects) if isinstance(e, Welcome) and e.incarnation == 2)
    assert parted < welcomed, "the old session ends before the new one begins"


def test_a_replaced_process_cannot_take_its_name_back() -> None:
    world = small_world()
    world.run(lambda: world.state_of("rollout-0") == "ready")
    old = world.models["rollout-0"]
    world.join("rollout-0", "rollout")
    refusal = world.register(old)
    assert refusal is not None
    assert refusal.fault == "incarnation"
    assert world.core.state.fleet.replicas["rollout-0"].incarnation == 2


def test_a_replaced_process_stays_replaced_after_its_successor_is_lost() -> None:
    world = small_world()
    world.deliver(limit=3)
    old = world.models["rollout-0"]
    new = world.join("rollout-0", "rollout")
    world.lose("rollout-0", dead=False)
    assert world.register(old) is not None
    assert world.register(new) is None


def test_a_replica_of_several_ranks_loads_when_all_of_them_are_there() -> None:
    world = World(recipe())
    rollout = world.join("rollout-0", "rollout", ranks=3)
    world.pass_time(100.0)  # an engine takes its time to start
    for rank in (2, 2, 0):  # again: it changes nothing
        assert world.register(rollout, rank) is None
    assert (world.state_of("rollout-0"), rollout.seen) == ("joining", [])
    world.register(rollout, 1)
    assert (world.state_of("rollout-0"), rollout.incarnation) == ("loading", 1)
    assert rollout.seen == [LoadState("initial", Position(1, 0, 0), "")]


def test_rank_0_need_not_be_the_first() -> None:
    world = World(recipe())
    rollout = Model(world, "rollout-0", "rollout", 1, ranks=2)
    world.models["rollout-0"] = rollout
    world.register(rollout, 1)
    assert world.state_of("rollout-0") == "joining"
    world.register(rollout, 0)
    assert (world.state_of("rollout-0"), rollout.incarnation) == ("loading", 1)


def test_ranks_of_another_start_do_not_join_those_that_are_there() -> None:
    world = World(recipe())
    old = world.join("rollout-0", "rollout", ranks=2)
    new = world.join("rollout-0", "rollout", ranks=2)
    assert [(fact.incarnation, fact.state) for fact in world.of(Gone)] == [(1, "lost")]
    for rank in (0, 1):
        assert fault_of(world, old, rank) == "incarnation"
    assert world.state_of("rollout-0") == "joining"
    assert world.register(new, 1) is None
    assert (world.state_of("rollout-0"), new.incarnation) == ("loading", 2)


def test_a_rank_of_another_number_of_ranks_is_refused() -> None:
    world = World(recipe())
    rollout = world.join("rollout-0", "rollout", ranks=2)
    rollout.ranks = 3
    assert fault_of(world, rollout, 1) == "identity"


def test_a_lost_rank_is_the_replicas_loss_and_none_of_its_processes_comes_back() -> None:
    world = World(recipe())
    world.join("policy-0", "policy")
    rollout = world.join("rollout-0", "rollout", ranks=2, slow=True)
    world.register(rollout, 1)
    world.run(lambda: len(rollout.working) == 8)
    world.step(ReplicaLost(at=world.now, replica="rollout-0", incarnation=1, cause="rank 1 silent for 10.1 s"))
    assert [(fact.state, fact.cause) for fact in world.of(Gone)] == [("lost", "rank 1 silent for 10.1 s")]
    assert not world.core.state.ledger.having("leased")
    assert len(world.core.state.ledger.having("queued")) == 8
    for rank in (0, 1):
        assert fault_of(world, rollout, rank) == "incarnation"

    new = world.join("rollout-0", "rollout", ranks=2)
    assert fault_of(world, rollout, 1) == "incarnation"
    world.pass_time(50.0)
    assert (world.state_of("rollout-0"), new.seen) == ("joining", []), "a new one waits for all of its own ranks"
    world.register(new, 1)
    world.run(lambda: world.state_of("rollout-0") == "ready")
    assert new.told(ReceiveWeights)


def test_a_replica_of_several_ranks_that_left_is_over_for_all_of_them() -> None:
    world = World(recipe())
    rollout = world.join("rollout-0", "rollout", ranks=2)
    world.register(rollout, 1)
    world.say(rollout, Goodbye("drained"))
    assert world.state_of("rollout-0") == "left"
    assert fault_of(world, rollout, 1) == "incarnation"


def test_a_rank_that_never_joins_costs_the_replica_its_place_in_time_by_name() -> None:
    world = World(recipe(timeouts={"load_s": 30.0}))
    rollout = world.join("rollout-0", "rollout", ranks=3)
    world.register(rollout, 2)
    assert world.core.next_deadline() == world.now + 30.0
    world.pass_time(31.0)
    (gone,) = world.of(Gone)
    assert "timeouts.load_s" in gone.cause  # type: ignore[attr-defined]
    assert gone.cause.endswith("of its 3 ranks these did not register: 1")  # type: ignore[attr-defined]


def test_a_replica_that_never_loads_is_lost_at_a_named_deadline() -> None:
    world = World(recipe(timeouts={"load_s": 30.0}))
    world.join("policy-0", "policy", silent={LoadState})
    world.pass_time(29.0)
    assert world.state_of("policy-0") == "loading"
    world.pass_time(2.0)
    assert world.state_of("policy-0") == "lost"
    assert "timeouts.load_s" in world.of(Gone)[0].cause  # type: ignore[attr-defined]


def test_a_lost_policy_that_proves_to_hold_the_committed_state_is_ready_without_loading() -> None:
    world = small_world()
    world.run(lambda: world.core.state.version == 2 and world.core.state.steps.step is None)
    policy = world.models["policy-0"]
    loads = len(policy.told(LoadState))
    world.lose("policy-0", dead=False)
    world.register(policy)
    assert (policy.incarnation, world.state_of("policy-0")) == (2, "ready")
    assert world.core.state.fleet.replicas["policy-0"].position == world.core.state.lineages.committed
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert len(policy.told(LoadState)) == loads
    assert world.core.state.lineage == 1


def test_a_lost_policy_that_holds_anything_else_must_load() -> None:
    world = small_world(checkpoint={"every": 1})
    world.run(lambda: world.core.state.lineages.settled.version == 2)
    world.replace("policy-0", holds=Position(1, 1, 1), silent={LoadState})
    assert world.state_of("policy-0") == "loading"


def test_goodbye_gives_the_leases_back_and_ends_the_incarnation() -> None:
    world = World(recipe())
    world.join("policy-0", "policy")
    model = world.join("rollout-0", "rollout", slow=True)
    world.run(lambda: len(model.working) == 8)
    world.say(model, Goodbye("done"))
    assert world.state_of("rollout-0") == "left"
    assert not world.core.state.ledger.having("leased")
    assert len(world.core.state.ledger.having("queued")) == 8
    assert world.say(model, Goodbye("done")) == "unknown_sender"


def test_a_fatal_failure_of_a_replica_ends_the_run_and_another_one_does_not() -> None:
    world = small_world()
    world.deliver(limit=2)
    rollout = world.models["rollout-0"]
    world.say(rollout, ReplicaFailed("the engine is out of memory", fatal=False))
    assert (world.state_of("rollout-0"), world.ended) == ("lost", None)

    new = world.join("rollout-0", "rollout")
    world.say(new, ReplicaFailed("no such model", fatal=True))
    assert world.ended is not None
    assert (world.ended.outcome, world.ended.cause) == ("failed", "rollout-0: no such model")


def test_a_run_where_nothing_moves_fails_and_says_who_waits_for_whom() -> None:
    world = World(recipe(timeouts={"stall_s": 50.0}))
    world.join("policy-0", "policy")
    world.deliver()
    world.pass_time(60.0)
    assert world.ended is not None
    assert world.ended.outcome == "failed"
    assert "timeouts.stall_s" in world.ended.cause
    assert "rollout: none registered" in world.ended.cause


def test_the_writer_of_a_checkpoint_that_is_lost_does_not_hold_the_next_one_up() -> None:
    world = small_world(checkpoint={"every": 1})
    policy = world.models["policy-0"]
    policy.silent = {SaveCheckpoint}
    world.run(lambda: world.core.state.lineages.saving is not None)
    world.replace("policy-0", holds=world.core.state.lineages.committed)
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
