"""Batches and steps: all or nothing.

    batch:  pending -> current -> done -> (settled by a checkpoint, or pending again after a rollback)
    step:   computing -> committed -> applied           computing -> aborted -> computing (next attempt)

A batch is a recorded list of groups, trained in `mu x minibatches` steps. A step is assigned to members, each votes
with its reduced gradients, and only when all have voted yes is the commit journaled and sent; a member lost before that
costs a redo under a new attempt with the groups assigned again, a member lost after it costs nothing but that member.
Batches stay recorded until a checkpoint settles them, so that a rollback can retrain them as they were.

The transition that must not exist: computing -> applied. Nobody applies what was not committed.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.messages import MeshMember

Stage = Literal["sft", "train"]


class Batch(msgspec.Struct):
    """Groups that train together from weights `version` to `version + 1`; `plan` lists the groups of each step in turn.

    With mu passes over m minibatches the plan has mu x m entries. `bound` is the staleness bound it was formed under.
    """

    version: int
    stage: Stage
    plan: list[list[int]]
    bound: int
    index: int = 0

    @property
    def groups(self) -> list[int]:
        """Every group of the batch once, in order."""
        return list(dict.fromkeys(group for part in self.plan for group in part))

    @property
    def over(self) -> bool:
        """Whether every step of the plan has committed."""
        return self.index == len(self.plan)

    def strike(self, groups: list[int]) -> list[int]:
        """Take groups out of the steps to come; those of them that no committed step has trained yet."""
        trained = {group for part in self.plan[: self.index] for group in part}
        gone = set(groups)
        left = [[group for group in part if group not in gone] for part in self.plan[self.index :]]
        self.plan[self.index :] = [part for part in left if part]
        return [group for group in groups if group not in trained]


class Step(msgspec.Struct):
    """One attempt at one optimizer step. `shares` are the groups of each member."""

    step: int
    attempt: int
    state: Literal["computing", "committed"]
    members: list[MeshMember]
    shares: dict[str, list[int]]
    tokens: int
    sequences: int
    revision: int
    deadline: float
    began: float
    mesh: int | None = None
    votes: dict[str, bool] = {}
    metrics: dict[str, dict[str, float]] = {}
    applied: list[str] = []


class Steps(msgspec.Struct):
    """The current batch and step, batches to redo after a rollback, and batches not yet settled."""

    batch: Batch | None = None
    step: Step | None = None
    attempt: int = 0
    pending: list[Batch] = []
    unsettled: list[Batch] = []
    nonfinite: int = 0

    def begin(self, step: Step) -> None:
        """Assign an attempt; its number is fresh, so that votes on an older one are refused."""
        if self.batch is None or self.step is not None:
            raise ValueError("a step begins inside a batch, one at a time")
        self.step = step

    def next_attempt(self) -> int:
        """Attempts count over the whole run: a vote can belong to one attempt only."""
        self.attempt += 1
        return self.attempt

    def vote(self, replica: str, finite: bool, metrics: dict[str, float]) -> Literal["waiting", "all_yes", "no"]:
        """A member's gradients are in hand (or not finite)."""
        step = self._computing()
        step.votes[replica] = finite
        step.metrics[replica] = metrics
        if not finite:
            return "no"
        return "all_yes" if set(step.votes) >= set(step.shares) else "waiting"

    def commit(self) -> None:
        """The step counts; the batch turns to its next one."""
        step = self._computing()
        assert self.batch is not None
        step.state = "committed"
        self.nonfinite = 0
        self.batch.index += 1

    def applied_by(self, replica: str) -> None:
        """A member holds the state after the step."""
        if self.step is not None and replica in self.step.shares and replica not in self.step.applied:
            self.step.applied.append(replica)

    def abort(self) -> Step | None:
        """End the attempt before its commit; the batch waits for another. None when there was nothing to abort."""
        if self.step is None or self.step.state != "computing":
            return None
        step, self.step = self.step, None
        return step

    def drop_member(self, replica: str) -> None:
        """A member was lost after the commit: nobody waits for it."""
        if self.step is not None and self.step.state == "committed":
            self.step.shares.pop(replica, None)
            self.step.applied = [name for name in self.step.applied if name != replica]

    def _computing(self) -> Step:
        if self.step is None or self.step.state != "computing":
            raise ValueError("no step is being computed")
        return self.step
