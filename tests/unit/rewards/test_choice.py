"""Multiple choice: the letter is found however it is dressed, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from shared.rewards.base import RewardError
from shared.rewards.choice import chosen
from tests.unit.rewards.judge import sample, scorer, worth


@pytest.mark.parametrize(
    "completion",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "**B**",
        "[b]",
        "The answer is B",
        "The answer is (B).",
        "the correct answer is: **B**, since it rains",
        "Answer: B",
        "The correct option is B.",
        "The answer is option B",
        "B. Lima",
        "(B) Lima, of course",
        "Lima is in Peru, so B",
        "I think it is B.",
        "A is too low, so the answer is B",
        "First I thought the answer is A. No: the answer is B.",
        r"Hence \boxed{B}",
        r"Hence \boxed{\text{(B)}}",
        "<think>A? The answer is A. Hm.</think><answer>B</answer>",
        "<think>A? The answer is A. Hm.</think>(B)",
        "<answer>The answer is B.</answer>",
    ],
)
def test_the_chosen_letter_is_found(completion: str) -> None:
    assert chosen(completion) == "B"


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "Lima",
        "A or B",
        "A number of things",
        "I think so",
        "the answer is a city",
        "Because",
        "B52's",
        "K",
        "<answer></answer>",
    ],
)
def test_no_choice_and_several_are_none(completion: str) -> None:
    assert chosen(completion) is None


def test_the_first_and_the_last_letter_are_options_too() -> None:
    assert [chosen(f"The answer is {letter}.") for letter in "AIJ"] == ["A", "I", "J"]


def test_a_letter_beyond_the_options_is_none() -> None:
    assert chosen("(E)", options=5) == "E"
    assert chosen("(E)", options=4) is None


@pytest.mark.parametrize("reference", ["B", "(B)", "B. Lima", "b"])
def test_the_reference_may_be_dressed_too(reference: str) -> None:
    assert worth("choice", "The answer is B", reference) == 1.0
    assert worth("choice", "The answer is C", reference) == 0.0


def test_a_reference_that_names_no_option_is_an_error_of_the_row() -> None:
    with pytest.raises(RewardError, match="names an option from A to D, got 'Lima'"):
        scorer({"kind": "choice", "options": 4}).score(sample("B", "Lima"))
