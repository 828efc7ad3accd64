"""The reward: parts add up by weight, stay apart in the metrics, and are numbers or an error."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from shared.config.schema import DataTable, VerifierPart
from shared.data import open_dataset
from shared.rewards.base import RewardError, Sample
from shared.rewards.score import Scorer
from tests.unit.rewards.judge import sample, scorer

RIGHT = "<think>1+1=2</think><answer> 2 </answer>"


def test_the_reward_is_the_weighted_sum_and_parts_stay_unweighted() -> None:
    scored = scorer({"kind": "verifier", "weight": 2.0}, {"kind": "format", "weight": -0.25}).score(sample(RIGHT))
    assert scored.total == 2.0 * 0.5 - 0.25
    assert scored.parts == {"verifier": 0.5, "format": 1.0}


def test_parts_of_one_kind_are_told_apart_by_their_names() -> None:
    near = {"kind": "number", "name": "near", "tolerance": 1.0}
    assert scorer("number", near).score(sample("3")).parts == {"number": 0.0, "near": 1.0}


def test_each_part_says_when_it_begins() -> None:
    begun: list[str] = []
    scorer("verifier", {"kind": "format", "name": "form"}).score(sample(RIGHT), begun.append)
    assert begun == ["verifier", "form"]


@pytest.mark.parametrize("worth", [math.nan, math.inf, -math.inf, None, "1", [1.0, 2.0], 10**400])
def test_a_part_that_gives_no_finite_number_is_an_error(worth: object) -> None:
    with pytest.raises(RewardError, match="^reward part 'verifier': it returned .*, expected a finite number"):
        scorer("verifier").score(sample(RIGHT, worth=worth))


def test_a_reasoning_gym_row_is_judged_by_its_own_verifier() -> None:
    dataset = open_dataset("sums", DataTable(kind="reasoning_gym", task="chain_sum", size=5))
    answer = dataset.row(2).answer
    right = Sample(dataset, 2, f"<think></think><answer>{answer}</answer>", 9)
    wrong = Sample(dataset, 2, f"<answer>{answer}1</answer>", 9)
    assert scorer("verifier", "exact", "format").score(right).parts == {"verifier": 1.0, "exact": 1.0, "format": 1.0}
    assert scorer("verifier").score(wrong).total < 1.0
    assert scorer("exact").score(wrong).total == 0.0


def test_a_part_in_python_is_named_after_its_kind_like_one_in_a_recipe() -> None:
    assert Scorer([VerifierPart()]).score(sample(RIGHT)).parts == {"verifier": 0.5}


def test_judging_needs_no_torch() -> None:
    code = "import sys, services.rollout.reward_worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
