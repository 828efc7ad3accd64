"""Stages, checkpoints, and the ways a run ends and goes on."""

from __future__ import annotations

import pytest

from services.controller.core.outcome import Discarded, EndRun, Finished, FreeSpool, Gone, Leased, Settled, StageBegan
from services.controller.core.stages import Stages
from shared.messages import (
    CheckpointFailed,
    CheckpointSaved,
    Lease,
    LoadState,
    Position,
    SaveCheckpoint,
    Shutdown,
    TrainStep,
)
from tests.unit.controller.world import World, small_world

SFT = {"dataset": "train", "batches": 2, "batch_size": 4, "lr": 1e-3}


def saves(world: World) -> list[tuple[int, bool]]:
    return [(order.position.version, order.export) for order in world.models["policy-0"].told(SaveCheckpoint)]


def finished(world: World, outcome: str) -> bool:
    return world.ended is not None and world.ended.outcome == outcome


def test_sft_then_train_then_closing_with_a_checkpoint_between_the_stages() -> None:
    world = small_world(sft=SFT)
    world.deliver()
    assert [(fact.stage, fact.version) for fact in world.of(StageBegan)] == [("sft", 0), ("train", 2), ("closing", 5)]
    assert saves(world) == [(2, False), (5, True)]
    steps = [order for order in world.models["policy-0"].told(TrainStep) if isinstance(order, TrainStep)]
    assert [step.stage for step in steps] == ["sft", "sft", "train", "train", "train"]
    settled = next(i for i, fact in enumerate(world.facts) if isinstance(fact, Settled))
    train = next(i for i, fact in enumerate(world.facts) if fact == StageBegan("train", 2))
    assert settled < train
    assert finished(world, "complete")


def test_worked_answers_are_leased_to_the_policy_and_taken_in_the_order_drawn() -> None:
    world = small_world(sft=SFT, train=None)
    world.deliver()
    assert {fact.replica for fact in world.of(Leased)} == {"policy-0"}
    steps = world.models["policy-0"].told(TrainStep)
    assert [[group.group for group in step.groups] for step in steps] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert all(group.advantages == [1.0] for step in steps for group in step.groups)
    assert finished(world, "complete")


def test_either_stage_may_be_left_out() -> None:
    assert [fact.stage for fact in _complete(small_world(sft=SFT, train=None)).of(StageBegan)] == ["sft", "closing"]
    assert [fact.stage for fact in _complete(small_world()).of(StageBegan)] == ["train", "closing"]


def _complete(world: World) -> World:
    world.deliver()
    assert finished(world, "complete")
    return world


def test_everyone_is_told_to_shut_down_at_the_end_and_nothing_is_left_open() -> None:
    world = _complete(small_world(rollouts=2))
    for model in world.models.values():
        assert model.told(Shutdown) == [Shutdown("the run is complete: all stages done")]
    book = world.core.state.ledger.books[1]
    assert book.issued == book.consumed + sum(book.discarded.values())
    assert book.settled == 12
    assert world.of(Finished) == [Finished("complete", "all stages done")]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpoints_come_regularly_however_fast_groups_come(every: int) -> None:
    """Even when the groups of the next batch are there already when a batch ends."""
    for tables in ({"train": {"batches": 7, "max_staleness": 4}}, {"sft": {**SFT, "batches": 7}, "train": None}):
        world = _complete(small_world(checkpoint={"every": every}, **tables))  # type: ignore[arg-type]
        regular = [version for version, export in saves(world) if not export]
        assert regular == [version for version in range(every, 7, every) if version < 7]


def test_a_checkpoint_settles_its_groups_and_frees_their_spool() -> None:
    world = small_world(train={"batches": 4}, checkpoint={"every": 1})
    world.deliver()
    settled = [fact for fact in world.of(Settled) if isinstance(fact, Settled)]
    assert [group for fact in settled for group in fact.groups] == list(range(1, 17))
    assert [fact.version for fact in settled] == [1, 2, 3, 4]
    freed = [effect.segment for effect in world.effects if isinstance(effect, FreeSpool)]
    assert freed == sorted(freed)
    assert freed[-1] == world.core.state.ledger.segment, "at the end nothing is needed any more"


def test_a_failed_checkpoint_is_tried_again_with_the_next_batch_and_training_goes_on() -> None:
    world = small_world(train={"batches": 4}, checkpoint={"every": 1})
    policy = world.models["policy-0"]
    policy.silent = {SaveCheckpoint}
    world.run(lambda: world.core.state.lineages.saving is not None)
    position = world.core.state.lineages.saving.position  # type: ignore[union-attr]
    assert world.say(policy, CheckpointFailed(position, "No space left on device")) == "fresh"
    assert world.core.state.lineages.saving is None
    policy.silent = set()
    world.deliver()
    assert finished(world, "complete")
    assert [version for version, _ in saves(world)] == [1, 2, 3, 4]


def test_a_failed_checkpoint_is_not_tried_again_before_there_is_more_to_save() -> None:
    world = small_world(train={"batches": 4}, checkpoint={"every": 1})
    policy, rollout = world.models["policy-0"], world.models["rollout-0"]
    rollout.slow, policy.silent = True, {SaveCheckpoint}
    world.deliver()
    for _ in range(4):
        world.finish(rollout)
    world.deliver()
    assert saves(world) == [(1, False)]
    world.say(policy, CheckpointFailed(Position(1, 1, 1), "No space left on device"))
    world.pass_time(5.0)
    assert saves(world) == [(1, False)]
    for _ in range(4):
        world.finish(rollout)
    world.deliver()
    assert saves(world) == [(1, False), (2, False)]


def test_the_last_checkpoint_is_tried_again_when_it_fails() -> None:
    world = small_world()
    policy = world.models["policy-0"]
    policy.silent = {SaveCheckpoint}
    world.deliver()
    world.say(policy, CheckpointFailed(Position(1, 3, 3), "No space left on device"))
    assert saves(world) == [(3, True), (3, True)], "ordered anew"
    world.say(policy, CheckpointSaved(Position(1, 3, 3), "checkpoints/3", "d"))
    assert finished(world, "complete")


def test_three_checkpoints_in_a_row_that_fail_end_the_run() -> None:
    world = small_world(train={"batches": 9}, checkpoint={"every": 1})
    world.models["policy-0"].disk_full = lambda: True
    world.deliver()
    assert finished(world, "failed")
    assert "3 checkpoints in a row could not be written" in world.ended.cause  # type: ignore[union-attr]
    assert "its disk is full" in world.ended.cause  # type: ignore[union-attr]


def test_a_policy_that_is_stuck_in_a_checkpoint_is_lost_at_its_deadline() -> None:
    world = small_world(train={"batches": 9}, checkpoint={"every": 1}, timeouts={"checkpoint_s": 10.0})
    world.models["policy-0"].silent = {SaveCheckpoint}
    world.deliver()
    world.pass_time(10.1)
    assert world.state_of("policy-0") == "lost"
    assert "timeouts.checkpoint_s" in world.of(Gone)[-1].cause
    world.join("policy-0", "policy")
    world.deliver()
    assert finished(world, "complete")


def test_stop_finishes_the_batch_in_hand_saves_it_and_keeps_the_rest() -> None:
    world = small_world(train={"batches": 9, "mu": 2})
    world.run(lambda: world.core.state.lineages.committed.step == 5)
    world.stop("enough")
    world.deliver()
    assert world.ended == EndRun("stopped", "enough")
    assert world.core.state.lineages.committed == Position(1, 3, 6)
    assert world.core.state.lineages.settled == Position(1, 3, 6)
    assert saves(world) == [(3, False)]
    assert world.models["policy-0"].told(Shutdown)
    assert not [fact for fact in world.of(Discarded) if fact.cause == "run_over"], "for the next term"


def test_stop_between_batches_of_a_saved_state_ends_at_once() -> None:
    world = small_world()
    world.models["rollout-0"].silent = {Lease}
    world.deliver()
    world.stop("enough")
    assert world.ended == EndRun("stopped", "enough")


def test_stop_without_a_policy_ends_at_once_and_says_what_is_missing() -> None:
    world = small_world()
    world.run(lambda: world.core.state.version == 1)
    world.lose("policy-0")
    world.stop("enough")
    assert world.ended is not None
    assert "no policy was there to save the last batches" in world.ended.cause


def test_stop_does_not_wait_for_a_batch_that_never_ends() -> None:
    world = small_world(timeouts={"step_s": 30.0})
    world.models["policy-0"].silent = {TrainStep}
    world.deliver()
    world.now += 10.0
    world.stop("enough")
    world.pass_time(31.0)
    assert finished(world, "stopped")


def test_a_stopped_run_goes_on_in_the_next_term_and_completes() -> None:
    world = small_world(train={"batches": 5})
    world.run(lambda: world.core.state.version == 2)
    world.stop("enough")
    world.deliver()
    assert finished(world, "stopped")
    world.crash(rejoin=False)
    assert world.ended is None
    saved = world.core.state.lineages.settled
    assert saved.version >= 2
    policy = world.join("policy-0", "policy")
    world.join("rollout-0", "rollout")
    world.deliver()
    assert finished(world, "complete")
    assert policy.told(LoadState) == [LoadState("checkpoint", saved, f"checkpoints/{saved.step}")]
    assert world.core.state.lineages.committed == Position(1, 5, 5)
    assert world.core.state.lineage == 1, "all was settled: nothing is rolled back"


def test_a_failed_run_may_be_resumed_and_what_it_gave_up_on_is_tried_as_often_again() -> None:
    world = small_world(train={"filter_limit": 1})
    world.models["rollout-0"].rewards = lambda group, samples: [1.0] * samples
    world.deliver()
    assert finished(world, "failed")
    world.models["rollout-0"].rewards = lambda group, samples: [0.0, 1.0]
    world.crash()
    assert world.ended is None
    world.deliver()
    assert finished(world, "complete")


def test_a_complete_run_stays_complete_in_any_later_term() -> None:
    world = _complete(small_world())
    facts = len(world.facts)
    world.crash()
    world.deliver()
    world.pass_time(10_000.0)
    assert world.core.state.stages.name == "over"
    assert world.core.state.stages.outcome == "complete"
    assert not [fact for fact in world.facts[facts:] if type(fact).__name__ != "Gone"]


def test_the_first_outcome_stands() -> None:
    stages = Stages(names=["train", "closing", "over"])
    stages.finish("failed", "first")
    stages.finish("complete", "second")
    assert (stages.outcome, stages.cause) == ("failed", "first")


def test_a_rollback_goes_back_to_the_stage_of_the_version() -> None:
    stages = Stages(names=["sft", "train", "closing", "over"])
    stages.advance(5)
    stages.advance(9)
    stages.go_back(7)
    assert (stages.name, stages.began) == ("train", 5)
    stages.go_back(5)
    assert (stages.name, stages.began) == ("train", 5), "a stage that began exactly there has begun"
    stages.go_back(3)
    assert (stages.name, stages.began) == ("sft", 0)
