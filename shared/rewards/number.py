"""GSM8K-style answers: the number that a text ends in.

Source of the `#### 72` form: Cobbe et al., arXiv 2110.14168, whose worked answers end so.
"""

from __future__ import annotations

import re
from fractions import Fraction

from shared.data.answers import extract_answer
from shared.rewards.base import RewardError, Sample
from shared.rewards.boxed import last_boxed

_MARK = "####"
_NUMBER = re.compile(
    r"""
    (?P<minus> (?<![\w)\]}.]) [-−] [$€£]? )?             # after a digit or a bracket it is a difference
    (?<![\w.])                                           # not the 2 of x2, not the 5 of 2.5
    (?P<body> (?: \d{1,3}(?:,\d{3})+(?!\d) | \d+ ) (?:\.\d+)? | \.\d+ )
    (?P<power> [eE][-+]?\d{1,2}\b )?
    (?: /(?P<under> [1-9]\d* ) )?
    """,
    re.VERBOSE,
)
_LONGEST = 400
"""Longer ones are noise, and slow to compare."""


def number(sample: Sample, tolerance: float) -> float:
    """1 if the completion's number is the reference answer's, or no further from it than `tolerance`; else 0."""
    wanted, found = last_number(sample.reference), last_number(sample.completion)
    if wanted is None:
        raise RewardError(f"expected a reference answer with a number, got {sample.reference!r}; mend the row")
    return float(found is not None and abs(found - wanted) <= Fraction(tolerance))


def last_number(text: str) -> Fraction | None:
    r"""The last number after `####`, or inside `<answer>`, or in the last `\boxed{..}`, or of the whole text.

    Thousands separators, currency signs and units don't matter; a simple fraction is one number.

    >>> last_number("2 + 3 makes 5 apples, so #### $1,205.50 in all")
    Fraction(2411, 2)
    """
    marked = text.rpartition(_MARK)
    where = marked[2] if marked[1] else extract_answer(text)
    if where is None:
        where = last_boxed(text)
    numbers = [m for m in _NUMBER.finditer(text if where is None else where) if len(m[0]) <= _LONGEST]
    if not numbers:
        return None
    last = numbers[-1]
    value = Fraction(last["body"].replace(",", "") + (last["power"] or "")) / int(last["under"] or 1)
    return -value if last["minus"] else value
