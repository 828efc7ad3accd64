"""Several policies: members of the same steps, joining while they go on, lost in them, and known to be equal."""

from __future__ import annotations

import pytest

from services.controller.core.outcome import (
    Aborted,
    Assigned,
    CaughtUp,
    Committed,
    Compared,
    Gone,
    RolledBack,
)
from shared.messages import (
    AbortStep,
    CheckState,
    CommitStep,
    FormMesh,
    GradientsReady,
    LoadState,
    MeshFailed,
    Position,
    ReceiveState,
    RevokeMesh,
    SaveCheckpoint,
    SendState,
    StateDigest,
    StateReceived,
    StateSent,
    StepApplied,
    TrainStep,
)
from tests.unit.controller.world import Model, World, small_world

QUICK = {"mesh_s": 5.0, "transfer_s": 7.0, "step_s": 20.0, "rejoin_s": 6.0}


def pair(**tables: dict[str, object] | None) -> World:
    """Two policies and a rollout that have registered; nothing is delivered yet."""
    world = small_world(**{"timeouts": dict(QUICK), "train": {"batches": 6}, **tables})
    world.join("policy-1", "policy")
    return world


def in_step(world: World, step: int = 1) -> tuple[Model, Model]:
    """Let the run come to where both policies compute this step, and neither answers."""
    first, second = world.models["policy-0"], world.models["policy-1"]
    world.run(lambda: world.core.state.lineages.committed.step == step)
    first.silent = second.silent = {TrainStep, CommitStep}
    world.deliver()
    assert world.core.state.steps.step is not None
    assert set(world.core.state.steps.step.shares) == {"policy-0", "policy-1"}
    return first, second


def vote(world: World, model: Model) -> str:
    step = model.told(TrainStep)[-1]
    assert isinstance(step, TrainStep)
    model.in_hand, model.holds = step, step.position
    return world.say(model, GradientsReady(step.step, step.attempt, step.position.lineage, True, {"loss": 1.0}))


def wake(world: World, *models: Model) -> None:
    """Answer again; what was not answered is gone, as with a process that was aborted in the middle."""
    for model in models:
        model.silent = set()
    world.deliver()


def joined(world: World) -> list[str]:
    return [fact.replica for fact in world.of(CaughtUp)]  # type: ignore[attr-defined]


# --- members ---------------------------------------------------------------------------------------------------------


def test_two_policies_share_every_step_over_a_mesh_of_exactly_them() -> None:
    world = pair()
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    steps = {name: world.models[name].told(TrainStep) for name in ("policy-0", "policy-1")}
    assert [len(told) for told in steps.values()] == [6, 6]
    for mine, other in zip(*steps.values(), strict=True):
        assert isinstance(mine, TrainStep) and isinstance(other, TrainStep)
        assert mine.mesh == other.mesh and mine.mesh is not None
        assert [member.replica for member in mine.members] == ["policy-0", "policy-1"]
        assert (mine.tokens, mine.sequences) == (other.tokens, other.sequences), "the denominators are everybody's"
        groups = {group.group for group in (*mine.groups, *other.groups)}
        assert len(groups) == len(mine.groups) + len(other.groups) == 4
    assert world.models["policy-0"].holds == world.models["policy-1"].holds == Position(1, 6, 6)


def test_no_step_begins_before_the_mesh_has_formed() -> None:
    world = small_world(timeouts=dict(QUICK))
    second = world.join("policy-1", "policy", silent={FormMesh})
    world.deliver()
    assert second.told(FormMesh) and not second.told(TrainStep) and not world.models["policy-0"].told(TrainStep)
    for answer in Model.take(_awake(second), second.told(FormMesh)[-1]):
        world.send(second, answer)
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"


def _awake(model: Model) -> Model:
    model.silent = set()
    return model


def test_when_the_mesh_does_not_form_one_goes_on_alone_and_the_others_join_again() -> None:
    world = small_world(timeouts=dict(QUICK), train={"batches": 8})
    second = world.join("policy-1", "policy", silent={FormMesh})
    world.deliver()
    world.pass_time(QUICK["mesh_s"] + 0.1)
    assert world.of(Committed), "policy-0 goes on"
    second.silent = set()
    world.pass_time(30.0)
    assert world.ended is not None and world.ended.outcome == "complete"
    alone = [fact.step for fact in world.of(Committed)]  # type: ignore[attr-defined]
    assert alone == list(range(8))


def test_a_policy_that_says_its_mesh_failed_is_the_one_that_goes_on() -> None:
    world = small_world(timeouts=dict(QUICK), train={"batches": 8})
    second = world.join("policy-1", "policy")
    world.models["policy-0"].silent = {FormMesh}
    second.silent = {FormMesh}
    world.deliver()
    told = second.told(FormMesh)[-1]
    assert isinstance(told, FormMesh)
    world.say(second, MeshFailed(told.identity.epoch, "policy-0 did not come"))
    assert world.state_of("policy-0") == "stale" and world.state_of("policy-1") == "ready"


def test_whoever_computes_a_step_goes_on_when_a_mesh_with_one_that_is_back_does_not_form() -> None:
    world = pair()
    first, second = in_step(world)
    world.lose("policy-1", dead=False)
    second.silent = first.silent = {TrainStep, CommitStep, FormMesh}
    second.holds = world.core.state.lineages.committed
    world.register(second)
    world.deliver()
    told = second.told(FormMesh)[-1]
    assert isinstance(told, FormMesh) and world.state_of("policy-1") == "ready"
    world.say(second, MeshFailed(told.identity.epoch, "policy-0 did not come"))
    assert world.state_of("policy-0") == "ready" and world.state_of("policy-1") == "stale"
    step = world.core.state.steps.step
    assert step is not None and list(step.shares) == ["policy-0"] and step.state == "computing"


# --- lost ------------------------------------------------------------------------------------------------------------


def test_a_member_lost_before_the_commit_costs_a_redo_by_the_others_at_once() -> None:
    world = pair()
    first, second = in_step(world)
    vote(world, second)
    world.lose("policy-1")
    step = world.core.state.steps.step
    assert step is not None and list(step.shares) == ["policy-0"] and step.mesh is None
    assert len(step.shares["policy-0"]) == 4
    assert [type(message) for message in first.seen[-3:]] == [RevokeMesh, AbortStep, TrainStep]
    first.silent = set()
    vote(world, first)
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete" and not world.of(RolledBack)


def test_a_member_lost_after_the_commit_costs_nothing() -> None:
    world = pair()
    first, second = in_step(world)
    vote(world, first)
    vote(world, second)
    assert second.told(CommitStep)
    aborted = len(world.of(Aborted))
    world.lose("policy-1")
    assert len(world.of(Aborted)) == aborted
    assert world.say(first, StepApplied(1, Position(1, 2, 2), {})) == "fresh"
    assert world.core.state.lineages.committed == Position(1, 2, 2)


def test_a_mesh_that_breaks_in_a_step_aborts_it_for_all_and_a_new_one_is_formed() -> None:
    world = pair()
    first, second = in_step(world)
    order = first.told(TrainStep)[-1]
    assert isinstance(order, TrainStep) and order.mesh is not None
    world.say(first, MeshFailed(order.mesh, "connection reset"))
    assert second.told(AbortStep) and RevokeMesh in [type(m) for m in second.seen]
    wake(world, first, second)
    assert world.core.state.lineages.committed.step > 1
    assert first.told(TrainStep)[-1].mesh > order.mesh  # type: ignore[attr-defined]
    assert not world.of(Gone)


def test_a_mesh_that_breaks_again_and_again_leaves_the_one_that_said_so_alone() -> None:
    world = pair()
    _first, second = in_step(world)
    for _ in range(2):
        order = second.told(TrainStep)[-1]
        assert isinstance(order, TrainStep) and order.mesh is not None
        world.say(second, MeshFailed(order.mesh, "timed out"))
        world.deliver()
    assert world.state_of("policy-0") == "stale"
    step = world.core.state.steps.step
    assert step is not None and list(step.shares) == ["policy-1"] and step.mesh is None


def test_a_step_that_nobody_answers_is_assigned_anew_before_anybody_is_given_up() -> None:
    world = pair()
    in_step(world)
    attempt = world.core.state.steps.attempt
    world.pass_time(QUICK["step_s"] + 0.1)
    assert not world.of(Gone) and world.core.state.steps.attempt > attempt


def test_members_of_the_former_term_are_waited_for_and_not_left_behind() -> None:
    world = pair()
    in_step(world)
    first, second = world.models["policy-0"], world.models["policy-1"]
    world.crash(rejoin=False)
    first.silent, second.silent = set(), set()
    world.register(first)
    world.register(world.models["rollout-0"])
    world.deliver()
    assert world.state_of("policy-1") == "ready" and not world.ended
    world.register(second)
    world.deliver()
    assert world.ended is not None and not world.of(CaughtUp), "nobody had to join again"


def test_when_all_members_die_after_a_commit_the_run_rolls_back() -> None:
    world = pair()
    in_step(world)
    world.lose("policy-0")
    world.lose("policy-1")
    world.join("policy-1", "policy")
    world.deliver()
    assert world.of(RolledBack)
    world.join("policy-0", "policy")
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"


# --- joining ---------------------------------------------------------------------------------------------------------


def test_a_policy_that_comes_later_receives_the_state_in_the_first_step_of_a_batch_and_is_a_member() -> None:
    world = small_world(timeouts=dict(QUICK), train={"batches": 6, "mu": 2})
    world.run(lambda: world.core.state.lineages.committed.step >= 3)
    second = world.join("policy-1", "policy")
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert [m.source for m in second.told(LoadState)] == ["peer"]  # type: ignore[attr-defined]
    kinds = [type(m) for m in second.seen]
    received, first_step = kinds.index(ReceiveState), kinds.index(TrainStep)
    assert received < first_step
    step = second.told(TrainStep)[0]
    assert isinstance(step, TrainStep)
    assert (step.index, step.groups) == (0, []), "its share is empty, and it misses no snapshot"
    assert second.told(TrainStep)[1].groups  # type: ignore[attr-defined]
    (sent,) = world.models["policy-0"].told(SendState)
    assert sent.position == step.position  # type: ignore[attr-defined]
    assert joined(world) == ["policy-1"]
    assert second.holds == world.models["policy-0"].holds


def test_steps_go_on_while_the_meshes_of_a_joiner_form() -> None:
    world = small_world(timeouts=dict(QUICK), train={"batches": 6})
    world.run(lambda: world.core.state.lineages.committed.step >= 1)
    world.join("policy-1", "policy", silent={FormMesh})
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert len(world.of(Committed)) == 6 and not world.of(Aborted)


def with_joiner(silent: set[type]) -> tuple[World, Model, Model]:
    """A joiner that was given its first step, and does not answer these."""
    world = small_world(timeouts=dict(QUICK), train={"batches": 8})
    world.run(lambda: world.core.state.lineages.committed.step >= 1)
    second = world.join("policy-1", "policy", silent=silent)
    world.run(lambda: bool(second.told(ReceiveState)))
    world.deliver()
    return world, world.models["policy-0"], second


def test_no_commit_before_the_joiners_digest_was_compared() -> None:
    world, _first, second = with_joiner({ReceiveState, TrainStep})
    committed = world.core.state.lineages.committed
    order, step = second.told(ReceiveState)[-1], second.told(TrainStep)[-1]
    assert isinstance(order, ReceiveState) and isinstance(step, TrainStep)
    vote(world, second)
    assert world.core.state.lineages.committed == committed
    assert world.say(second, StateReceived(order.epoch, order.position, f"state {committed.step}", 0.1)) == "fresh"
    assert world.core.state.lineages.committed.step == committed.step + 1


def test_a_joiner_with_another_digest_is_no_member_and_the_step_is_assigned_anew() -> None:
    world, _first, second = with_joiner({ReceiveState, TrainStep})
    order = second.told(ReceiveState)[-1]
    assert isinstance(order, ReceiveState)
    second.silent = {ReceiveState, TrainStep}
    assert world.say(second, StateReceived(order.epoch, order.position, "another", 0.1)) == "fresh"
    assert world.core.state.joining.mismatches == 1
    assert world.state_of("policy-1") == "loading"
    assert second.told(LoadState)[-1].source == "peer"  # type: ignore[attr-defined]
    step = world.core.state.steps.step
    assert step is not None and list(step.shares) == ["policy-0"]


def test_a_joiner_that_dies_costs_a_redo_without_it() -> None:
    world, _first, _second = with_joiner({ReceiveState, TrainStep})
    attempt = world.core.state.steps.attempt
    world.lose("policy-1")
    assert world.core.state.steps.attempt == attempt + 1
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_joiner_that_hangs_is_lost_when_the_transfer_runs_out() -> None:
    world, _first, _second = with_joiner({ReceiveState, TrainStep})
    world.pass_time(QUICK["transfer_s"] + 0.1)
    assert world.state_of("policy-1") == "lost"
    assert world.of(Gone)[-1].cause == "it did not take the others' state within timeouts.transfer_s"  # type: ignore[attr-defined]
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_source_that_dies_while_it_sends_leaves_a_rollback_or_another_source() -> None:
    world, _first, second = with_joiner({ReceiveState, TrainStep})
    world.lose("policy-0")
    assert world.of(RolledBack), "nobody else held the committed state"
    second.silent = set()
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"


def test_words_about_a_state_that_nobody_waits_for_are_refused() -> None:
    world, first, second = with_joiner({ReceiveState, TrainStep})
    order = second.told(ReceiveState)[-1]
    assert isinstance(order, ReceiveState)
    assert world.say(first, StateReceived(order.epoch, order.position, "x", 0.1)) == "role"
    assert world.say(second, StateReceived(order.epoch + 7, order.position, "x", 0.1)) == "epoch"
    assert world.say(first, StateSent(order.epoch, order.position, "state 1", 10, 0.1)) == "duplicate"


def test_a_deterministic_run_has_one_policy() -> None:
    world = small_world(run={"seed": 7, "deterministic": True}, train={"max_staleness": 0})
    world.join("policy-1", "policy")
    assert world.refused[-1].fault == "role"


# --- equal -----------------------------------------------------------------------------------------------------------


def test_with_each_checkpoint_the_members_are_compared() -> None:
    world = pair(checkpoint={"every": 2})
    world.deliver()
    compared = world.of(Compared)
    assert [fact.step for fact in compared] == [2, 4, 6]  # type: ignore[attr-defined]
    assert all(len(fact.digests) == 2 and not fact.different for fact in compared)  # type: ignore[attr-defined]


def test_whoever_differs_from_the_writer_forgets_its_state_and_joins_again() -> None:
    world = pair(checkpoint={"every": 2})
    second = world.models["policy-1"]
    second.wrong = "not the "
    world.run(lambda: bool(world.of(Compared)))
    second.wrong = ""
    assert world.of(Compared)[0].different == ["policy-1"]  # type: ignore[attr-defined]
    world.deliver()
    assert world.core.state.joining.mismatches == 1
    assert joined(world) == ["policy-1"]
    assert all(not fact.different for fact in world.of(Compared)[1:])  # type: ignore[attr-defined]
    assert world.ended is not None and world.ended.outcome == "complete"


@pytest.mark.parametrize("committed", [False, True])
def test_whoever_turns_out_to_differ_in_a_later_step_leaves_it(committed: bool) -> None:
    world = pair(checkpoint={"every": 2})
    second = world.models["policy-1"]
    second.silent = {CheckState}
    world.run(lambda: world.core.state.lineages.committed.step == 2 + committed)
    step = world.core.state.steps.step
    if not committed:
        world.run(lambda: world.core.state.steps.step is not None and world.core.state.steps.step.step == 2)
        step = world.core.state.steps.step
    assert step is not None and (step.state == "committed") == committed
    aborted = len(world.of(Aborted))
    asked = second.told(CheckState)[0]
    assert isinstance(asked, CheckState)
    world.run(lambda: "policy-0" in world.core.state.joining.comparison.digests)  # type: ignore[union-attr]
    assert world.say(second, StateDigest(asked.position, "another")) == "fresh"
    now = world.core.state.steps.step
    assert now is None or "policy-1" not in now.shares
    assert len(world.of(Aborted)) == aborted + (not committed)
    second.silent = set()
    world.deliver()
    assert joined(world) == ["policy-1"]
    assert world.ended is not None and world.ended.outcome == "complete"


def test_the_run_ends_after_the_last_comparison() -> None:
    world = pair()
    second = world.models["policy-1"]
    second.silent = {CheckState}
    world.deliver()
    assert world.models["policy-0"].told(SaveCheckpoint) and world.ended is None
    world.pass_time(world.recipe.timeouts.checkpoint_s + 1.0)
    assert world.ended is not None and world.ended.outcome == "complete"


@pytest.mark.parametrize("role", ["policy", "rollout"])
def test_shares_are_put_on_record_once_for_each_member(role: str) -> None:
    world = pair()
    world.deliver()
    attempts = [(fact.attempt, fact.replica) for fact in world.of(Assigned)]  # type: ignore[attr-defined]
    assert len(attempts) == len(set(attempts))
    assert all(name.startswith("policy") for _, name in attempts)
