"""Small models built from a seed: sizes from [model.build], random weights, no download.

Invariant: the same table and seed give the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from shared.config.schema import BuildTable
from shared.models.errors import ModelError

CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "llama": LlamaConfig,
}


def build_config(table: BuildTable, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The family's configuration with the table's sizes and the tokenizer's vocabulary and end token."""
    if table.heads % table.kv_heads:
        raise ModelError(
            f"[model.build]: expected heads to be a multiple of kv_heads, got {table.heads} and {table.kv_heads}; "
            f"set kv_heads to a divisor of {table.heads}"
        )
    if table.head_dim % 2:
        raise ModelError(f"[model.build]: rotary embeddings want an even head_dim, got {table.head_dim}")
    sizes: dict[str, object] = {
        "hidden_size": table.hidden_size,
        "intermediate_size": table.intermediate_size,
        "num_hidden_layers": table.layers,
        "num_attention_heads": table.heads,
        "num_key_value_heads": table.kv_heads,
        "head_dim": table.head_dim,
        "max_position_embeddings": table.context,
        "tie_word_embeddings": table.tie_embeddings,
    }
    if table.family == "qwen3_moe":
        if table.experts_per_token > table.experts:
            raise ModelError(
                f"[model.build]: expected experts_per_token of at most experts = {table.experts}, "
                f"got {table.experts_per_token}; lower experts_per_token"
            )
        sizes |= {
            "num_experts": table.experts,
            "num_experts_per_tok": table.experts_per_token,
            "moe_intermediate_size": table.intermediate_size,
            "norm_topk_prob": True,
        }
    return CONFIGS[table.family](
        **sizes,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_model(config: PretrainedConfig, seed: int, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A model of `config` with weights drawn in float32 from `seed`; the process's own random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    model.tie_weights()
    # casting the module would also cast the rotary frequencies, which stay float32 in a model that is loaded
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model
