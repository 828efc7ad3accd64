"""Staleness is a bound: whatever lags, is slow or comes in whatever order, and the run completes all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.controller.core.outcome import Consumed, Discarded
from shared.messages import FormMesh, Lease, Position, ReceiveWeights
from tests.unit.controller.wandering import ALL, Chances, wander
from tests.unit.controller.world import Model, World, ready_at_once, recipe

SHORT = {
    "lease_s": 5.0, "transfer_s": 5.0, "mesh_s": 3.0, "step_s": 10.0, "checkpoint_s": 10.0, "rejoin_s": 5.0,
    "load_s": 20.0,
}  # fmt: skip


def slow_world(bound: int, *, rollouts: int = 1, **tables: dict[str, object]) -> tuple[World, list[Model]]:
    train = {"batches": 8, "max_staleness": bound, **tables.pop("train", {})}
    world = World(recipe(train=train, **tables))
    models = [world.join(f"rollout-{number}", "rollout", slow=True) for number in range(rollouts)]
    world.join("policy-0", "policy")
    ready_at_once(world)
    return world, models


def consumed(world: World) -> list[Consumed]:
    return [fact for fact in world.of(Consumed) if isinstance(fact, Consumed)]


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_the_version_waits_for_a_straggler_that_would_fall_behind_the_bound(bound: int) -> None:
    world, [slow] = slow_world(bound)
    straggler = next(iter(slow.working))
    for _ in range(200):
        others = [key for key in slow.working if key != straggler]
        if not others:
            break
        world.finish(slow, others[0])
        world.deliver()
    assert straggler in slow.working
    assert world.core.state.version == bound, "one more would leave the straggler behind the bound"
    world.finish(slow, straggler)
    slow.slow = False
    for key in list(slow.working):
        world.finish(slow, key)
    world.deliver()
    taken = next(fact for fact in consumed(world) if straggler[0] in fact.groups)
    assert (taken.version, taken.staleness) == (bound, bound)
    assert world.ended is not None and world.ended.outcome == "complete"


def test_the_last_batch_that_may_take_a_straggler_does_even_when_newer_groups_were_first() -> None:
    world, [slow] = slow_world(1)
    keys = list(slow.working)
    for key in keys[:4]:
        world.finish(slow, key)
    world.deliver()  # version 1; the second half is due now
    for key in [key for key in slow.working if key not in keys]:
        world.finish(slow, key)
    world.deliver()
    assert world.core.state.version == 1, "newer groups fill no batch while older ones are due"
    for key in keys[4:]:
        world.finish(slow, key)
    world.deliver()
    assert consumed(world)[1].groups == [group for group, _ in keys[4:]]


def test_a_straggler_past_its_deadline_is_leased_afresh_and_holds_nobody_up_longer() -> None:
    world, [slow] = slow_world(0, timeouts={"lease_s": 20.0})
    straggler = next(iter(slow.working))
    for key in list(slow.working)[1:]:
        world.finish(slow, key)
    world.deliver()
    assert world.core.state.version == 0
    slow.slow = False
    world.pass_time(21.0)
    assert world.ended is not None and world.ended.outcome == "complete"
    assert straggler[0] in consumed(world)[0].groups, "its second attempt was reported"


def test_a_replica_that_lags_behind_the_bound_is_leased_nothing() -> None:
    """The engine never gets newer weights: training goes on only as far as the bound allows."""
    for bound in (0, 1, 4):
        world, [rollout] = slow_world(bound)
        rollout.slow = False
        rollout.silent = {ReceiveWeights}
        for key in list(rollout.working):
            world.finish(rollout, key)
        world.deliver()
        assert world.core.state.version == bound + 1
        assert all(fact.staleness <= bound for fact in consumed(world))
        versions = {g.version for order in rollout.told(Lease) if isinstance(order, Lease) for g in order.grants}
        assert versions == {0}


def test_replicas_that_lag_at_different_versions_share_the_bound() -> None:
    world, [first, second] = slow_world(2, rollouts=2)
    second.silent = {ReceiveWeights, FormMesh}
    first.slow = False
    for _ in range(50):
        world.deliver()
        if not first.working and world.idle:
            break
        for key in list(first.working):
            world.finish(first, key)
    assert world.core.state.version <= 2, "the work of the second, begun at version 0, is waited for"
    for key in list(second.working):
        world.finish(second, key)
    second.silent, second.slow = set(), False
    world.deliver()
    world.pass_time(300.0)
    assert world.ended is not None and world.ended.outcome == "complete"
    assert max(fact.staleness for fact in consumed(world)) == 2


def test_a_report_whose_weights_changed_midway_counts_from_its_oldest_token() -> None:
    world, [slow] = slow_world(1)
    for key in list(slow.working)[:4]:
        world.finish(slow, key)
    world.deliver()
    assert slow.holds == Position(1, 1, 1), "the engine got new weights with sequences in flight"
    begun_before = [key for key, (_, version) in slow.working.items() if version == 0]
    assert len(begun_before) == 4
    for key in begun_before:
        report = slow.report(key)
        assert (report.oldest, report.newest) == (0, 1)
        world.say(slow, report)
    world.deliver()
    assert consumed(world)[1].staleness == 1


def test_reported_groups_that_no_batch_can_take_in_time_are_discarded_as_stale() -> None:
    world, models = slow_world(0, rollouts=2, train={"batches": 3})
    for model in models:
        model.slow = False
        for key in list(model.working):
            world.finish(model, key)
    world.deliver()
    stale = [fact for fact in world.of(Discarded) if isinstance(fact, Discarded) and fact.cause == "stale"]
    assert all(fact.staleness == 0 for fact in consumed(world))
    assert world.core.state.ledger.books[1].discarded.get("stale", 0) == len(stale)
    assert world.ended is not None and world.ended.outcome == "complete"


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 4]), st.integers(1, 3))
def test_any_order_of_messages_keeps_the_bound_and_completes(
    tmp_path: Path, seed: int, bound: int, rollouts: int
) -> None:
    world = wander(
        seed, Chances(), rollouts=rollouts, replay=True, timeouts=SHORT, train={"max_staleness": bound, "batches": 5}
    )
    _complete_and_clean(world, tmp_path, bound)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 4]), st.integers(1, 3), st.booleans())
def test_any_history_of_losses_crashes_and_failures_keeps_the_bound_and_completes(
    tmp_path: Path, seed: int, bound: int, rollouts: int, evaluated: bool
) -> None:
    tables: dict[str, object] = (
        {"evaluation": {"every": 2, "suites": {"heldout": {"problems": 4}}}} if evaluated else {}
    )
    world = wander(
        seed,
        ALL,
        rollouts=rollouts,
        timeouts=SHORT,
        sft={"dataset": "train", "batches": 2, "batch_size": 4, "lr": 1e-3},
        train={"max_staleness": bound, "batches": 4, "mu": 2, "minibatches": 2},
        checkpoint={"every": 2},
        **tables,
    )
    assert world.ended is not None
    if world.ended.outcome == "failed":  # three failures in a row, which chance may bring
        assert "in a row" in world.ended.cause
        assert world.audit(tmp_path).clean
    else:
        _complete_and_clean(world, tmp_path, bound)


def _complete_and_clean(world: World, folder: Path, bound: int) -> None:
    assert world.ended is not None and world.ended.outcome == "complete"
    audit = world.audit(folder)
    assert audit.faults == []
    assert audit.staleness <= bound
    assert audit.outcome == "complete"
