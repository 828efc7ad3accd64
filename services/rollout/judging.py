"""Groups that wait for their rewards: every sample of a finished group goes to the rewards pool, and comes back scored.

Owned by the rollout service's loop. Invariant: a group leaves once, with a score for each sample or with the first
error; verdicts on a group that was dropped meanwhile are forgotten. Groups that fail one after the other end the run:
a reward that fails on every row would otherwise drain the data set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.rollout.rewards_pool import RewardsPool, RewardsPoolError
from shared.messages import LeaseRef
from shared.rewards.score import Score, weighted
from shared.serving.generation import Group


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
    """Sends groups through `pool`; gives up after `failure_limit` train (or held-out) groups in a row that failed."""

    def __init__(self, pool: RewardsPool, failure_limit: int) -> None:
        self._pool = pool
        self._failure_limit = failure_limit
        self._failed_in_a_row = {True: 0, False: 0}
        self._failure = ""
        self._waiting: dict[LeaseRef, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def groups(self) -> list[Group]:
        """The groups that wait, oldest first."""
        return [waiting.group for waiting in self._waiting.values()]

    def submit(self, group: Group, completions: list[str]) -> None:
        """Have each completion of a finished group judged."""
        held_out = group.grant.purpose == "eval"
        samples = group.finished()
        count = len(completions)
        self._waiting[group.ref] = _Waiting(group, completions, [None] * count, [], count)
        for index, completion in enumerate(completions):
            self._pool.submit(
                (group.ref, index),
                group.grant.dataset,
                group.grant.row,
                completion,
                tokens=len(samples[index].tokens),
                held_out=held_out,
            )

    def collect(self, timeout_s: float = 0.0) -> list[JudgedGroup]:
        """Groups whose last sample has been judged; waits up to `timeout_s` for a verdict if there is none.

        Raises `RewardsPoolError` when no worker can be started, or after too many failures in a row (once the groups
        that failed have been given out); `RecipeError` when the recipe's rewards cannot be made here.
        """
        if self._failure:
            raise RewardsPoolError(self._failure)
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
                weights = waiting.group.grant.reward_weights
                scores = [weighted(scored, weights) for scored in waiting.scores if scored is not None]
                done.append(JudgedGroup(waiting.group, waiting.completions, scores, _first_of(waiting.errors)))
                self._count(done[-1])
        return done

    def revoke(self, refs: Iterable[LeaseRef]) -> None:
        """Drop these attempts; unknown ones are ignored."""
        for ref in refs:
            self._waiting.pop(ref, None)

    def _count(self, judged: JudgedGroup) -> None:
        held_out = judged.group.grant.purpose == "eval"
        self._failed_in_a_row[held_out] = self._failed_in_a_row[held_out] + 1 if judged.error else 0
        if self._failed_in_a_row[held_out] >= self._failure_limit:
            kind = "held-out groups" if held_out else "prompt groups"
            self._failure = (
                f"the rewards of {self._failed_in_a_row[held_out]} {kind} in a row failed (rewards.failure_limit = "
                f"{self._failure_limit}); the last: {judged.error}"
            )


def _first_of(errors: list[str]) -> str:
    """One error of a group for all; empty without errors."""
    others = len(errors) - 1
    return f"{errors[0]} ({others} more of this group failed)" if others > 0 else "".join(errors)
