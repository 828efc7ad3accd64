"""Evaluation: held-out accuracy of a version, judged by the rollout fleet or by evaluators of its own.

    wanted -> open -> done

A round asks the same held-out rows of every suite each time, of replicas that hold exactly its version. A replica that
judges is sent no other weights until the round is over; training does not wait for it. A *gating* round is one that a
decision hangs on (first, last, a stage's stop rule): no new batch is formed until it is done.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Why = Literal["first", "rule", "periodic", "asked", "last"]


class Answer(msgspec.Struct):
    """What became of one row: the share of its samples that are correct, and the category that the row is of."""

    correct: float
    category: str


class Round(msgspec.Struct):
    """One evaluation of one version; `rows` counts those of each suite, `answers` are by suite and row."""

    lineage: int
    version: int
    stage: str
    why: Why
    began: float
    rows: dict[str, int]
    answers: dict[str, dict[int, Answer]] = {}

    def answer(self, suite: str, row: int, answer: Answer) -> None:
        """A row is judged."""
        self.answers.setdefault(suite, {})[row] = answer

    @property
    def complete(self) -> bool:
        """Whether every row of every suite is judged."""
        return all(len(self.answers.get(suite, ())) == rows for suite, rows in self.rows.items())


class Tally(msgspec.Struct):
    """Rows, and how many of them were answered correctly; a row that was sampled several times counts as a share."""

    n: int = 0
    correct: float = 0.0

    def add(self, correct: float) -> None:
        """One more row."""
        self.n, self.correct = self.n + 1, self.correct + correct


class Verdict(msgspec.Struct):
    """What a round found on one suite."""

    suite: str
    lineage: int
    version: int
    stage: str
    why: Why
    n: int
    correct: float
    categories: dict[str, Tally] = {}

    @property
    def accuracy(self) -> float:
        """Share of correct rows."""
        return self.correct / self.n


class Evaluation(msgspec.Struct):
    """The open round and every verdict so far."""

    round: Round | None = None
    verdicts: list[Verdict] = []

    def judged(self, lineage: int, version: int) -> bool:
        """Whether exactly these weights were judged."""
        return any((verdict.lineage, verdict.version) == (lineage, version) for verdict in reversed(self.verdicts))

    def close(self) -> list[Verdict]:
        """The round is complete: record its verdicts, one a suite."""
        done = self.round
        if done is None or not done.complete:
            raise ValueError("a round ends when every row is judged")
        verdicts = [_verdict(done, suite) for suite in done.rows]
        self.verdicts += verdicts
        self.round = None
        return verdicts


def _verdict(done: Round, suite: str) -> Verdict:
    whole, categories = Tally(), dict[str, Tally]()
    for _, answer in sorted(done.answers[suite].items()):  # floats add up alike whoever answered first
        whole.add(answer.correct)
        if answer.category:
            categories.setdefault(answer.category, Tally()).add(answer.correct)
    ordered = {name: categories[name] for name in sorted(categories)}
    return Verdict(suite, done.lineage, done.version, done.stage, done.why, whole.n, whole.correct, ordered)
