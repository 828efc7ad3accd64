"""[metrics] and [checkpoint]: what a run leaves behind."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.config.schema.base import LIVE, Positive, Table


class WandbTable(Table):
    """[metrics.wandb]: figures also go to Weights & Biases."""

    project: str = Field("orrery", description="W&B project")
    entity: str | None = Field(None, description="W&B team or user; your default one when left out")
    mode: Literal["online", "offline"] = Field("online", description='"offline" writes files for `wandb sync`')


class MetricsTable(Table):
    """[metrics]: where figures go besides metrics.jsonl and TensorBoard, which are always written."""

    wandb: WandbTable | None = None
    prometheus_port: int = Field(0, ge=0, le=65535, description="port of a Prometheus endpoint; 0: none")
    prometheus_host: str = Field("127.0.0.1", description="address of that endpoint; whoever reaches it may read")


class CheckpointTable(Table):
    """[checkpoint]: when the state is made durable."""

    every: Positive = Field(10, json_schema_extra=LIVE, description="batches between checkpoints")
    keep: Positive = Field(2, description="newest checkpoints kept")
    export: bool = Field(True, description="write a Hugging Face copy at the end")
