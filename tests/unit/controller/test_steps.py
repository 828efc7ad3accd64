"""Batches and steps: all or nothing, whoever is lost and whatever is not finite."""

from __future__ import annotations

from itertools import chain

import pytest

from services.controller.core.outcome import Aborted, Assigned, Committed, Consumed, Discarded, Gone, RecordMetrics
from services.controller.core.steps import Batch, Step, Steps
from shared.messages import AbortStep, CommitStep, GradientsReady, MeshMember, Position, StepApplied, TrainStep
from tests.unit.controller.world import Model, World, small_world


def two_members() -> Steps:
    """A step that two policies compute."""
    steps = Steps(batch=Batch(0, "train", [[1, 2, 3]], 1))
    members = [MeshMember(name, 1, 0) for name in ("policy-0", "policy-1")]
    shares = {"policy-0": [1, 3], "policy-1": [2]}
    steps.begin(Step(0, steps.next_attempt(), "computing", members, shares, 6, 3, 0, 10.0, 0.0))
    return steps


# --- the machine by itself -------------------------------------------------------------------------------------------


def test_a_step_waits_for_the_votes_of_all_its_members() -> None:
    steps = two_members()
    assert steps.vote("policy-0", True, {}) == "waiting"
    assert steps.vote("policy-1", True, {}) == "all_yes"


def test_one_vote_against_decides() -> None:
    steps = two_members()
    assert steps.vote("policy-1", False, {}) == "no"


def test_nothing_is_voted_on_or_committed_without_a_step_being_computed() -> None:
    steps = two_members()
    steps.commit()
    with pytest.raises(ValueError, match="no step is being computed"):
        steps.commit()
    with pytest.raises(ValueError, match="no step is being computed"):
        steps.vote("policy-0", True, {})


def test_a_committed_step_cannot_be_aborted_and_an_aborted_one_is_gone() -> None:
    steps = two_members()
    steps.commit()
    assert steps.abort() is None
    assert steps.step is not None

    steps = two_members()
    aborted = steps.abort()
    assert aborted is not None
    assert (aborted.attempt, steps.step) == (1, None)
    assert steps.next_attempt() == 2


def test_nobody_waits_for_a_member_that_was_lost_after_the_commit() -> None:
    steps = two_members()
    steps.drop_member("policy-1")
    assert steps.step is not None
    assert set(steps.step.shares) == {"policy-0", "policy-1"}, "before the commit its share must be computed anew"
    steps.commit()
    steps.drop_member("policy-1")
    assert set(steps.step.shares) == {"policy-0"}


def test_one_step_at_a_time() -> None:
    steps = two_members()
    assert steps.step is not None
    with pytest.raises(ValueError, match="one at a time"):
        steps.begin(steps.step)


def test_groups_struck_off_leave_the_steps_to_come_but_not_those_committed() -> None:
    batch = Batch(0, "train", [[1, 2], [3, 4], [1, 2], [3, 4]], 1, index=2)
    assert batch.strike([1, 2]) == [], "both were trained in the first pass"
    assert batch.plan == [[1, 2], [3, 4], [3, 4]]
    assert batch.strike([3, 4]) == []
    assert batch.over

    batch = Batch(0, "train", [[1, 2], [3, 4], [1, 2], [3, 4]], 1, index=1)
    assert batch.strike([3, 4]) == [3, 4]
    assert (batch.plan, batch.groups) == ([[1, 2], [1, 2]], [1, 2])


# --- the whole core --------------------------------------------------------------------------------------------------


def at_step(**tables: dict[str, object] | None) -> tuple[World, Model]:
    """A world whose policy was given a step and does not answer."""
    world = small_world(**tables)
    policy = world.models["policy-0"]
    policy.silent = {TrainStep, CommitStep}
    world.deliver()
    assert world.core.state.steps.step is not None
    return world, policy


def vote(world: World, policy: Model, *, finite: bool = True) -> str:
    step = policy.told(TrainStep)[-1]
    assert isinstance(step, TrainStep)
    return world.say(policy, GradientsReady(step.step, step.attempt, step.position.lineage, finite, {"loss": 0.5}))


def test_no_commit_is_sent_before_the_vote_and_no_apply_is_taken_before_the_commit() -> None:
    world, policy = at_step()
    assert not policy.told(CommitStep)
    assert world.say(policy, StepApplied(0, Position(1, 1, 1), {})) == "state"
    assert world.core.state.lineages.committed == Position(1, 0, 0)
    assert vote(world, policy) == "fresh"
    assert policy.told(CommitStep) == [CommitStep(0, 1, 1)]
    assert world.core.state.lineages.committed == Position(1, 1, 1)
    assert world.core.state.fleet.replicas["policy-0"].position == Position(1, 0, 0), "not before it says so"
    assert world.say(policy, StepApplied(0, Position(1, 1, 1), {})) == "fresh"
    assert world.core.state.fleet.replicas["policy-0"].position == Position(1, 1, 1)


def test_the_next_step_waits_until_the_last_one_is_applied() -> None:
    world, policy = at_step(train={"batches": 3})
    vote(world, policy)
    assert len(policy.told(TrainStep)) == 1
    world.say(policy, StepApplied(0, Position(1, 1, 1), {}))
    assert len(policy.told(TrainStep)) == 2


def test_a_step_carries_global_denominators_and_every_group_with_its_payload() -> None:
    world, policy = at_step()
    step = policy.told(TrainStep)[0]
    assert isinstance(step, TrainStep)
    assert [group.group for group in step.groups] == [1, 2, 3, 4]
    assert (step.tokens, step.sequences) == (4 * 2 * 2, 4 * 2)
    fact = world.of(Assigned)[0]
    assert isinstance(fact, Assigned)
    assert fact.message == step
    assert [place.segment for place in fact.payload] == [1, 2, 3, 4]


def test_a_policy_lost_before_the_commit_costs_a_new_attempt_with_the_same_groups() -> None:
    world, policy = at_step()
    first = policy.told(TrainStep)[0]
    new = world.replace("policy-0")
    world.deliver()
    again = new.told(TrainStep)[0]
    assert isinstance(first, TrainStep) and isinstance(again, TrainStep)
    assert (again.step, again.attempt, again.groups) == (first.step, first.attempt + 1, first.groups)
    assert [(fact.attempt, fact.cause) for fact in world.of(Aborted)] == [(1, "policy-0 is gone")]
    assert next(fact.attempt for fact in world.of(Committed)) == 2
    consumed = [group for fact in world.of(Consumed) for group in fact.groups]
    assert len(consumed) == len(set(consumed)) == 12
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_vote_on_an_aborted_attempt_is_refused() -> None:
    world, policy = at_step()
    first = policy.told(TrainStep)[0]
    assert isinstance(first, TrainStep)
    world.lose("policy-0", dead=False)
    world.register(policy)
    world.deliver()
    assert world.say(policy, GradientsReady(0, first.attempt, 1, True, {})) == "attempt"


def test_a_policy_lost_after_the_commit_is_dropped_from_the_step() -> None:
    world, policy = at_step()
    vote(world, policy)
    world.lose("policy-0")
    assert world.core.state.steps.step is None
    assert len(world.of(Committed)) == 1
    assert not world.of(Aborted)


def test_a_policy_that_answers_neither_is_lost_at_a_named_deadline() -> None:
    world, _ = at_step(timeouts={"step_s": 40.0})
    world.pass_time(41.0)
    assert "step 0 was computing and waited past timeouts.step_s" in world.of(Gone)[0].cause

    world, policy = at_step(timeouts={"step_s": 40.0})
    vote(world, policy)
    world.pass_time(41.0)
    assert "step 0 was committed and waited past timeouts.step_s" in world.of(Gone)[0].cause


def test_groups_of_gradients_that_are_not_finite_are_discarded_and_their_slots_go_to_others() -> None:
    world = small_world()
    policy = world.models["policy-0"]
    policy.finite = lambda step: step.attempt != 1
    world.deliver()
    assert {(fact.group, fact.cause) for fact in world.of(Discarded)} == {(n, "nonfinite") for n in (1, 2, 3, 4)}
    assert policy.told(AbortStep) == [AbortStep(0, 1, 1, "gradients not finite")]
    assert world.core.state.lineages.committed == Position(1, 3, 3)
    consumed = [group for fact in world.of(Consumed) for group in fact.groups]
    assert consumed == list(range(5, 17))
    assert world.ended is not None and world.ended.outcome == "complete"


def test_three_steps_in_a_row_that_are_not_finite_fail_the_run() -> None:
    world = small_world(train={"batches": 10})
    world.models["policy-0"].finite = lambda step: step.attempt not in (1, 2, 4, 5, 6)
    world.deliver()
    assert world.ended is not None
    assert world.ended.outcome == "failed"
    assert "3 steps in a row had gradients not finite" in world.ended.cause
    assert len(world.of(Committed)) == 1, "the finite step between began the count anew"


@pytest.mark.parametrize(("mu", "minibatches"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 4)])
def test_a_batch_is_mu_times_minibatches_steps_and_its_version_rises_at_the_last(mu: int, minibatches: int) -> None:
    world = small_world(train={"mu": mu, "minibatches": minibatches})
    world.deliver()
    steps = mu * minibatches
    committed = [fact for fact in world.of(Committed) if isinstance(fact, Committed)]
    assert [fact.step for fact in committed] == list(range(3 * steps))
    assert [fact.version for fact in committed] == [version for version in range(3) for _ in range(steps)]
    told = [order for order in world.models["policy-0"].told(TrainStep) if isinstance(order, TrainStep)]
    assert [(order.index, order.steps_in_batch) for order in told] == [(n, steps) for n in range(steps)] * 3
    for batch in range(3):
        parts = [[group.group for group in order.groups] for order in told[batch * steps : (batch + 1) * steps]]
        passes = [list(chain(*parts[n * minibatches : (n + 1) * minibatches])) for n in range(mu)]
        consumed = world.of(Consumed)[batch].groups
        assert all(sorted(each) == sorted(consumed) for each in passes), "each pass trains every group once"
        assert len(parts[0]) == 4 // minibatches
    assert len(world.of(Consumed)) == 3
    assert world.core.state.lineages.committed == Position(1, 3, 3 * steps)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_minibatch_that_is_not_finite_leaves_the_rest_of_its_batch_to_train(index: int) -> None:
    world = small_world(train={"mu": 2, "minibatches": 2})
    bad = {"left": 1}

    def finite(step: TrainStep) -> bool:
        if step.position.version == 1 and step.index == index and bad["left"]:
            bad["left"] = 0
            return False
        return True

    world.models["policy-0"].finite = finite
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert world.core.state.version == 3
    discarded = [fact for fact in world.of(Discarded) if isinstance(fact, Discarded) and fact.cause == "nonfinite"]
    assert len(discarded) == (2 if index < 2 else 0), "what an earlier pass has trained is consumed all the same"
    consumed = [group for fact in world.of(Consumed) for group in fact.groups]
    assert len(consumed) == len(set(consumed)) == 12 - len(discarded)


def test_a_batch_whose_last_steps_are_struck_off_ends_with_its_version_and_the_run_goes_on() -> None:
    world = small_world(train={"minibatches": 2})
    world.models["policy-0"].finite = lambda step: (step.position.version, step.index) != (1, 1)
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert world.core.state.lineages.committed == Position(1, 3, 5)
    assert world.core.state.fleet.replicas["policy-0"].position == Position(1, 3, 5)


def test_every_committed_step_leaves_one_line_of_metrics() -> None:
    world = small_world(train={"mu": 2})
    world.deliver()
    assert [(line["lineage"], line["step"], line["version"]) for line in world.metrics] == [
        (1, step, step // 2) for step in range(6)
    ]
    assert all(line["loss"] == 1.0 and line["reward_trained"] == 0.5 for line in world.metrics)
    assert len([effect for effect in world.effects if isinstance(effect, RecordMetrics)]) == 6


def test_a_line_of_metrics_has_lengths_advantages_queues_and_the_last_sync() -> None:
    world = small_world()
    world.deliver()
    line = world.metrics[-1]
    assert line["response_length_max"] >= line["response_length"] > 0  # type: ignore[operator]
    assert abs(line["advantage_mean"]) < 1e-9  # type: ignore[arg-type]
    assert line["advantage_std"] > 0 and line["reward_std"] > 0  # type: ignore[operator]
    assert {"groups/queued", "groups/leased", "groups/reported", "tokens_per_s", "sync_bytes"} <= line.keys()
    assert {"generate_seconds", "judge_seconds"} <= line.keys()
