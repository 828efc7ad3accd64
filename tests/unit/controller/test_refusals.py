"""What the core takes, what it has had before, and what it refuses by name; none of this changes the state."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from services.controller.core.outcome import Send
from shared.messages import (
    ArrayHeader,
    CheckpointFailed,
    CheckpointSaved,
    CommitStep,
    DatasetIdentity,
    FormMesh,
    Goodbye,
    GradientsReady,
    GroupReport,
    LeaseReturned,
    MeshFailed,
    MeshFormed,
    Position,
    ReceiveWeights,
    Register,
    SaveCheckpoint,
    SendWeights,
    StateLoaded,
    StepApplied,
    TrainStep,
    WeightsFailed,
    WeightsLoaded,
    WeightsSent,
)
from tests.unit.controller.world import DATASETS, Model, World, recipe, small_world


def registering(**changes: object) -> Register:
    fields = {"role": "rollout", "replica": "rollout-9", "rank": 0, "world": 1, "nonce": 99, "pid": 99, "host": "here",
              "holds": None, "leases": [], "datasets": DATASETS}  # fmt: skip
    return Register(**(fields | changes))  # type: ignore[arg-type]


def working() -> tuple[World, Model]:
    """A slow rollout that holds leases."""
    world = World(recipe())
    world.join("policy-0", "policy")
    slow = world.join("rollout-0", "rollout", slow=True)
    world.deliver()
    return world, slow


def changed(report: GroupReport, **changes: object) -> GroupReport:
    return GroupReport(**({name: getattr(report, name) for name in report.__struct_fields__} | changes))


@pytest.mark.parametrize(
    ("register", "fault"),
    [
        (registering(role="evaluator"), "role"),
        (registering(role="person"), "role"),
        (registering(rank=2, world=2), "malformed"),
        (registering(rank=-1), "malformed"),
        (registering(role="policy", replica="policy-1"), None),
        (registering(role="policy", replica="rollout-0"), "identity"),
        (registering(replica="policy-0"), "identity"),
        (registering(datasets=[DatasetIdentity("train", 999, "aa")]), "dataset"),
        (registering(datasets=[DatasetIdentity("train", 1000, "zz")]), "dataset"),
        (registering(datasets=[DatasetIdentity("other", 5, "cc")]), None),
        (registering(), None),
    ],
)
def test_who_may_register(register: Register, fault: str | None) -> None:
    world, _ = working()
    before = world.core.snapshot()
    refusal = world.core.judge_registration(register)
    assert (refusal.fault if refusal else None) == fault
    assert world.core.snapshot() == before


def test_a_data_set_conflict_says_what_was_expected_and_what_came() -> None:
    world, _ = working()
    refusal = world.core.judge_registration(registering(datasets=[DatasetIdentity("train", 999, "zz")]))
    assert refusal is not None
    assert refusal.expected == "train: 1000 rows, fingerprint aa"
    assert refusal.got == "train: 999 rows, fingerprint zz"


def test_another_policy_may_register_once_the_first_is_gone() -> None:
    world, _ = working()
    world.lose("policy-0")
    assert world.core.judge_registration(registering(role="policy", replica="policy-1")) is None


def test_messages_of_nobody_of_the_gone_and_of_the_replaced_are_told_apart() -> None:
    world, slow = working()
    judge = world.core.judge
    assert judge("rollout-7", 1, Goodbye("")).fault == "unknown_sender"  # type: ignore[union-attr]
    world.lose("rollout-0", dead=False)
    assert judge("rollout-0", 1, Goodbye("")).fault == "unknown_sender"  # type: ignore[union-attr]
    world.register(slow)
    assert judge("rollout-0", 1, Goodbye("")).fault == "incarnation"  # type: ignore[union-attr]
    assert judge("rollout-0", 2, Goodbye("")) == "fresh"


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda r: r, "fresh"),
        (lambda r: changed(r, lineage=2), "lineage"),
        (lambda r: changed(r, lineage=0), "lineage"),
        (lambda r: changed(r, attempt=0), "attempt"),
        (lambda r: changed(r, attempt=2), "attempt"),
        (lambda r: changed(r, group=12345), "attempt"),
        (lambda r: changed(r, rewards=[1.0]), "malformed"),
        (lambda r: changed(r, lengths=[2, 2, 2]), "malformed"),
        (lambda r: changed(r, truncated=[]), "malformed"),
        (lambda r: changed(r, parts={"verifier": [1.0]}), "malformed"),
        (lambda r: changed(r, rewards=[1.0, float("nan")]), "malformed"),
        (lambda r: changed(r, rewards=[1.0, float("inf")]), "malformed"),
        (lambda r: changed(r, lengths=[0, 2]), "malformed"),
        (lambda r: changed(r, arrays=[]), "malformed"),
        (lambda r: changed(r, oldest=-1), "state"),
        (lambda r: changed(r, parts={"verifier": [1.0, 0.0]}), "fresh"),
        (lambda r: changed(r, arrays=[ArrayHeader("x", "int32", [4])]), "fresh"),
    ],
)
def test_reports_of_a_group(change: Callable[[GroupReport], GroupReport], verdict: str) -> None:
    world, slow = working()
    report = change(slow.report(next(iter(slow.working))))
    before, events = world.core.snapshot(), len(world.events)
    assert world.say(slow, report) == verdict
    if verdict != "fresh":
        assert world.core.snapshot() == before
        assert len(world.events) == events, "what is refused is not journaled"


def test_a_report_that_comes_again_is_a_duplicate_and_not_journaled_again() -> None:
    world, slow = working()
    report = slow.report(next(iter(slow.working)))
    assert world.say(slow, report) == "fresh"
    events = len(world.events)
    assert world.say(slow, report) == "duplicate"
    assert world.say(slow, LeaseReturned(report.group, report.attempt, 1, "handed_back", "")) == "duplicate"
    assert len(world.events) == events


def test_a_lease_of_another_replica_may_not_be_reported_or_returned() -> None:
    world, slow = working()
    other = world.join("rollout-1", "rollout")
    world.run(lambda: world.state_of("rollout-1") == "ready")
    key = next(iter(slow.working))
    report = slow.report(key)
    assert world.say(other, report) == "attempt"
    assert world.say(other, LeaseReturned(*key, 1, "handed_back", "")) == "attempt"
    assert world.say(slow, report) == "fresh"
    assert world.say(other, report) == "attempt"


def test_a_report_of_a_consumed_group_that_is_settled_is_refused() -> None:
    world = small_world(checkpoint={"every": 1}, train={"batches": 6})
    world.run(lambda: world.core.state.lineages.settled.version == 2)
    report = next(event.body for event in world.events if isinstance(getattr(event, "body", None), GroupReport))
    assert world.say(world.models["rollout-0"], report) == "attempt"


def test_a_policy_that_loaded_something_else_is_refused() -> None:
    world = World(recipe())
    policy = world.join("policy-0", "policy")
    policy_answer = world.under_way(policy)
    assert policy_answer == [StateLoaded(Position(1, 0, 0))]
    assert world.say(policy, StateLoaded(Position(1, 1, 1))) == "lineage"
    assert world.say(policy, StateLoaded(Position(1, 0, 0))) == "fresh"
    assert world.say(policy, StateLoaded(Position(1, 0, 0))) == "duplicate"


def test_votes() -> None:
    world = small_world()
    policy, rollout = world.models["policy-0"], world.models["rollout-0"]
    assert world.say(policy, GradientsReady(0, 1, 1, True, {})) == "attempt"
    policy.silent = {TrainStep, CommitStep}
    world.deliver()
    assert world.say(policy, GradientsReady(0, 99, 1, True, {})) == "attempt"
    assert world.say(rollout, GradientsReady(0, 1, 1, True, {})) == "attempt"
    assert world.say(policy, GradientsReady(0, 1, 1, True, {})) == "fresh"


def test_applied_steps() -> None:
    world = small_world()
    policy = world.models["policy-0"]
    world.run(lambda: world.core.state.version == 1)
    [applied] = world.under_way(policy, StepApplied)
    assert world.say(policy, StepApplied(0, Position(7, 1, 1), {})) == "lineage"
    assert world.say(policy, StepApplied(0, Position(1, 1, 2), {})) == "lineage"
    assert world.say(world.models["rollout-0"], applied) == "state"
    assert world.say(policy, applied) == "fresh"
    assert world.say(policy, applied) == "duplicate"


def test_checkpoints() -> None:
    world = small_world(train={"batches": 9}, checkpoint={"every": 2})
    policy, rollout = world.models["policy-0"], world.models["rollout-0"]
    policy.silent = {SaveCheckpoint}
    assert world.say(policy, CheckpointSaved(Position(1, 5, 5), "x", "d")) == "state"
    world.run(lambda: world.core.state.lineages.saving is not None)
    position = world.core.state.lineages.saving.position  # type: ignore[union-attr]
    assert world.say(rollout, CheckpointSaved(position, "x", "d")) == "state"
    assert world.say(policy, CheckpointSaved(Position(2, 2, 2), "x", "d")) == "state"
    assert world.say(policy, CheckpointSaved(position, "x", "d")) == "fresh"
    assert world.say(policy, CheckpointSaved(position, "x", "d")) == "duplicate"
    assert world.say(policy, CheckpointFailed(position, "late")) == "duplicate"
    assert world.core.state.lineages.path == "x"


def test_meshes() -> None:
    world = small_world()
    policy = world.models["policy-0"]
    policy.silent = {FormMesh}
    world.deliver()
    assert world.say(policy, MeshFormed(9)) == "epoch"
    assert world.say(policy, MeshFailed(9, "late")) == "duplicate"
    assert world.say(policy, MeshFormed(1)) == "fresh"
    assert world.say(policy, MeshFormed(1)) == "duplicate"
    stranger = world.join("rollout-1", "rollout")
    assert world.say(stranger, MeshFormed(1)) == "epoch"
    assert world.say(stranger, MeshFailed(1, "mischief")) == "duplicate"


def test_weights() -> None:
    world = small_world()
    policy, rollout = world.models["policy-0"], world.models["rollout-0"]
    policy.silent, rollout.silent = {SendWeights}, {ReceiveWeights}
    world.deliver()
    here = Position(1, 0, 0)
    assert world.say(rollout, WeightsSent(1, here, "d", 1, 0.1)) == "role"
    assert world.say(policy, WeightsLoaded(1, here, "d", 0.1)) in ("role", "duplicate")
    assert world.say(rollout, WeightsLoaded(2, here, "d", 0.1)) == "epoch"
    assert world.say(rollout, WeightsLoaded(1, Position(1, 1, 1), "d", 0.1)) == "epoch"
    assert world.say(rollout, WeightsFailed(2, here, "late")) == "duplicate"
    assert world.say(policy, WeightsSent(1, here, "d", 1, 0.1)) == "fresh"
    assert world.say(policy, WeightsSent(1, here, "d", 1, 0.1)) == "duplicate"
    assert world.say(rollout, WeightsLoaded(1, here, "d", 0.1)) == "fresh"
    assert world.say(rollout, WeightsLoaded(1, here, "d", 0.1)) == "duplicate"


def test_every_refusal_says_what_was_expected_what_came_and_what_to_do() -> None:
    world, slow = working()
    world.say(slow, changed(slow.report(next(iter(slow.working))), attempt=9))
    world.say(slow, GradientsReady(0, 1, 1, True, {}))
    world.say(slow, CheckpointSaved(Position(1, 1, 1), "x", "d"))
    world.say(slow, MeshFormed(77))
    assert len(world.refused) == 4
    for refusal in world.refused:
        assert refusal.expected and refusal.got and refusal.advice


def test_judging_never_sends_anything() -> None:
    world, slow = working()
    before = len([effect for effect in world.effects if isinstance(effect, Send)])
    world.core.judge("rollout-0", slow.incarnation, GradientsReady(0, 1, 1, True, {}))
    world.core.judge_registration(registering())
    assert len([effect for effect in world.effects if isinstance(effect, Send)]) == before
