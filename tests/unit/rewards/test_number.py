"""Numbers: found at the end, whatever surrounds them, and compared exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest

from shared.rewards.base import RewardError
from shared.rewards.number import last_number
from tests.unit.rewards.judge import sample, scorer, worth


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("He sold 48 and 24, 72 in all.", "72"),
        ("48 + 24 = 72\n#### 72", "72"),
        ("#### 1,234,567 apples, 3 of them green", "3"),
        ("#### 1,234,567 apples", "1234567"),
        ("<think>1 2 3</think><answer>$18.50</answer> 7", "18.5"),
        (r"so \boxed{-4} as in 3", "-4"),
        ("it is −7 °C", "-7"),
        ("-$5", "-5"),
        ("5-3", "3"),
        ("x2 = 9", "9"),
        ("3/4 of it", "3/4"),
        ("2.50", "5/2"),
        (".5", "1/2"),
        ("1.5e3", "1500"),
        ("50%", "50"),
        ("12,34", "34"),
        ("The total is 72.", "72"),
        ("€1,000.00", "1000"),
    ],
)
def test_the_last_number_is_found(text: str, number: str) -> None:
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", "x2", "####", "<answer></answer> 3", "9" * 5000])
def test_where_there_is_no_number_there_is_none(text: str) -> None:
    assert last_number(text) is None


def test_a_worked_reference_answer_is_worth_its_last_number() -> None:
    reference = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72"
    assert worth("number", "24 + 48 makes 72.0 clips", reference) == 1.0
    assert worth("number", "24 clips", reference) == 0.0
    assert worth("number", "many", reference) == 0.0


def test_tolerance_is_the_largest_difference_that_counts_as_equal() -> None:
    about = {"kind": "number", "tolerance": 0.25}
    assert worth(about, "3.25", "3") == 1.0
    assert worth(about, "3.26", "3") == 0.0


def test_a_reference_without_a_number_is_an_error_of_the_row() -> None:
    with pytest.raises(
        RewardError, match="reward part 'number': expected a reference answer with a number, got 'many'"
    ):
        scorer("number").score(sample("1", "many"))
