"""Rollback: when nobody holds the committed state, the recorded batches are trained again as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.controller.core.outcome import (
    Committed,
    Consumed,
    Discarded,
    Evaluated,
    Issued,
    RolledBack,
    Settled,
    StageBegan,
)
from shared.messages import (
    CheckpointSaved,
    CommitStep,
    LoadState,
    Position,
    SaveCheckpoint,
    StepApplied,
    TrainStep,
)
from tests.unit.controller.world import Model, World, small_world

SFT = {"dataset": "train", "batches": 4, "batch_size": 4, "lr": 1e-3}


def trained(world: World, lineage: int) -> list[tuple[int, int, list[int]]]:
    """(version, step, groups) of every step that committed in a lineage, in order."""
    assigned = {}
    for fact in world.facts:
        if type(fact).__name__ == "Assigned":
            assigned[fact.lineage, fact.step, fact.attempt] = [group.group for group in fact.message.groups]  # type: ignore[attr-defined]
    return [
        (fact.version, fact.step, assigned[fact.lineage, fact.step, fact.attempt])
        for fact in world.of(Committed)
        if isinstance(fact, Committed) and fact.lineage == lineage
    ]


def complete_and_clean(world: World, folder: Path) -> None:
    assert world.ended is not None and world.ended.outcome == "complete"
    audit = world.audit(folder)
    assert audit.faults == []
    assert len(audit.books) == world.core.state.lineage


def policy_dies(world: World) -> Model:
    """The only policy is killed with its state, and a new process takes its place."""
    return world.replace("policy-0")


def test_unsettled_batches_are_trained_again_with_the_same_groups_in_the_same_order(tmp_path: Path) -> None:
    world = small_world(train={"batches": 6})
    world.run(lambda: world.core.state.version == 3)
    before = trained(world, 1)
    policy = policy_dies(world)
    assert world.of(RolledBack) == [RolledBack(1, 2, 0, 0, 3)]
    world.deliver()
    assert trained(world, 2)[: len(before)] == before
    assert policy.told(LoadState) == [LoadState("initial", Position(2, 0, 0), "")]
    assert world.core.state.lineages.committed == Position(2, 6, 6)
    complete_and_clean(world, tmp_path)


def test_only_what_no_checkpoint_holds_is_trained_again(tmp_path: Path) -> None:
    world = small_world(train={"batches": 6}, checkpoint={"every": 2})
    world.run(lambda: world.core.state.version == 3 and world.core.state.lineages.settled.version == 2)
    policy = policy_dies(world)
    world.deliver()
    [back] = world.of(RolledBack)
    assert isinstance(back, RolledBack)
    assert (back.before, back.lineage, back.version, back.step) == (1, 2, 2, 2)
    assert policy.told(LoadState) == [LoadState("checkpoint", Position(2, 2, 2), "checkpoints/2")]
    assert [step for _, step, _ in trained(world, 2)] == [2, 3, 4, 5]
    complete_and_clean(world, tmp_path)


def test_a_policy_lost_right_after_a_commit_that_it_never_applied_is_rolled_back(tmp_path: Path) -> None:
    world = small_world()
    policy = world.models["policy-0"]
    policy.silent = {CommitStep}
    world.deliver()
    assert world.core.state.lineages.committed == Position(1, 1, 1)
    world.lose("policy-0", dead=False)
    policy.in_hand = None
    world.register(policy)  # it still holds the state before the commit, and says so
    policy.silent = set()
    world.deliver()
    assert len(world.of(RolledBack)) == 1
    assert trained(world, 2)[:1] == trained(world, 1)
    complete_and_clean(world, tmp_path)


def test_nothing_is_rolled_back_while_the_only_holder_may_come_back() -> None:
    world = small_world()
    world.run(lambda: world.core.state.version == 2)
    world.lose("policy-0", dead=False)
    world.pass_time(100.0)
    assert not world.of(RolledBack)


def test_nothing_is_rolled_back_when_all_is_settled(tmp_path: Path) -> None:
    world = small_world(checkpoint={"every": 1})
    world.models["rollout-0"].slow = True
    world.deliver()
    for key in list(world.models["rollout-0"].working)[:4]:
        world.finish(world.models["rollout-0"], key)
    world.deliver()
    assert world.core.state.lineages.settled == world.core.state.lineages.committed == Position(1, 1, 1)
    policy_dies(world)
    world.models["rollout-0"].slow = False
    for key in list(world.models["rollout-0"].working):
        world.finish(world.models["rollout-0"], key)
    world.deliver()
    assert not world.of(RolledBack)
    complete_and_clean(world, tmp_path)


def test_leases_of_the_old_lineage_are_void_and_engines_are_synced_anew(tmp_path: Path) -> None:
    world = small_world(train={"batches": 6})
    rollout = world.models["rollout-0"]
    world.run(lambda: world.core.state.version == 2)
    rollout.slow = True
    world.deliver()
    assert rollout.working
    key = next(iter(rollout.working))
    late = rollout.working[key]
    policy_dies(world)
    assert world.state_of("rollout-0") == "stale"
    assert not world.core.state.ledger.having("leased")
    rollout.working[key] = late
    assert world.say(rollout, rollout.report(key)) == "lineage"
    rollout.slow = False
    world.deliver()
    for key in list(rollout.working):
        world.finish(rollout, key)
    world.deliver()
    assert rollout.holds is not None and rollout.holds.lineage == 2
    complete_and_clean(world, tmp_path)


def test_groups_carried_over_keep_their_ids_and_each_lineage_its_own_books(tmp_path: Path) -> None:
    world = small_world(train={"batches": 6})
    world.run(lambda: world.core.state.version == 2)
    policy_dies(world)
    carried = [fact.group for fact in world.of(Issued) if isinstance(fact, Issued) and fact.carried]
    assert carried == sorted(world.core.state.ledger.groups)
    old, new = world.core.state.ledger.books[1], world.core.state.ledger.books[2]
    assert old.issued == old.consumed + sum(old.discarded.values())
    assert old.discarded["rollback"] == len(carried) == new.issued
    world.deliver()
    complete_and_clean(world, tmp_path)


@pytest.mark.parametrize("steps", range(1, 12))
def test_a_rollback_in_the_middle_of_a_batch_begins_its_steps_anew(tmp_path: Path, steps: int) -> None:
    world = small_world(train={"mu": 2, "minibatches": 2, "batches": 4})
    world.run(lambda: (world.core.state.lineages.committed.step == steps and world.core.state.steps.step is None)
              or world.core.state.lineages.committed.step > steps)  # fmt: skip
    before = trained(world, 1)
    policy_dies(world)
    world.deliver()
    assert trained(world, 2)[: len(before)] == before
    assert [step for _, step, _ in trained(world, 2)] == list(range(16))
    assert [version for version, _, _ in trained(world, 2)] == [step // 4 for step in range(16)]
    complete_and_clean(world, tmp_path)


def test_a_rollback_while_closing_goes_back_to_training_and_judges_the_last_version_again(tmp_path: Path) -> None:
    evaluation = {"every": 100, "suites": {"heldout": {"problems": 3}}}
    world = small_world(evaluation=evaluation)
    world.models["policy-0"].silent = {SaveCheckpoint}
    world.deliver()
    assert world.core.state.stages.name == "closing"
    assert [fact.version for fact in world.of(Evaluated)] == [0, 3]
    before = trained(world, 1)
    policy_dies(world)
    assert world.core.state.stages.name == "train"
    world.deliver()
    assert trained(world, 2) == before, "nothing new is drawn: the recorded batches are all there is"
    assert [(fact.stage, fact.version) for fact in world.of(StageBegan)][-1] == ("closing", 3)
    last = world.of(Evaluated)[-1]
    assert isinstance(last, Evaluated)
    assert (last.lineage, last.version, last.why) == (2, 3, "last")
    complete_and_clean(world, tmp_path)


def test_a_rollback_never_crosses_the_checkpoint_between_stages(tmp_path: Path) -> None:
    world = small_world(sft=SFT, checkpoint={"every": 100})
    world.run(lambda: world.core.state.version == 5)
    policy_dies(world)
    [back] = world.of(RolledBack)
    assert isinstance(back, RolledBack)
    assert back.version == 4
    assert world.core.state.stages.name == "train"
    world.deliver()
    complete_and_clean(world, tmp_path)


def test_a_rollback_during_sft_trains_its_worked_answers_again(tmp_path: Path) -> None:
    world = small_world(sft=SFT)
    world.run(lambda: world.core.state.version == 3)
    before = trained(world, 1)
    policy_dies(world)
    world.deliver()
    assert trained(world, 2)[: len(before)] == before
    complete_and_clean(world, tmp_path)


def test_recorded_batches_are_trained_again_even_if_the_rule_holds_earlier_this_time(tmp_path: Path) -> None:
    evaluation = {"every": 100, "suites": {"heldout": {"problems": 2}}}
    world = small_world(sft={**SFT, "stop": {"accuracy": 0.5, "every": 1}}, evaluation=evaluation)
    rollout = world.models["rollout-0"]
    world.run(lambda: world.core.state.version == 3 and world.core.state.evaluation.round is None)
    before = trained(world, 1)
    rollout.rewards = lambda group, samples: [1.0] if samples == 1 else [0.0, 1.0]
    policy_dies(world)
    world.run(lambda: any(isinstance(f, Evaluated) and f.lineage == 2 for f in world.facts))
    world.stop("a look")
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "stopped"
    world.crash()
    world.deliver()
    assert trained(world, 2)[: len(before)] == before
    complete_and_clean(world, tmp_path)


def test_a_recorded_batch_that_is_struck_off_whole_leaves_the_later_ones_their_turn(tmp_path: Path) -> None:
    world = small_world(train={"batches": 5})
    world.run(lambda: world.core.state.version == 3)
    policy = policy_dies(world)
    policy.finite = lambda step: step.step != 0 or step.attempt != policy.told(TrainStep)[0].attempt  # type: ignore[attr-defined]
    world.deliver()
    assert {fact.cause for fact in world.of(Discarded)} == {"nonfinite"}
    assert [version for version, _, _ in trained(world, 2)] == [0, 1, 2, 3, 4]
    complete_and_clean(world, tmp_path)


def test_rollback_after_rollback_comes_out_even(tmp_path: Path) -> None:
    world = small_world(train={"batches": 6}, checkpoint={"every": 3})
    for lineage in range(1, 5):
        world.run(lambda lineage=lineage: world.core.state.version >= lineage + 1)  # type: ignore[misc]
        policy_dies(world)
    world.deliver()
    complete_and_clean(world, tmp_path)


def test_answers_of_the_old_lineage_are_refused() -> None:
    world = small_world(train={"batches": 6})
    world.run(lambda: world.core.state.version == 2)
    policy = policy_dies(world)
    assert world.say(policy, StepApplied(1, Position(1, 2, 2), {})) == "state"
    assert world.say(policy, CheckpointSaved(Position(1, 2, 2), "checkpoints/2", "d")) == "state"


def test_a_new_term_in_the_middle_of_the_redo_goes_on_with_it(tmp_path: Path) -> None:
    world = small_world(train={"batches": 6})
    world.run(lambda: world.core.state.version == 3)
    before = trained(world, 1)
    policy_dies(world)
    world.run(lambda: world.core.state.version == 1)
    world.crash()
    world.deliver()
    assert trained(world, 2)[: len(before)] == before
    complete_and_clean(world, tmp_path)


def test_what_is_settled_is_never_rolled_back(tmp_path: Path) -> None:
    world = small_world(train={"batches": 6}, checkpoint={"every": 1})
    world.run(lambda: world.core.state.lineages.settled.version == 2)
    policy_dies(world)
    world.deliver()
    settled = [group for fact in world.of(Settled) if isinstance(fact, Settled) for group in fact.groups]
    assert len(settled) == len(set(settled)) == 24
    consumed = {}
    for fact in world.of(Consumed):
        assert isinstance(fact, Consumed)
        for group in fact.groups:
            consumed.setdefault(group, set()).add(fact.version)
    assert all(len(versions) == 1 for versions in consumed.values()), "a group is trained at one version, ever"
    complete_and_clean(world, tmp_path)
