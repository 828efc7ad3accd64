"""Evaluation: held-out accuracy of a version, judged on the rollout fleet.

    wanted -> open -> done

A round asks the same held-out rows every time, greedily, of replicas that hold exactly its version; syncs to them wait
until it is over, training does not. A *gating* round is one that a decision hangs on (first, last, a stage's stop
rule): no new batch is formed until it is done.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Why = Literal["first", "rule", "periodic", "last"]


class Round(msgspec.Struct):
    """One evaluation of one version; `scores` are by held-out row."""

    lineage: int
    version: int
    stage: str
    why: Why
    began: float
    rows: int
    scores: dict[int, float] = {}

    def correct(self, at_least: float) -> int:
        """Rows whose verifier score reached the bar."""
        return sum(score >= at_least - 1e-9 for score in self.scores.values())


class Verdict(msgspec.Struct):
    """What a round found."""

    lineage: int
    version: int
    stage: str
    why: Why
    n: int
    correct: int

    @property
    def accuracy(self) -> float:
        """Share of correct rows."""
        return self.correct / self.n


class Evaluation(msgspec.Struct):
    """The open round and every verdict so far."""

    round: Round | None = None
    verdicts: list[Verdict] = []

    def verdict_of(self, lineage: int, version: int) -> Verdict | None:
        """What is known of exactly these weights."""
        for verdict in reversed(self.verdicts):
            if (verdict.lineage, verdict.version) == (lineage, version):
                return verdict
        return None

    def close(self, at_least: float) -> Verdict:
        """The round is complete: record its verdict."""
        done = self.round
        if done is None or len(done.scores) != done.rows:
            raise ValueError("a round ends when every row is judged")
        verdict = Verdict(done.lineage, done.version, done.stage, done.why, done.rows, done.correct(at_least))
        self.verdicts.append(verdict)
        self.round = None
        return verdict
