"""Pause and resume, a checkpoint or an evaluation on demand, and the numbers of replicas that are wanted."""

from __future__ import annotations

import pytest

from services.controller.core.events import Steered, SteeringOrder
from services.controller.core.outcome import Evaluated, Revised
from services.controller.core.rules.steering import became
from services.controller.core.scaling import Scaling
from shared.messages import (
    CheckpointRun,
    DrainReplica,
    EvaluateRun,
    Lease,
    PauseRun,
    Refused,
    ResumeRun,
    SaveCheckpoint,
    ScaleFleet,
    TrainStep,
)
from tests.unit.controller.world import World, recipe, small_world

SUITES = {"every": 100, "suites": {"heldout": {"problems": 4}}}


def ask(world: World, order: SteeringOrder) -> str:
    """As the shell: "fresh", "duplicate", or the fault that it is refused with."""
    verdict = world.core.judge_order(order)
    if verdict == "fresh":
        world.step(Steered(at=world.now, order=order))
        assert became(world.core.state, order)
    return verdict.fault if isinstance(verdict, Refused) else verdict


def steps(world: World) -> int:
    return len(world.models["policy-0"].told(TrainStep))


def test_a_pause_finishes_the_batch_in_hand_and_begins_no_other() -> None:
    world = small_world(train={"batches": 6, "minibatches": 2})
    world.run(lambda: steps(world) == 3)  # the first step of the second batch
    assert ask(world, PauseRun("lunch")) == "fresh"
    world.deliver()
    assert (world.core.state.version, steps(world)) == (2, 4)
    assert world.core.state.ledger.count("reported", "train") == 8, "samples are drawn up to the staleness bound"
    world.pass_time(10_000.0)
    assert world.ended is None, "a pause is no stall"
    assert ask(world, PauseRun("again")) == "duplicate"
    assert ask(world, ResumeRun()) == "fresh"
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_pause_outlives_the_controller_and_ends_with_the_resume_of_a_run_that_had_ended() -> None:
    world = small_world()
    world.run(lambda: world.core.state.version == 1)
    ask(world, PauseRun("lunch"))
    world.crash()
    world.deliver()
    assert world.core.state.version <= 2
    assert world.core.state.steering.paused
    world.stop()
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "stopped"
    world.crash()
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_checkpoint_that_a_person_asks_for_is_written_after_the_batch_in_hand_once() -> None:
    world = small_world(train={"batches": 5}, checkpoint={"every": 100, "export": False})
    world.run(lambda: steps(world) == 2)
    assert ask(world, CheckpointRun()) == "fresh"
    assert ask(world, CheckpointRun()) == "duplicate"
    world.deliver()
    saved = [order.position.version for order in world.models["policy-0"].told(SaveCheckpoint)]  # type: ignore[union-attr]
    assert saved == [2, 5]


def test_asked_for_a_checkpoint_of_what_is_settled_nothing_is_written() -> None:
    world = small_world(train={"batches": 5}, checkpoint={"every": 1})
    world.run(lambda: steps(world) == 2)
    ask(world, PauseRun("now"))
    world.deliver()
    assert ask(world, CheckpointRun()) == "duplicate"
    assert len(world.models["policy-0"].told(SaveCheckpoint)) == 2


def test_an_evaluation_that_a_person_asks_for_judges_the_newest_version_and_holds_no_training_up() -> None:
    world = small_world(train={"batches": 6}, evaluation=SUITES)
    world.run(lambda: world.core.state.version == 3)
    assert ask(world, EvaluateRun()) == "fresh"
    world.deliver()
    judged = [(fact.why, fact.version) for fact in world.of(Evaluated)]
    assert [why for why, _ in judged] == ["first", "asked", "last"]
    assert judged[1][1] in (2, 3, 4)
    assert world.ended is not None and world.ended.outcome == "complete"


def test_an_evaluation_can_be_asked_for_during_sft_and_during_a_pause() -> None:
    sft = {"dataset": "train", "batches": 4, "batch_size": 4, "lr": 1e-3}
    world = small_world(sft=sft, evaluation=SUITES)
    world.run(lambda: world.core.state.version == 2)
    ask(world, PauseRun("let me see"))
    world.deliver()
    version = world.core.state.version
    assert version < 4
    ask(world, EvaluateRun())
    world.deliver()
    assert [(fact.why, fact.version) for fact in world.of(Evaluated)] == [("asked", version)]
    assert ask(world, EvaluateRun()) == "duplicate"


def test_what_cannot_be_done_is_refused_by_name() -> None:
    world = small_world()
    assert ask(world, EvaluateRun()) == "state"
    assert ask(world, DrainReplica("rollout-7", "")) == "replica"
    assert ask(world, DrainReplica("policy-0", "")) == "replica"
    assert ask(world, ScaleFleet({"evaluator": 1})) == "role"
    world.deliver()
    assert ask(world, PauseRun("")) == "state", "the run is over"


def test_the_last_policy_that_the_launcher_keeps_is_not_drained_for_one_that_nobody_starts_again() -> None:
    world = small_world(train={"batches": 200})
    world.join("policy-7", "policy")
    world.run(lambda: world.core.state.version == 2)
    assert world.state_of("policy-7") == "ready"
    assert ask(world, DrainReplica("policy-0", "")) == "replica"
    assert ask(world, DrainReplica("policy-7", "")) == "fresh"


def test_more_replicas_take_the_lowest_free_names_and_fewer_give_up_the_newest() -> None:
    scaling = Scaling.of(recipe(rollout={"replicas": 2}))
    assert scaling.wanted == ["policy-0", "rollout-0", "rollout-1"]
    assert scaling.scale("rollout", 4, {"rollout-2"}) == []
    assert scaling.names["rollout"] == ["rollout-0", "rollout-1", "rollout-3", "rollout-4"]
    assert scaling.scale("rollout", 1, ()) == ["rollout-4", "rollout-3", "rollout-1"]
    scaling.give_up("rollout-0")
    assert scaling.wanted == ["policy-0"]
    assert scaling.scale("rollout", 1, ()) == []
    assert scaling.wanted == ["policy-0", "rollout-0"]


def test_scaling_is_remembered_over_terms_and_drains_the_newest_but_nobody_started_by_hand() -> None:
    world = small_world(train={"batches": 40})
    world.join("rollout-5", "rollout")
    world.run(lambda: world.core.state.version == 1)
    assert ask(world, ScaleFleet({"rollout": 3})) == "fresh"
    assert ask(world, ScaleFleet({"rollout": 3})) == "duplicate"
    world.join("rollout-1", "rollout")
    world.join("rollout-2", "rollout")
    world.crash()
    assert world.core.state.scaling.count("rollout") == 3
    world.run(lambda: world.core.state.version == 10)
    assert ask(world, ScaleFleet({"rollout": 1})) == "fresh"
    goes = {name: world.core.state.fleet.goes(replica) for name, replica in world.core.state.fleet.replicas.items()}
    assert [name for name, gone in goes.items() if gone] == ["rollout-1", "rollout-2"]
    assert world.state_of("rollout-5") == "ready"


@pytest.mark.parametrize("at_step", [None, 3])
def test_a_staleness_bound_that_is_lowered_is_kept_from_its_step_on(at_step: int | None) -> None:
    world = small_world(train={"batches": 8, "max_staleness": 4})
    world.run(lambda: world.core.state.version == 2)
    world.change({"train.max_staleness": 0}, at_step)
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    step = world.of(Revised)[0].step
    formed = [fact for fact in world.facts if type(fact).__name__ == "Consumed" and fact.version > step]
    assert formed and all((fact.bound, fact.staleness) == (0, 0) for fact in formed)


def test_a_staleness_bound_that_is_raised_while_a_step_is_computed_holds_nothing_up() -> None:
    world = small_world(train={"batches": 6, "max_staleness": 0})
    world.run(lambda: world.core.state.version == 1)
    world.change({"train.max_staleness": 3})
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert {fact.revision for fact in world.of(Revised)} == {1}


def test_leases_carry_the_reward_weights_of_their_revision() -> None:
    parts = {"parts": [{"kind": "exact", "weight": 1.0}, {"kind": "format", "weight": 0.5}]}
    world = small_world(train={"batches": 6}, rewards=parts)
    world.run(lambda: world.core.state.version == 1)
    world.change({"rewards.format.weight": 0.0})
    world.deliver()
    weights: dict[int, list[tuple[str, float]]] = {}
    for order in world.models["rollout-0"].told(Lease):
        assert isinstance(order, Lease)
        for grant in order.grants:
            weights[grant.revision] = list(grant.reward_weights.items())
    assert weights == {0: [("exact", 1.0), ("format", 0.5)], 1: [("exact", 1.0), ("format", 0.0)]}
    assert [line.get("set/rewards.format.weight") for line in world.metrics][-1] == 0.0
    assert "set/rewards.format.weight" not in world.metrics[0]
