"""[policy], [rollout] and [evaluator]: the services of a run, their number and what each may use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.config.schema.base import LIVE, Positive, Table


class PolicyTable(Table):
    """[policy]: who learns."""

    replicas: Literal[1] = Field(1, description="policy replicas; more than one is not built yet")
    threads: Positive = Field(1, description="CPU threads of the trainer")
    micro_batch_tokens: Positive = Field(16384, description="padded tokens in one forward pass")


class RolloutTable(Table):
    """[rollout]: who generates, and how."""

    replicas: Positive = 1
    engine: Literal["transformers"] = "transformers"
    threads: Positive = Field(1, description="CPU threads of the engine")
    slots: Positive = Field(64, description="sequences decoded side by side")
    temperature: float = Field(1.0, gt=0, le=10, json_schema_extra=LIVE)
    top_p: float = Field(1.0, gt=0, le=1, json_schema_extra=LIVE)
    top_k: int = Field(0, ge=0, json_schema_extra=LIVE)
    max_new_tokens: Positive = Field(64, json_schema_extra=LIVE)


class EvaluatorTable(Table):
    """[evaluator]: who judges held-out accuracy."""

    engine: Literal["fleet", "own"] = Field(
        "fleet", description='"fleet": the rollouts judge between their samples; "own": replicas that do nothing else'
    )
    replicas: Positive = Field(1, description='replicas of the evaluator service with engine = "own"')
    threads: Positive = Field(1, description="CPU threads of an evaluator")
    slots: Positive = Field(64, description="sequences decoded side by side")
