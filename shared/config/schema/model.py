"""[model]: the model that learns."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.config.schema.base import Positive, Table


class BuildTable(Table):
    """[model.build]: a small model built from the seed, with a character tokenizer; needs no download."""

    family: Literal["qwen2", "qwen3", "qwen3_moe", "llama"] = "qwen3"
    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 2
    head_dim: Positive = 32
    experts: Positive = 4
    experts_per_token: Positive = 2
    context: Positive = 512
    tie_embeddings: bool = True


class ModelTable(Table):
    """[model]: a Hugging Face folder or name, or a model to build."""

    path: str | None = Field(None, description="local folder or hub name of a Hugging Face causal LM")
    build: BuildTable | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = Field(False, description="run code that comes with the model; off unless you trust it")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.build is None):
            raise ValueError("give exactly one of model.path and [model.build]")
        return self
