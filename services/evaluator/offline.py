"""Judging a model without a run: the same engine, prompts and verifier as an evaluator's, in one process.

Called by `orrery eval`. Invariant: every problem ends in the result, answered or counted as wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.evaluator.verifying import VerifiedGroup, Verifying
from shared.config.schema import SuiteTable
from shared.data.dataset import Dataset
from shared.engines.load import stop_tokens
from shared.engines.transformers import TransformersEngine
from shared.intervals import wilson_interval
from shared.messages import Grant, Sampling
from shared.serving.generation import Generation, GrantRejected, Group
from shared.serving.samples import completion_text

AHEAD = 2
"""Sequences prepared per engine slot, so that a freed one never waits."""
NOT_JUDGED = "not judged"


@dataclass(frozen=True, slots=True)
class Problem:
    """What became of one row: its samples' texts and scores, or the `error` why there are none."""

    row: int
    completions: list[str]
    scores: list[float]
    correct: float
    category: str
    error: str = ""


@dataclass
class Judgement:
    """What a model did on a suite; `problems` are in the order of the rows."""

    suite: str
    problems: list[Problem] = field(default_factory=list)
    tokens: int = 0
    truncated: int = 0
    seconds: float = 0.0

    @property
    def errors(self) -> list[str]:
        """Why some rows could not be judged."""
        return [problem.error for problem in self.problems if problem.error]

    def figures(self, category: str | None = None) -> dict[str, object]:
        """n, correct, accuracy and its 95 % interval, of all problems or of one category."""
        chosen = [p.correct for p in self.problems if category is None or p.category == category]
        correct = sum(chosen)
        low, high = wilson_interval(correct, len(chosen))
        return {"n": len(chosen), "correct": correct, "accuracy": correct / len(chosen), "interval": [low, high]}

    @property
    def categories(self) -> list[str]:
        """The categories that occur, in order."""
        return sorted({problem.category for problem in self.problems if problem.category})

    def record(self) -> dict[str, object]:
        """As a run's eval/*.json has it, as far as there is such a thing without a run."""
        return {
            "suite": self.suite,
            **self.figures(),
            "by_category": {name: self.figures(name) for name in self.categories},
            "not_judged": len(self.errors),
            "truncated": self.truncated,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


def judge_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    suite: SuiteTable,
    dataset: Dataset,
    *,
    slots: int,
    seed: int,
    timeout_s: float,
    progress: Callable[[Judgement, int], None] = lambda judgement, total: None,
) -> Judgement:
    """Answer the suite's problems and judge them; `progress` hears of the result so far, and of how many there will be.

    `timeout_s` is the longest time for the verifier on one problem. Raises DataError when nothing can be asked at all.
    """
    started = time.monotonic()
    engine = TransformersEngine(model, slots=slots, stops=stop_tokens(tokenizer, model.generation_config))
    engine.version = 0
    judge = Verifying({name: dataset}, timeout_s)
    work = _Work(name, suite, dataset, tokenizer, Generation(engine, tokenizer, {name: dataset}, deterministic=False))
    rows = min(suite.problems, len(dataset))
    waiting = list(reversed(range(rows)))
    try:
        while len(work.done) < rows:
            while waiting and work.running * suite.samples < AHEAD * slots:
                work.ask(waiting.pop(), seed)
            for group in work.generation.advance():
                judge.submit(group, work.completions(group))
            busy = len(work.generation) > 0
            for verified in judge.collect(0.0 if busy else 0.05):
                work.take(verified)
            progress(work.judgement(started), rows)
    finally:
        judge.close()
        engine.close()
    return work.judgement(started)


class _Work:
    """The problems in flight and those that are done."""

    def __init__(
        self,
        name: str,
        suite: SuiteTable,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        generation: Generation,
    ) -> None:
        self.generation = generation
        self.done: dict[int, Problem] = {}
        self.running = 0
        self._name, self._suite, self._dataset, self._tokenizer = name, suite, dataset, tokenizer
        self._tokens = self._truncated = 0

    def ask(self, row: int, seed: int) -> None:
        """Have a row answered, or note why it cannot be."""
        suite = self._suite
        grant = Grant(
            group=row,
            attempt=1,
            lineage=0,
            purpose="eval",
            dataset=self._name,
            fingerprint=self._dataset.identity.fingerprint,
            epoch=0,
            row=row,
            seed=seed * 1_000_003 + row,
            samples=suite.samples,
            sampling=Sampling(suite.temperature, suite.top_p, suite.top_k, suite.max_new_tokens),
            revision=0,
            version=0,
            deadline_s=0.0,
            suite=self._name,
        )
        try:
            group = self.generation.prepare(grant)
        except GrantRejected as rejected:
            self.done[row] = Problem(row, [], [], 0.0, NOT_JUDGED if suite.category else "", str(rejected))
            return
        self.running += 1
        self.generation.start([group])

    def completions(self, group: Group) -> list[str]:
        """The texts of a finished group."""
        samples = group.finished()
        self._tokens += sum(len(sample.tokens) for sample in samples)
        self._truncated += sum(sample.truncated for sample in samples)
        return [completion_text(self._tokenizer, sample.tokens, sample.truncated) for sample in samples]

    def take(self, verified: VerifiedGroup) -> None:
        """A group is scored, or could not be."""
        row, suite = verified.group.grant.row, self._suite
        self.running -= 1
        if verified.error:
            category = NOT_JUDGED if suite.category else ""
            self.done[row] = Problem(row, verified.completions, [], 0.0, category, verified.error)
            return
        category = self._dataset.category(row, suite.category) if suite.category else ""
        scores = [scored.total for scored in verified.scores]
        correct = sum(score >= suite.correct_at - 1e-9 for score in scores) / len(scores)
        self.done[row] = Problem(row, verified.completions, scores, correct, category)

    def judgement(self, started: float) -> Judgement:
        """The result so far."""
        problems = [problem for _, problem in sorted(self.done.items())]
        seconds = time.monotonic() - started
        return Judgement(self._name, problems, self._tokens, self._truncated, seconds)
