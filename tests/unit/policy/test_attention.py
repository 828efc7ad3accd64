"""Packed attention equals torch's own on each row apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from services.policy.attention import Line, packed_attention
from services.policy.layouts.grid import Axis
from services.policy.packing import MicroBatch

ALONE = Axis(1, 0, None)
WIDTH, SCALE = 8, 0.3
PLAIN = ((1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1), (1,))
SHARED = ((0, 0, 1, 1, 2, 2, 2), (0, 1, 2, 2, 3, 3), (0, 0, 0, 1, 1, 2), (0, 1, 1), (0,))
"""Which response of its row each token is of, 0 for the prompt, row after row."""


def line_of(rows: tuple[tuple[int, ...], ...]) -> MicroBatch:
    """A micro-batch of which attention asks nothing but the rows and their parts."""
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    none, few = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    parts = torch.tensor([part for row in rows for part in row])
    return MicroBatch(parts, parts, parts, tuple(starts), none, none, none, few, few, few, ())


def apart(query: Tensor, key: Tensor, value: Tensor, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """[1, S, heads, width]: each row alone, each head with its own keys, under a mask written as loops."""
    copies = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(copies, dim=1) for each in (key, value))
    answers, start = [], 0
    for row in rows:
        here = slice(start, start + len(row))
        start = here.stop
        mask = torch.tensor([[j <= i and row[j] in (0, row[i]) for j in range(len(row))] for i in range(len(row))])
        q, k, v = (each[:, :, here] for each in (query, key, value))
        answers.append(scaled_dot_product_attention(q, k, v, mask, scale=SCALE))
    return torch.cat(answers, dim=2).transpose(1, 2)


def inputs(tokens: int, heads: int, kv_heads: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    shapes = [(1, count, tokens, WIDTH) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rows", [PLAIN, SHARED, PLAIN + SHARED], ids=["plain", "shared-prompts", "both"])
def test_answers_and_gradients_are_those_of_each_row_apart(rows: tuple[tuple[int, ...], ...], kv_heads: int) -> None:
    micro = line_of(rows)
    assert len(micro.blocks) > 2 and any(block.valid is not None for block in micro.blocks)
    packed = inputs(micro.size, 4, kv_heads)
    plain = [each.detach().clone().requires_grad_() for each in packed]
    line = Line.of(micro.blocks, ALONE, torch.float64)
    answer, _ = packed_attention(nn.Identity(), *packed, None, scaling=SCALE, line=line)
    expected = apart(plain[0], plain[1], plain[2], rows)
    torch.testing.assert_close(answer, expected, atol=1e-12, rtol=0)
    upstream = torch.randn(answer.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    answer.backward(upstream)
    expected.backward(upstream)
    for own, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [PLAIN, SHARED], ids=["plain", "shared-prompts"])
def test_queries_of_a_part_get_the_answers_they_get_in_the_whole_line(rows: tuple[tuple[int, ...], ...]) -> None:
    micro = line_of(rows)
    query, key, value = inputs(micro.size, 4, 2)
    whole, _ = packed_attention(
        nn.Identity(), query, key, value, None, line=Line.of(micro.blocks, ALONE, torch.float64)
    )
    for first, last in ((0, 4), (4, 15), (15, micro.size)):
        line = Line.of(micro.blocks_between(first, last), ALONE, torch.float64)
        answer, _ = packed_attention(nn.Identity(), query[:, :, first:last], key, value, None, line=line)
        torch.testing.assert_close(answer, whole[:, first:last], atol=1e-12, rtol=0)


def test_without_a_line_it_is_the_attention_that_a_model_has_by_itself() -> None:
    query, key, value = inputs(6, 4, 4)
    module = nn.Identity()
    module.is_causal = True
    answer, _ = packed_attention(module, query, key, value, None, scaling=SCALE)
    torch.testing.assert_close(answer, apart(query, key, value, ((1,) * 6,)), atol=1e-12, rtol=0)
