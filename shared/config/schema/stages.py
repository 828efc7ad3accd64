"""[sft] and [train]: the stages of a run, and what both share."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.config.schema.base import LIVE, Positive, Share, Table


class OptimizerTable(Table):
    """What both kinds of training share: AdamW with a schedule of its rate."""

    dataset: str = Field(description="name of a [data.NAME] table")
    batches: Positive = Field(description="batches to train; each makes one new weight version")
    batch_size: Positive = Field(description="prompt groups in a batch, over all replicas")
    lr: float = Field(gt=0, le=1, json_schema_extra=LIVE, description="AdamW learning rate after warm-up")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="after warm-up: the same rate always, or one that falls to 0 at the stage's last batch"
    )
    weight_decay: float = Field(0.0, ge=0, le=1, json_schema_extra=LIVE)
    beta1: Share = 0.9
    beta2: Share = 0.95
    grad_clip: float = Field(1.0, gt=0, json_schema_extra=LIVE, description="largest global gradient norm")


class StopTable(Table):
    """[sft.stop]: end the stage early, when held-out accuracy first reaches a threshold."""

    accuracy: Share
    every: Positive = Field(10, description="batches between evaluations while the rule is watched")
    suite: str | None = Field(None, description="name of the suite that decides; the first one when left out")


class SftTable(OptimizerTable):
    """[sft]: supervised fine-tuning on the data set's worked answers, before RL."""

    stop: StopTable | None = None


class TrainTable(OptimizerTable):
    """[train]: reinforcement learning with GRPO and its DAPO and AIPO options."""

    samples: int = Field(8, ge=2, json_schema_extra=LIVE, description="samples drawn for each prompt")
    mu: Positive = Field(1, description="passes over each batch")
    minibatches: Positive = Field(1, description="optimizer steps that a pass is split into")
    clip_low: Share = Field(0.2, json_schema_extra=LIVE, description="ratio is clipped below 1 - clip_low")
    clip_high: float = Field(0.28, ge=0, json_schema_extra=LIVE, description="ratio is clipped above 1 + clip_high")
    kl_weight: float = Field(0.0, ge=0, json_schema_extra=LIVE, description="weight of KL to the stage's first weights")
    is_correction: Literal["truncate", "mask", "none"] = Field(
        "truncate",
        json_schema_extra=LIVE,
        description="importance weights of trainer to engine: at most is_cap; or 0 outside is_floor..is_cap; or all 1",
    )
    is_level: Literal["token", "sequence"] = Field(
        "token",
        json_schema_extra=LIVE,
        description="importance weights of tokens, or of whole sequences",
    )
    is_floor: float = Field(
        0.5, ge=0, json_schema_extra=LIVE, description="lower edge of the trust band of the weights"
    )
    is_cap: float = Field(2.0, gt=0, json_schema_extra=LIVE, description="upper edge of the trust band of the weights")
    mismatch_warning: float = Field(
        0.1, gt=0, description="mean absolute log-ratio of trainer to engine past which the policy looks for the cause"
    )
    advantage: Literal["group_norm", "unbiased"] = Field(
        "group_norm", description="(r - mean) / (std + eps), or without the std (Dr.GRPO)"
    )
    reduction: Literal["token_mean", "sequence_sum_mean", "sequence_mean_mean", "constant"] = Field(
        "token_mean", description="how token losses become one number; denominators are global"
    )
    filter_equal_rewards: bool = Field(True, description="replace groups whose rewards are all equal (DAPO)")
    filter_limit: Positive = Field(
        50, description="batches' worth of filtered groups in a row after which the run gives up"
    )
    max_staleness: int = Field(
        1, ge=0, le=64, json_schema_extra=LIVE, description="trained version - sampled version never exceeds this"
    )

    @model_validator(mode="after")
    def _trust_band_is_one(self) -> Self:
        if self.is_floor >= self.is_cap:
            raise ValueError(
                f"expected is_floor below is_cap, the edges of the trust band of importance weights; "
                f"got {self.is_floor} and {self.is_cap}"
            )
        return self
