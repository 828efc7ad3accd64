"""A whole recipe, and the checks across its tables."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from shared.config.schema.base import Table
from shared.config.schema.data import DataTable
from shared.config.schema.evaluation import EvaluationTable
from shared.config.schema.machinery import BusTable, JournalTable, TimeoutsTable, WeightsTable
from shared.config.schema.model import ModelTable
from shared.config.schema.outputs import CheckpointTable, MetricsTable
from shared.config.schema.rewards import LengthPart, RewardsTable
from shared.config.schema.run import RunTable
from shared.config.schema.services import EvaluatorTable, PolicyTable, RolloutTable
from shared.config.schema.stages import SftTable, TrainTable

TOKEN_BYTES = 12
"""A sampled token on its way to the policy: its id, its log-probability, the version that sampled it."""


class Recipe(Table):
    """A whole recipe. `[sft]` runs before `[train]`; either may be left out."""

    run: RunTable = Field(default_factory=RunTable)
    model: ModelTable
    data: dict[str, DataTable]
    sft: SftTable | None = None
    train: TrainTable | None = None
    policy: PolicyTable = Field(default_factory=PolicyTable)
    rollout: RolloutTable = Field(default_factory=RolloutTable)
    rewards: RewardsTable = Field(default_factory=RewardsTable)
    evaluation: EvaluationTable | None = None
    evaluator: EvaluatorTable = Field(default_factory=EvaluatorTable)
    metrics: MetricsTable = Field(default_factory=MetricsTable)
    checkpoint: CheckpointTable = Field(default_factory=CheckpointTable)
    weights: WeightsTable = Field(default_factory=WeightsTable)
    bus: BusTable = Field(default_factory=BusTable)
    timeouts: TimeoutsTable = Field(default_factory=TimeoutsTable)
    journal: JournalTable = Field(default_factory=JournalTable)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.sft is None and self.train is None:
            raise ValueError("nothing to do: give [sft], [train] or both")
        named = [(name, t.dataset) for name, t in (("sft", self.sft), ("train", self.train)) if t is not None]
        if self.evaluation is not None:
            named += [(f"evaluation.suites.{name}", self.evaluation.dataset(name)) for name in self.evaluation.suites]
        for name, dataset in named:
            if dataset not in self.data:
                known = ", ".join(sorted(self.data)) or "none"
                raise ValueError(f"{name}.dataset is {dataset!r}, but the [data.NAME] tables are: {known}")
        self._check_evaluation()
        if self.train is not None and self.train.batch_size % self.train.minibatches:
            raise ValueError("train.batch_size must be a multiple of train.minibatches")
        self._check_step_size()
        for part in self.rewards.parts:
            if isinstance(part, LengthPart) and part.max_length - part.cache_length >= self.rollout.max_new_tokens:
                raise ValueError(
                    f"reward part {part.name!r} punishes from {part.max_length - part.cache_length} tokens on, but no "
                    f"completion has more than rollout.max_new_tokens = {self.rollout.max_new_tokens}: lower max_length"
                )
        judging = self.evaluation is not None and self.judge == "rollout"
        if self.rollout.replicas == 0 and (self.train is not None or judging):
            raise ValueError(
                "rollout.replicas = 0 leaves nobody to generate for [train] or judge for [evaluation]: give at least 1"
            )
        if self.rollout.parallel.ranks > 1 and "transformers" in self.rollout.engines:
            raise ValueError('rollout.parallel wants rollout.engine = "vllm" or "sglang"; transformers has one rank')
        if self.rollout.serve is not None and "transformers" in self.rollout.engines:
            raise ValueError('rollout.serve wants rollout.engine = "vllm" or "sglang", which come with a server')
        if self.run.deterministic:
            if self.train is not None and self.train.max_staleness != 0:
                raise ValueError("run.deterministic wants train.max_staleness = 0")
            if self.policy.replicas != 1:
                raise ValueError("run.deterministic wants policy.replicas = 1")
            if self.rollout.replicas > 1:
                raise ValueError("run.deterministic wants rollout.replicas = 1")
            if self.judge == "evaluator" and self.evaluator.replicas != 1:
                raise ValueError("run.deterministic wants evaluator.replicas = 1")
            if self.rollout.engines != ["transformers"]:
                # others put their batches together by the clock
                raise ValueError('run.deterministic wants rollout.engine = "transformers"')
        return self

    def _check_step_size(self) -> None:
        """A step goes to the policy as one message."""
        if self.train is None:
            return
        groups = self.train.batch_size // self.train.minibatches
        needed = groups * self.train.samples * self.rollout.max_new_tokens * TOKEN_BYTES
        if needed > self.bus.max_message_mb << 20:
            raise ValueError(
                f"a step's longest message ({groups} prompts x {self.train.samples} samples x "
                f"{self.rollout.max_new_tokens} tokens x {TOKEN_BYTES} bytes = {math.ceil(needed / (1 << 20))} MB) is "
                f"larger than bus.max_message_mb = {self.bus.max_message_mb}: raise that, raise train.minibatches, or "
                "lower train.batch_size, train.samples or rollout.max_new_tokens"
            )

    def _check_evaluation(self) -> None:
        stop = self.sft.stop if self.sft is not None else None
        if stop is not None and self.evaluation is None:
            raise ValueError("[sft.stop] judges held-out accuracy: give [evaluation] too")
        if stop is not None and self.evaluation is not None and stop.suite not in (None, *self.evaluation.suites):
            known = ", ".join(self.evaluation.suites)
            raise ValueError(f"sft.stop.suite is {stop.suite!r}, but the [evaluation.suites.NAME] tables are: {known}")
        if self.evaluator.engine == "own" and self.evaluation is None:
            raise ValueError('evaluator.engine = "own" wants something to judge: give [evaluation.suites.NAME] too')

    @property
    def judge(self) -> Literal["rollout", "evaluator"]:
        """The role whose replicas judge held-out accuracy."""
        return "evaluator" if self.evaluator.engine == "own" else "rollout"

    @property
    def stop_suite(self) -> str | None:
        """The suite that [sft.stop] looks at; None without such a rule."""
        if self.sft is None or self.sft.stop is None or self.evaluation is None:
            return None
        return self.sft.stop.suite or next(iter(self.evaluation.suites))
