"""Reward parts: what each is worth, how they add up, what is refused."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from shared.config.schema import DataTable, RewardPart
from shared.data import open_dataset
from shared.data.dataset import Row
from shared.rewards.score import RewardError, score

RIGHT = "<think>1+1=2</think><answer> 2 </answer>"


class Judge:
    """A data set whose verifier gives `worth` to any answer, and remembers what it was asked."""

    def __init__(self, worth: object = 0.5, answer: str = "2") -> None:
        self.worth, self.answer, self.asked = worth, answer, []

    def row(self, index: int) -> Row:
        return Row([{"role": "user", "content": "1+1?"}], self.answer, None, index)

    def score(self, index: int, completion_answer: str | None) -> float:
        self.asked.append((index, completion_answer))
        return self.worth  # type: ignore[return-value]


def parts(*kinds: str) -> list[RewardPart]:
    return [RewardPart(kind=kind) for kind in kinds]  # type: ignore[arg-type]


def test_the_verifier_judges_the_text_inside_the_answer() -> None:
    judge = Judge()
    assert score(parts("verifier"), judge, 7, RIGHT).total == 0.5
    assert judge.asked == [(7, "2")]


@pytest.mark.parametrize("completion", ["", "2", "<answer>2", "</answer>2<answer>", "<think>2</think>"])
def test_no_answer_is_worth_nothing_and_asks_nobody(completion: str) -> None:
    judge = Judge()
    scored = score(parts("verifier", "exact"), judge, 0, completion)
    assert scored.parts == {"verifier": 0.0, "exact": 0.0}
    assert judge.asked == []


def test_exact_wants_the_reference_answer_but_for_outer_white_space() -> None:
    assert score(parts("exact"), Judge(answer=" 2\n"), 0, RIGHT).total == 1.0
    assert score(parts("exact"), Judge(answer="2.0"), 0, RIGHT).total == 0.0


def test_exact_without_a_reference_answer_is_an_error_of_the_row() -> None:
    with pytest.raises(RewardError, match="row 3: expected a reference answer"):
        score(parts("exact"), Judge(answer=""), 3, RIGHT)


@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        (RIGHT, 1.0),
        ("<think></think>\n<answer></answer>\n", 1.0),
        ("<think>two\nlines</think><answer>2</answer>", 1.0),
        ("<answer>2</answer><think>late</think>", 0.0),
        ("<think>a</think><think>b</think><answer>2</answer>", 0.0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", 0.0),
        ("<think>a<answer>2</answer></think>", 0.0),
        ("so: <think>a</think><answer>2</answer>", 0.0),
        ("<think>a</think> hence <answer>2</answer>", 0.0),
        ("<think>a</think><answer>2</answer> indeed", 0.0),
        ("<answer>2</answer>", 0.0),
    ],
)
def test_format_wants_thought_and_answer_once_each_in_order_and_nothing_else(completion: str, worth: float) -> None:
    assert score(parts("format"), Judge(), 0, completion).total == worth


def test_the_reward_is_the_weighted_sum_and_parts_stay_unweighted() -> None:
    recipe = [RewardPart(kind="verifier", weight=2.0), RewardPart(kind="format", weight=-0.25)]
    scored = score(recipe, Judge(worth=0.5), 0, RIGHT)
    assert scored.total == 2.0 * 0.5 - 0.25
    assert scored.parts == {"verifier": 0.5, "format": 1.0}


@pytest.mark.parametrize("worth", [math.nan, math.inf, -math.inf, None, "1", True])
def test_a_part_that_gives_no_finite_number_is_an_error(worth: object) -> None:
    with pytest.raises(RewardError, match="'verifier' of row 0: expected a finite number"):
        score(parts("verifier"), Judge(worth=worth), 0, RIGHT)


def test_a_reasoning_gym_row_is_judged_by_its_own_verifier() -> None:
    dataset = open_dataset("sums", DataTable(kind="reasoning_gym", task="chain_sum", size=5))
    answer = dataset.row(2).answer
    right = score(parts("verifier", "exact", "format"), dataset, 2, f"<think></think><answer>{answer}</answer>")
    wrong = score(parts("verifier", "exact"), dataset, 2, f"<answer>{answer}1</answer>")
    assert right.parts == {"verifier": 1.0, "exact": 1.0, "format": 1.0}
    assert wrong.parts["verifier"] < 1.0
    assert wrong.parts["exact"] == 0.0


def test_judging_needs_no_torch() -> None:
    code = "import sys, services.rollout.reward_worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
