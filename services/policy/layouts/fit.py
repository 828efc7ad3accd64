"""Whether a model can have a layout: known from its configuration, before anything of it is loaded."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from shared.models import ModelError
from shared.weights.slices import Architecture, Parallel, check_policy


def architecture_of(config: PretrainedConfig) -> Architecture:
    """What slicing has to know of a model."""
    text: Any = config.get_text_config()
    return Architecture(
        layers=int(text.num_hidden_layers),
        heads=int(text.num_attention_heads),
        kv_heads=int(text.num_key_value_heads),
        experts=int(getattr(text, "num_experts", 0) or 0),
        tied=bool(text.tie_word_embeddings),
    )


def check_fit(config: PretrainedConfig, parallel: Parallel) -> None:
    """ModelError for a layout that a model of this configuration cannot have, with the reason."""
    text: Any = config.get_text_config()
    architecture = architecture_of(config)
    try:
        check_policy(architecture, parallel)
    except ValueError as error:
        raise ModelError(f"[policy.parallel]: {error}") from error
    if parallel.ep > 1 and not architecture.experts:
        raise ModelError(f"policy.parallel.ep: expected a model with experts, got {parallel.ep} ranks; leave ep at 1")
    if parallel.tp > 1 and (getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False)):
        raise ModelError(
            f"policy.parallel.tp: expected a model whose o_proj and down_proj have no bias, which each of "
            f"{parallel.tp} ranks would add; leave tp at 1"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ModelError("expected layers that attend to all that came before, got sliding windows: not supported")
