"""A user's own reward in a whole run: its numbers reach the metrics, and what it does wrong ends the run by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.conftest import NewRun

pytestmark = pytest.mark.integration

REWARD = """
def score(completion, answer, tokens, row, **_):
    print("a reward may print")
    said = completion.rpartition("<answer>")[2].removesuffix("</answer>").strip()
    near = 1.0 / (1 + abs(int(said) - int(answer))) if said.isdigit() else 0.0
    assert row["answer"] == int(answer)
    return {"right": float(said == answer), "near": near, "brief": -0.01 * tokens}
"""
PARTS = """
[[rewards.parts]]
kind = "python"
function = "my_rewards:score"
name = "mine"
weight = 2.0

[[rewards.parts]]
kind = "format"
"""


def with_my_reward(recipe: Path, module: str) -> Path:
    """The short recipe with a reward of the user's in a module beside it."""
    before, _, after = recipe.read_text().partition("[[rewards.parts]]")
    recipe.write_text(before + PARTS + after[after.index("[evaluation]") :])
    (recipe.parent / "my_rewards.py").write_text(module)
    return recipe


def test_the_parts_of_a_users_reward_reach_the_metrics(recipe: Path, new_run: NewRun) -> None:
    run = new_run().up(with_my_reward(recipe, REWARD), "sft.batches=8", "train.batches=3")
    assert run.wait() == 0, run.story()
    run.assert_complete()
    lines = [line for line in run.metrics() if line["stage"] == "train"]
    assert len(lines) == 3
    for line in lines:
        named = [line[f"reward/mine/{key}"] for key in ("right", "near", "brief")]
        assert line["reward/mine"] == pytest.approx(sum(named))
        assert line["reward_trained"] == pytest.approx(2.0 * line["reward/mine"] + line["reward/format"])
        assert line["reward/mine/brief"] == pytest.approx(-0.01 * line["response_length"])


def test_a_reward_that_always_fails_ends_the_run_with_its_reason(recipe: Path, new_run: NewRun) -> None:
    module = "def score(completion):\n    return 1 / 0\n"
    run = new_run().up(with_my_reward(recipe, module), "sft.batches=1", "rewards.failure_limit=3")
    assert run.wait() == 3, run.story()
    assert run.audit().outcome == "failed"
    story = run.story()
    # more than three when several were judged at once
    assert re.search(r"[3-9] prompt groups in a row failed \(rewards.failure_limit = 3\)", story), story
    assert "it raised ZeroDivisionError: division by zero (my_rewards.py, line 2)" in story
    assert run.all_gone(), story


def test_a_reward_that_cannot_be_imported_is_refused_at_the_start(recipe: Path, new_run: NewRun) -> None:
    run = new_run().up(with_my_reward(recipe, "def other(): return 1\n"))
    assert run.wait() == 2, run.story()
    assert "has no function 'score'" in run.story()
    assert run.all_gone(), run.story()
