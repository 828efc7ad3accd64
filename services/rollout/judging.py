"""Groups that wait for their rewards: every sample of a finished group goes to the rewards pool, and comes back scored.

Owned by the rollout service's loop. Invariant: a group leaves once, with a score for each sample or with the first
error; verdicts on a group that was dropped meanwhile are forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.rollout.generation import Group
from services.rollout.rewards_pool import RewardsPool
from shared.config.schema import RewardPart
from shared.messages import LeaseRef
from shared.rewards.score import Score

VERIFIER_ONLY = (RewardPart(kind="verifier"),)
"""Evaluation groups are worth the verifier's raw score, whatever the recipe trains on."""


@dataclass(slots=True, eq=False)
class JudgedGroup:
    """A group whose samples are all judged. `error` is empty when `scores` has one entry a sample."""

    group: Group
    completions: list[str]
    scores: list[Score]
    error: str


@dataclass(slots=True, eq=False)
class _Waiting:
    group: Group
    completions: list[str]
    scores: list[Score | None]
    errors: list[str]
    missing: int


class Judging:
    """Sends groups through `pool`; train groups are judged by `parts`."""

    def __init__(self, pool: RewardsPool, parts: Sequence[RewardPart]) -> None:
        self._pool = pool
        self._parts = parts
        self._waiting: dict[LeaseRef, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def groups(self) -> list[Group]:
        """The groups that wait, oldest first."""
        return [waiting.group for waiting in self._waiting.values()]

    def submit(self, group: Group, completions: list[str]) -> None:
        """Have each completion of a finished group judged."""
        parts = VERIFIER_ONLY if group.grant.purpose == "eval" else self._parts
        count = len(completions)
        self._waiting[group.ref] = _Waiting(group, completions, [None] * count, [], count)
        for index, completion in enumerate(completions):
            self._pool.submit((group.ref, index), group.grant.dataset, group.grant.row, completion, parts)

    def collect(self, timeout_s: float = 0.0) -> list[JudgedGroup]:
        """Groups whose last sample has been judged; waits up to `timeout_s` for a verdict if there is none.

        Raises `RewardsPoolError` when no worker can be started.
        """
        done: list[JudgedGroup] = []
        for judged in self._pool.collect(timeout_s):
            ref, index = judged.tag
            waiting = self._waiting.get(ref)
            if waiting is None:
                continue
            waiting.scores[index] = judged.score
            waiting.missing -= 1
            if judged.score is None:
                waiting.errors.append(f"sample {index}: {judged.error}")
            if waiting.missing == 0:
                del self._waiting[ref]
                scores = [scored for scored in waiting.scores if scored is not None]
                done.append(JudgedGroup(waiting.group, waiting.completions, scores, "; ".join(waiting.errors)))
        return done

    def revoke(self, refs: Iterable[LeaseRef]) -> None:
        """Drop these attempts; unknown ones are ignored."""
        for ref in refs:
            self._waiting.pop(ref, None)
