"""Attention over packed lines, registered with transformers under the name PACKED.

A model whose `attn_implementation` is PACKED and that is given `line=` cuts queries, keys and values into the blocks of
the line and computes each with torch's scaled dot-product attention; without `line` it attends as it always does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from services.policy.layouts.collectives import gather_scatter
from services.policy.layouts.grid import Axis
from services.policy.packing import Block

PACKED = "packed"


@dataclass(frozen=True, slots=True)
class Line:
    """What attention has to know of a micro-batch: its blocks, and who else has keys and values of it."""

    blocks: Sequence[Block]
    context: Axis


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    line: Line | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention's answer [1, S, heads, width] to `query` [1, heads, S, width]; `key`, `value` [1, kv_heads, S, width].

    With context parallelism S is this rank's part of the line, and keys and values of the whole line are gathered.
    """
    if line is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    queries = query[0].transpose(0, 1)
    keys, values = (gather_scatter(each[0].transpose(0, 1), line.context, 0) for each in (key, value))
    answers = [_block(queries, keys, values, block, scaling) for block in line.blocks]
    return torch.cat(answers)[None], None


def _block(queries: Tensor, keys: Tensor, values: Tensor, block: Block, scaling: float | None) -> Tensor:
    """One block's answers [tokens, heads, width] in order."""
    rows, count = block.queries.shape
    q = queries[block.queries.flatten()].view(rows, count, *queries.shape[1:]).transpose(1, 2)
    k, v = (
        each[block.keys.flatten()].view(rows, -1, *each.shape[1:]).transpose(1, 2).repeat_interleave(
            queries.shape[1] // each.shape[1], dim=1
        )
        for each in (keys, values)
    )  # fmt: skip
    answer = scaled_dot_product_attention(q, k, v, block.mask, is_causal=block.mask is None, scale=scaling)
    flat = answer.transpose(1, 2).reshape(rows * count, *queries.shape[1:])
    return flat if block.valid is None else flat[block.valid]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
