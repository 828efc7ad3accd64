"""The evaluator's verifier thread: raw scores, and verifiers that raise or hang."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from services.evaluator.report import eval_report
from services.evaluator.verifying import VerifiedGroup, Verifying
from shared.data.dataset import Dataset, Row
from shared.engines.base import Finished
from shared.messages import Grant, Sampling
from shared.serving.generation import Group


class Verifier(Dataset):
    """Row 0 is judged, row 1 raises, row 2 hangs until `release`."""

    def __init__(self) -> None:
        super().__init__("sums", 3, "ff")
        self.release = threading.Event()

    def _row(self, index: int) -> Row:
        return Row([{"role": "user", "content": "1+1"}], "2", None, index)

    def _score(self, index: int, completion_answer: str) -> float:
        if index == 1:
            raise SystemExit("a verifier that wants to leave")
        if index == 2:
            self.release.wait(30.0)
        return 0.5 if completion_answer == "2" else 0.0


def group_of(row: int, samples: int = 1) -> Group:
    sampling = Sampling(0.0, 1.0, 0, 8)
    grant = Grant(row, 1, 1, "eval", "sums", "ff", 0, row, 7, samples, sampling, 0, 4, 9.0, "sums")
    tokens = np.array([1, 2], dtype=np.int32)
    versions = np.array([4, 4], dtype=np.int32)
    done = [Finished((row, 1), i, tokens, tokens.astype(np.float32), versions, False) for i in range(samples)]
    return Group(grant, [5, 6, 7], time.monotonic(), list(done))


def collected(judge: Verifying, count: int) -> list[VerifiedGroup]:
    found: list[VerifiedGroup] = []
    until = time.monotonic() + 30.0
    while len(found) < count and time.monotonic() < until:
        found += judge.collect(0.05)
    return found


@pytest.fixture
def verifier() -> Verifier:
    return Verifier()


def test_scores_are_the_verifiers_own(verifier: Verifier) -> None:
    judge = Verifying({"sums": verifier}, 10.0)
    judge.submit(group_of(0, samples=2), ["<answer>2</answer>", "<answer>3</answer>"])
    [judged] = collected(judge, 1)
    assert ([score.total for score in judged.scores], judged.error) == ([0.5, 0.0], "")
    assert len(judge) == 0
    judge.close()


def test_a_verifier_that_raises_costs_its_own_group_only(verifier: Verifier) -> None:
    judge = Verifying({"sums": verifier}, 10.0)
    judge.submit(group_of(1), ["<answer>2</answer>"])
    judge.submit(group_of(0), ["<answer>2</answer>"])
    raised, fine = collected(judge, 2)
    assert "a verifier that wants to leave" in raised.error and raised.scores == []
    assert fine.error == ""
    judge.close()


def test_a_verifier_that_hangs_is_left_behind(verifier: Verifier) -> None:
    judge = Verifying({"sums": verifier}, 0.1)
    judge.submit(group_of(2), ["<answer>2</answer>"])
    judge.submit(group_of(0), ["<answer>2</answer>"])
    hung, fine = collected(judge, 2)
    assert "rewards.timeout_s" in hung.error
    assert fine.error == ""
    verifier.release.set()
    judge.close()


def test_a_group_that_was_dropped_is_not_given_out(verifier: Verifier) -> None:
    judge = Verifying({"sums": verifier}, 10.0)
    dropped = group_of(0)
    judge.submit(dropped, ["<answer>2</answer>"])
    judge.revoke([dropped.ref])
    other = group_of(1)
    judge.submit(other, ["<answer>2</answer>"])
    assert [judged.group for judged in collected(judge, 1)] == [other]
    judge.close()


def test_a_report_has_a_score_a_sample_and_no_arrays(verifier: Verifier) -> None:
    judge = Verifying({"sums": verifier}, 10.0)
    judge.submit(group_of(0, samples=2), ["<answer>2</answer>", "<answer>3</answer>"])
    [judged] = collected(judge, 1)
    report, frames = eval_report(judged.group, judged.scores)
    assert (report.rewards, report.arrays, frames) == ([0.5, 0.0], [], [])
    assert (report.oldest, report.newest, report.lengths) == (4, 4, [2, 2])
    judge.close()
