"""What every part of the reward is given and gives back.

A part is a function of one `Sample`; `shared.rewards.build` makes it from its table of the recipe, and it is called in
a reward worker. A part never knows its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shared.data.dataset import Row


class RewardError(Exception):
    """A completion that cannot be rewarded; the text says which part failed, what it did, and what to do."""


class Judge(Protocol):
    """The side of a data set that rewards need."""

    def row(self, index: int) -> Row:
        """The row as it was asked."""

    def score(self, index: int, completion_answer: str | None) -> float:
        """The verifier's judgement of an answer, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Sample:
    """`completion`, of `tokens` tokens (the one that ended it included), answers row `row` of `judge`."""

    judge: Judge
    row: int
    completion: str
    tokens: int

    @property
    def reference(self) -> str:
        """The row's reference answer, stripped. RewardError if it has none."""
        answer = self.judge.row(self.row).answer.strip()
        if not answer:
            raise RewardError(
                "expected a reference answer in the row, it has none; name its column with `answer` in the "
                "[data.NAME] table, or reward with a part that needs none"
            )
        return answer


PartFunction = Callable[[Sample], object]
"""A number; or, from a function of the user's, numbers by name."""
