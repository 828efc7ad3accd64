"""Tiny models of the families with weights from a seed, and rows of tokens, some with images."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from services.policy.batch import Row, TrainSequence
from shared.models.images import Pixels

VOCABULARY = 61
"""Odd, so that parts of it are of different sizes."""
IMAGE = VOCABULARY - 1
MERGE = 2
PATCH = 14
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A model in float32, the same in every process. Qwen2 and Qwen2.5-VL have tied embeddings."""
    torch.manual_seed(seed)
    match family:
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False))
        case "qwen3_moe":
            moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **moe, head_dim=8, tie_word_embeddings=False))
        case "qwen2_5_vl":
            vision = {
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
                "window_size": 56, "fullatt_block_indexes": [1], "initializer_range": 0.15,
            }  # fmt: skip
            rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
            return Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(
                    text_config={**SIZES, "rope_parameters": rope, "tie_word_embeddings": True},
                    vision_config=vision,
                    tie_word_embeddings=True,
                    image_token_id=IMAGE,
                    video_token_id=IMAGE - 1,
                    vision_start_token_id=IMAGE - 2,
                    vision_end_token_id=IMAGE - 3,
                )
            )
    raise ValueError(f"expected a family of the table, got {family!r}")


def rows(family: str, count: int = 9, seed: int = 1) -> list[Row]:
    """Rows of different lengths, one to three responses each; of a vision-language model two in three have an image."""
    draw = np.random.default_rng(seed)
    found = []
    for group in range(count):
        prompt = draw.integers(0, VOCABULARY - 4, size=int(draw.integers(2, 9))).astype(np.int32)
        images = None
        if family == "qwen2_5_vl" and group % 3:
            height, width = 2 * MERGE, int(draw.integers(1, 4)) * MERGE
            tokens = height * width // MERGE**2
            values = torch.from_numpy(draw.standard_normal((height * width, 3 * 2 * PATCH**2)).astype(np.float32))
            images = Pixels(values, torch.tensor([[1, height, width]]), ((1, 1 + tokens),))
            prompt = np.concatenate([prompt[:1], np.full(tokens, IMAGE, dtype=np.int32), prompt[1:]])
        responses = []
        for sample in range(int(draw.integers(1, 4))):
            length = int(draw.integers(1, 14))
            tokens_of = draw.integers(0, VOCABULARY - 4, size=length).astype(np.int32)
            logprobs = -draw.random(length).astype(np.float32)
            responses.append(TrainSequence(group, 1, sample, prompt, tokens_of, logprobs, float(draw.normal()), 0.8))
        found.append(Row(tuple(responses), images))
    return found
