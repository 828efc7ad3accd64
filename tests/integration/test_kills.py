"""kill -9 of one service in mid-run: it is started again, the run does all its steps, and its books are clean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import NewRun
from tests.integration.run import Run

pytestmark = pytest.mark.integration


def incarnations(run: Run) -> dict[str, int]:
    """The last incarnation of every replica."""
    return {fact["replica"]: fact["incarnation"] for fact in run.facts("joined")}


@pytest.mark.parametrize("stage", ["sft", "train"])
def test_a_killed_controller_goes_on_from_its_journal(new_run: NewRun, recipe: Path, stage: str) -> None:
    run = new_run().up(recipe)
    run.wait_for_steps(4, stage)
    run.kill("controller")
    assert run.wait() == 0, run.story()
    audit = run.assert_complete()
    assert audit.terms == 2
    # the policy held the committed state throughout: nothing was rolled back, nobody was started again
    assert audit.rollbacks == []
    assert incarnations(run) == {"policy-0": 1, "rollout-0": 1}


def test_a_killed_rollout_comes_back_and_gets_weights_first(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "train.batches=20")
    run.wait_for_steps(3, "train")
    run.kill("rollout")
    assert run.wait() == 0, run.story()
    audit = run.assert_complete()
    assert incarnations(run) == {"policy-0": 1, "rollout-0": 2}
    assert (audit.terms, audit.rollbacks, audit.gone["lost"]) == (1, [], 1)
    facts = [fact for record in run.records() for fact in record["facts"]]
    back = next(i for i, fact in enumerate(facts) if fact["type"] == "joined" and fact["incarnation"] == 2)
    after = [fact["type"] for fact in facts[back:] if fact.get("replica") == "rollout-0"]
    assert after.index("synced") < after.index("leased")


def trained(run: Run, lineage: int, stage: str) -> dict[int, list[dict[str, Any]]]:
    """What each committed step of a lineage was given: its groups, and where their payloads lie."""
    committed = {(fact["step"], fact["attempt"]) for fact in run.facts("committed") if fact["lineage"] == lineage}
    return {
        fact["step"]: [*fact["message"]["groups"], *fact["payload"]]
        for fact in run.facts("assigned")
        if fact["message"]["stage"] == stage
        if fact["lineage"] == lineage and (fact["step"], fact["attempt"]) in committed
    }


@pytest.mark.parametrize("stage", ["train", pytest.param("sft", marks=pytest.mark.slow)])
def test_a_policy_killed_between_checkpoints_is_rolled_back_and_retrained(
    new_run: NewRun, recipe: Path, stage: str
) -> None:
    run = new_run().up(recipe, "train.batches=20")
    run.wait_for_steps(4, stage)  # committed, and the next checkpoint is at the end of the stage
    run.kill("policy")
    assert run.wait() == 0, run.story()
    audit = run.assert_complete()
    began = 30 if stage == "train" else 0
    (back,) = audit.rollbacks
    assert (back["before"], back["lineage"], back["version"], back["step"]) == (1, 2, began, began)
    assert incarnations(run) == {"policy-0": 2, "rollout-0": 1}
    before, after = audit.books[1], audit.books[2]
    assert before.open == after.open == set()
    assert "rollback" in before.discarded.values()
    assert after.steps == list(range(began, 50))
    lost, again = trained(run, 1, stage), trained(run, 2, stage)
    assert len(lost) >= 4
    assert {step: again[step] for step in lost} == lost, "a retrained step was given other groups than the recorded"


def test_with_a_checkpoint_behind_it_a_killed_policy_loses_only_what_came_after(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "train.batches=30", "checkpoint.every=5")
    run.wait_for(lambda: any(fact["version"] >= 40 for fact in run.facts("settled")), "a checkpoint at version 40")
    run.kill("policy")
    assert run.wait() == 0, run.story()
    audit = run.assert_complete()
    # the kill may also have met a moment at which everything committed was settled
    assert all(back["version"] >= 40 for back in audit.rollbacks)
    assert incarnations(run)["policy-0"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["policy controller rollout", "rollout policy controller", "controller rollout policy"]
)
def test_all_three_may_be_killed_in_one_run(new_run: NewRun, recipe: Path, order: str) -> None:
    run = new_run().up(recipe, "train.batches=60", "checkpoint.every=10", "rollout.replicas=2")
    run.wait_for_steps(3, "train")
    for role in order.split():
        wanted = len(run.facts("committed")) + 3
        killed = run.kill(role)
        run.wait_for(lambda wanted=wanted: len(run.facts("committed")) >= wanted, f"steps after the {role} was killed")
        assert killed not in run.pids(role)
    assert run.wait() == 0, run.story()
    run.assert_complete()
