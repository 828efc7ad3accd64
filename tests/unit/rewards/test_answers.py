"""Parts about what is inside `<answer>`."""

from __future__ import annotations

import pytest

from shared.rewards.base import RewardError, Sample
from tests.unit.rewards.judge import Judge, sample, scorer, worth

RIGHT = "<think>1+1=2</think><answer> 2 </answer>"


def test_the_verifier_judges_the_text_inside_the_answer() -> None:
    judge = Judge()
    assert scorer("verifier").score(Sample(judge, 7, RIGHT, 9)).total == 0.5
    assert judge.asked == [(7, "2")]


@pytest.mark.parametrize("completion", ["", "2", "<answer>2", "</answer>2<answer>", "<think>2</think>"])
def test_no_answer_is_worth_nothing_and_asks_nobody(completion: str) -> None:
    judge = Judge()
    scored = scorer("verifier", "exact").score(Sample(judge, 0, completion, 9))
    assert scored.parts == {"verifier": 0.0, "exact": 0.0}
    assert judge.asked == []


def test_exact_wants_the_reference_answer_but_for_outer_white_space() -> None:
    assert worth("exact", RIGHT, " 2\n") == 1.0
    assert worth("exact", RIGHT, "2.0") == 0.0


def test_exact_without_a_reference_answer_is_an_error_of_the_row() -> None:
    with pytest.raises(RewardError, match="reward part 'exact': expected a reference answer in the row, it has none"):
        scorer("exact").score(sample(RIGHT, ""))


@pytest.mark.parametrize(
    ("completion", "value"),
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
def test_format_wants_thought_and_answer_once_each_in_order_and_nothing_else(completion: str, value: float) -> None:
    assert worth("format", completion) == value
