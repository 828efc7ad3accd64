"""Attention over packed lines, registered with transformers under the name PACKED.

A model whose `attn_implementation` is PACKED and that is given `line=` cuts queries, keys and values into the blocks of
the line and computes each with torch's scaled dot-product attention; without `line` it attends as it always does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    @classmethod
    def of(cls, blocks: Sequence[Block], context: Axis, dtype: torch.dtype) -> Line:
        """The line with masks of `dtype` to add to scores.

        Of a bool one torch makes such a mask in each layer, and keeps them all for backward.
        """
        return cls([replace(b, mask=None if b.mask is None else _added(b.mask, dtype)) for b in blocks], context)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


@torch.compiler.disable
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
    asked = [block.queries for block in line.blocks]
    seen = [block.keys for block in line.blocks]
    parts = zip(_cut(queries, asked), _cut(keys, seen), _cut(values, seen), line.blocks, strict=True)
    answers = [_block(q, k, v, block, scaling) for q, k, v, block in parts]
    return (answers[0] if len(answers) == 1 else torch.cat(answers))[None], None


def _cut(line: Tensor, spans: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
    """Parts of a line that follow each other: in backward one `cat`, where slices would each fill a line with zeros."""
    if (spans[0][0], spans[-1][1]) != (0, line.shape[0]):
        line = line[spans[0][0] : spans[-1][1]]
    if len(spans) == 1:
        return [line]
    parts: Sequence[Tensor] = line.split([stop - start for start, stop in spans])
    return parts


def _block(queries: Tensor, keys: Tensor, values: Tensor, block: Block, scaling: float | None) -> Tensor:
    """One block's answers [tokens, heads, width] in order."""
    q, k, v = (_spread(each, block) for each in (queries, keys, values))
    answer = scaled_dot_product_attention(
        q, k, v, block.mask, is_causal=block.mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    flat = answer.transpose(1, 2).reshape(-1, *queries.shape[1:])
    return flat if block.valid is None else flat.index_select(0, block.valid)


def _spread(tokens: Tensor, block: Block) -> Tensor:
    """Tokens [tokens, heads, width] as rows [b, heads, q or k, width], zeros where a row is shorter."""
    if block.valid is not None:
        padded = tokens.new_zeros((block.rows * block.length, *tokens.shape[1:]))
        tokens = padded.index_copy(0, block.valid, tokens)
    return tokens.reshape(block.rows, -1, *tokens.shape[1:]).transpose(1, 2)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
