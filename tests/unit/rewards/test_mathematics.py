"""Boxed mathematics: equal values are equal however they are written, and only the last box counts."""

from __future__ import annotations

import signal
import sys

import pytest

from shared.config import RecipeError
from shared.rewards.boxed import last_boxed
from tests.unit.rewards.judge import scorer, worth

math_verify = pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"\frac{1}{2}", "0.5"),
        ("0.5", r"$\frac{1}{2}$"),
        ("3/4", r"\boxed{\frac{3}{4}}"),
        (r"12\text{ apples}", "12"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\{4,3\}", r"\{3,4\}"),
        ("1234", "1,234"),
    ],
)
def test_equal_values_are_right_however_they_are_written(answer: str, reference: str) -> None:
    assert worth("math", rf"Hence \boxed{{{answer}}}.", reference) == 1.0


@pytest.mark.parametrize(
    "completion",
    ["2", r"\boxed{}", r"\boxed{3}", r"\boxed{2", r"\boxed{\frac{}", r"first \boxed{2}, then \boxed{3}", ""],
)
def test_everything_else_is_worth_nothing(completion: str) -> None:
    assert worth("math", completion, "2") == 0.0


def test_the_last_box_counts() -> None:
    assert worth("math", r"first \boxed{3}, then \boxed{2}", "2") == 1.0


def test_a_box_may_hold_braces() -> None:
    assert last_boxed(r"\boxed{\{\frac{1}{2}, {3}\}} and \boxed{open") == r"\{\frac{1}{2}, {3}\}"


def test_no_alarm_is_left_and_none_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("the worker's own limit is enough")

    monkeypatch.setattr(signal, "alarm", refused)
    assert worth("math", r"\boxed{2}", "2") == 1.0


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RecipeError, match=r"needs the package math_verify.*pip install 'orrery\[math\]'"):
        scorer("math")
