"""Shapes of well-known models, so that a plan of them needs neither the hub nor a download.

Each is its model's published config.json (huggingface.co/NAME/blob/main/config.json), cut down to what gives weights
and activations their sizes. A folder, or a copy in the hub's cache, comes first. The tests hold each to the number of
parameters that its model card states.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> Config:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": hidden <= 2048,  # of this generation up to 3B
    }


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int = 8) -> Config:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": hidden <= 2560,  # of this generation up to 4B
    }


_QWEN25_VL_7B: Config = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        **_qwen2(3584, 18944, 28, 28, 4, 152064),
        "model_type": "qwen2_5_vl_text",
        "max_position_embeddings": 128000,
    },
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "tie_word_embeddings": False,
}
_QWEN3_30B_A3B: Config = {
    **_qwen3(2048, 6144, 48, 32, 4),
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "tie_word_embeddings": False,
}

PUBLISHED: dict[str, Config] = {
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, 151936),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, 151936),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 11008, 36, 16, 2, 151936),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2.5-32B": _qwen2(5120, 27648, 64, 40, 8, 152064),
    "Qwen/Qwen2.5-VL-7B": _QWEN25_VL_7B,
    "nvidia/Cosmos-Reason1-7B": _QWEN25_VL_7B,
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B_A3B,
}
"""By name on the hub; -Instruct and -Base models have the shape of the name without it."""


def published(path: str) -> Config | None:
    """The shape of a model of that hub name, if it is one of these."""
    for ending in ("", "-Instruct", "-Base"):
        if path.endswith(ending) and (found := PUBLISHED.get(path.removesuffix(ending))) is not None:
            return found
    return None
