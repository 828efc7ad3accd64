"""A data set for tests of rewards, and what makes a sample of it."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from shared.config.schema import RewardPart
from shared.data.dataset import Row
from shared.rewards.base import Sample
from shared.rewards.score import Scorer

_PARTS: TypeAdapter[list[RewardPart]] = TypeAdapter(list[RewardPart])


class Judge:
    """One row; its verifier gives `worth` to any answer, and remembers what it was asked."""

    def __init__(self, answer: str = "2", worth: object = 0.5) -> None:
        self.worth, self.answer, self.asked = worth, answer, []

    def row(self, index: int) -> Row:
        messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]
        return Row(messages, self.answer, None, index, {"prompt": "1+1?", "answer": self.answer, "level": 3})

    def score(self, index: int, completion_answer: str | None) -> float:
        self.asked.append((index, completion_answer))
        return self.worth  # type: ignore[return-value]


def sample(completion: str, answer: str = "2", *, worth: object = 0.5, tokens: int = 10) -> Sample:
    return Sample(Judge(answer, worth), 3, completion, tokens)


def scorer(*parts: dict[str, Any] | str) -> Scorer:
    """A scorer by tables of the recipe, or by kinds alone."""
    return Scorer(_PARTS.validate_python([{"kind": p} if isinstance(p, str) else p for p in parts]))


def worth(part: dict[str, Any] | str, completion: str, answer: str = "2", **more: Any) -> float:
    """What a completion is worth to one part."""
    return scorer(part).score(sample(completion, answer, **more)).total
