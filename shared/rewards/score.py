"""The reward of one completion: the weighted sum of the recipe's parts, each of which is kept for the metrics.

Called in reward workers, away from the processes that generate and learn: a verifier is foreign code. Parts are pure
functions of (data set, row, completion). Invariant: a score that comes out is finite; anything else is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.config.schema import RewardPart
from shared.data.answers import extract_answer
from shared.data.dataset import Row


class RewardError(Exception):
    """A completion that cannot be rewarded; the text says which part failed, on what, and why."""


class Judge(Protocol):
    """The side of a data set that rewards need."""

    def row(self, index: int) -> Row:
        """The row as it was asked."""

    def score(self, index: int, completion_answer: str | None) -> float:
        """The verifier's judgement of an answer, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Score:
    """`total` is the weighted sum; `parts` are the unweighted values by kind."""

    total: float
    parts: dict[str, float]


def score(parts: Sequence[RewardPart], judge: Judge, row: int, completion: str) -> Score:
    """Judge `completion`, an answer to `row`, by every part. RewardError if a part yields no finite number."""
    total = 0.0
    values: dict[str, float] = {}
    for part in parts:
        value = PARTS[part.kind](judge, row, completion)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RewardError(f"reward part {part.kind!r} of row {row}: expected a finite number, got {value!r}")
        values[part.kind] = float(value)
        total += part.weight * float(value)
    return Score(total, values)


def verifier(judge: Judge, row: int, completion: str) -> float:
    """The data set's own judgement of the text inside `<answer>`, 0 to 1; 0 without an answer."""
    answer = extract_answer(completion)
    return 0.0 if answer is None else judge.score(row, answer)


def exact(judge: Judge, row: int, completion: str) -> float:
    """1 if the text inside `<answer>` equals the row's reference answer, white space at the ends aside; else 0."""
    reference = judge.row(row).answer.strip()
    if not reference:
        raise RewardError(f'reward part "exact" of row {row}: expected a reference answer in the row, it has none')
    return float(extract_answer(completion) == reference)


_FORM = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_(judge: Judge, row: int, completion: str) -> float:
    """1 if the completion is `<think>..</think><answer>..</answer>`, each tag once, nothing around them; else 0."""
    return float(_FORM.fullmatch(completion) is not None and all(completion.count(tag) == 1 for tag in _TAGS))


PARTS: dict[str, Callable[[Judge, int, str], float]] = {"verifier": verifier, "exact": exact, "format": format_}
