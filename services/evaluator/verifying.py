"""Judges answers to held-out rows by the data set's own verifier: its raw score, whatever the recipe trains on.

Owned by the loop of the evaluator's service. Verifiers are foreign code: they run on a thread of their own; what they
raise becomes an error of the group, and one that takes longer than the limit is left behind with its thread.
Invariant: a group leaves once, scored or with an error; a group that was dropped meanwhile is forgotten.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shared.config.schema import VerifierPart
from shared.data.dataset import Dataset
from shared.messages import LeaseRef
from shared.rewards.base import Sample
from shared.rewards.score import Score, Scorer
from shared.serving.generation import Group


@dataclass(frozen=True, slots=True, eq=False)
class VerifiedGroup:
    """A group whose samples are all judged. `error` is empty when `scores` has one entry a sample."""

    group: Group
    completions: list[str]
    scores: list[Score]
    error: str


class Verifying:
    """Scores groups one after the other on a thread; `timeout_s` is the longest time for one group."""

    def __init__(self, datasets: Mapping[str, Dataset], timeout_s: float) -> None:
        self._datasets = datasets
        self._timeout_s = timeout_s
        self._waiting: dict[LeaseRef, tuple[Group, list[str]]] = {}
        self._worker = _Worker(datasets)
        self._running: tuple[LeaseRef, float] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def groups(self) -> list[Group]:
        """The groups that wait, oldest first."""
        return [group for group, _ in self._waiting.values()]

    def submit(self, group: Group, completions: list[str]) -> None:
        """Have each completion of a finished group judged."""
        self._waiting[group.ref] = (group, completions)
        self._next()

    def collect(self, timeout_s: float = 0.0) -> list[VerifiedGroup]:
        """Groups that are judged by now; waits up to `timeout_s` for one if there is none."""
        done: list[VerifiedGroup] = []
        until = time.monotonic() + timeout_s
        while self._running is not None:
            wait_s = 0.0 if done else max(0.0, until - time.monotonic())
            verdict = self._worker.verdict(wait_s)
            if verdict is None and time.monotonic() - self._running[1] < self._timeout_s:
                break
            if verdict is None:
                verdict = [], f"the verifier took longer than {self._timeout_s:g} s (rewards.timeout_s)"
                self._worker = _Worker(self._datasets)  # nobody can stop a thread: this one is left behind
            ref = self._running[0]
            self._running = None
            known = self._waiting.pop(ref, None)
            if known is not None:
                done.append(VerifiedGroup(known[0], known[1], *verdict))
            self._next()
        return done

    def revoke(self, refs: Iterable[LeaseRef]) -> None:
        """Drop these attempts; unknown ones are ignored."""
        for ref in refs:
            self._waiting.pop(ref, None)

    def close(self) -> None:
        """Judge nothing more."""
        self._worker.close()

    def _next(self) -> None:
        if self._running is None and self._waiting:
            ref, (group, completions) = next(iter(self._waiting.items()))
            self._running = (ref, time.monotonic())
            self._worker.begin(group, completions)


Outcome = tuple[list[Score], str]


class _Worker:
    """A thread that judges one group at a time."""

    def __init__(self, datasets: Mapping[str, Dataset]) -> None:
        self._datasets = datasets
        self._scorer = Scorer([VerifierPart()])
        self._tasks: queue.SimpleQueue[tuple[Group, list[str]] | None] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="verify", daemon=True).start()

    def begin(self, group: Group, completions: list[str]) -> None:
        self._tasks.put((group, completions))

    def verdict(self, timeout_s: float) -> Outcome | None:
        try:
            return self._verdicts.get(timeout_s > 0, timeout_s or None)
        except queue.Empty:
            return None

    def close(self) -> None:
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._verdicts.put(self._judge(*task))

    def _judge(self, group: Group, completions: list[str]) -> Outcome:
        grant = group.grant
        scores: list[Score] = []
        try:
            for completion, finished in zip(completions, group.finished(), strict=True):
                sample = Sample(self._datasets[grant.dataset], grant.row, completion, len(finished.tokens))
                scores.append(self._scorer.score(sample))
        except BaseException as error:  # foreign code: whatever it raises is the row's own trouble
            return [], f"row {grant.row} of data set {grant.dataset!r}: {type(error).__name__}: {error}"
        return scores, ""
