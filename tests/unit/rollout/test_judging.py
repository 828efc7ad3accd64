"""Groups on their way through the rewards: what one failure costs, and when failures end the run."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from services.rollout.judging import JudgedGroup, Judging
from services.rollout.reporting import group_report
from services.rollout.rewards_pool import Judged, RewardsPool, RewardsPoolError
from shared.engines.base import Finished
from shared.messages import Grant, LeaseRef, Purpose, Sampling
from shared.rewards.score import Score
from shared.serving.generation import Group


class Pool:
    """Judges as the test says: a completion is its error, or a score if it is empty."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Any, ...]] = []
        self._judged: list[Judged] = []

    def submit(self, tag: Any, dataset: str, row: int, completion: str, *, tokens: int, held_out: bool) -> None:
        self.submitted.append((dataset, row, tokens, held_out))
        self._judged.append(Judged(tag, None if completion else Score(1.0, {"verifier": 1.0}), completion))

    def collect(self, timeout_s: float) -> list[Judged]:
        judged, self._judged = self._judged, []
        return judged


def a_group(number: int, samples: int, purpose: Purpose = "train") -> Group:
    sampling = Sampling(1.0, 1.0, 0, 10)
    grant = Grant(
        group=number, attempt=1, lineage=1, purpose=purpose, dataset="sums", fingerprint="f", epoch=0, row=number + 10,
        seed=0, samples=samples, sampling=sampling, revision=0, version=0, deadline_s=60.0,
    )  # fmt: skip
    finished = [
        Finished(
            key=(number, 1), sample=index, tokens=np.zeros(index + 1, np.int32), truncated=False,
            logprobs=np.zeros(index + 1, np.float32), versions=np.zeros(index + 1, np.int32),
        )
        for index in range(samples)
    ]  # fmt: skip
    return Group(grant, [1, 2], 0.0, list(finished))


@pytest.fixture
def pool() -> Pool:
    return Pool()


def judged(judging: Judging, *groups: tuple[Group, list[str]]) -> list[JudgedGroup]:
    for group, completions in groups:
        judging.submit(group, completions)
    return judging.collect()


def test_each_sample_is_judged_with_its_row_and_length(pool: Pool) -> None:
    judging = Judging(cast(RewardsPool, pool), 2)
    judged(judging, (a_group(1, 2), ["", ""]), (a_group(2, 1, "eval"), [""]))
    assert pool.submitted == [("sums", 11, 1, False), ("sums", 11, 2, False), ("sums", 12, 1, True)]


def test_a_group_that_failed_tells_one_error_for_all(pool: Pool) -> None:
    judging = Judging(cast(RewardsPool, pool), 2)
    (one, other) = judged(judging, (a_group(1, 3), ["", "too slow", "too late"]), (a_group(2, 1), [""]))
    assert one.error == "sample 1: too slow (1 more of this group failed)"
    assert (other.error, len(other.scores)) == ("", 1)


def test_failures_in_a_row_end_the_run_once_their_groups_are_out(pool: Pool) -> None:
    judging = Judging(cast(RewardsPool, pool), 2)
    failed = judged(judging, (a_group(1, 1), ["no"]), (a_group(2, 1), ["no such luck"]))
    assert [group.group.ref for group in failed] == [LeaseRef(1, 1), LeaseRef(2, 1)]
    with pytest.raises(RewardsPoolError, match=r"of 2 prompt groups in a row failed.*failure_limit = 2.*luck"):
        judging.collect()


def test_a_success_between_failures_goes_on_but_a_held_out_one_does_not_count(pool: Pool) -> None:
    judging = Judging(cast(RewardsPool, pool), 2)
    judged(judging, (a_group(1, 1), ["no"]), (a_group(2, 1), [""]), (a_group(3, 1), ["no"]))
    assert judging.collect() == []
    judged(judging, (a_group(4, 1, "eval"), [""]), (a_group(5, 1), ["no"]))
    with pytest.raises(RewardsPoolError, match="2 prompt groups in a row"):
        judging.collect()


def test_a_number_that_a_function_named_for_some_samples_only_is_zero_in_the_others() -> None:
    scores = [Score(1.0, {"mine": 1.0, "mine/right": 1.0}), Score(0.0, {"mine": 0.0, "mine/short": 0.0})]
    report, _ = group_report(a_group(1, 2), scores)
    assert report.parts == {"mine": [1.0, 0.0], "mine/right": [1.0, 0.0], "mine/short": [0.0, 0.0]}
