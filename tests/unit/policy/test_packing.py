"""Packed micro-batches: what is in them, and what attends to what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config, Qwen3ForCausalLM

from services.policy.attention import Line, packed_attention
from services.policy.batch import Row, TrainSequence, rows_of, sequences_of
from services.policy.layouts.grid import Axis
from services.policy.packing import Block, MicroBatch, pack, share_out
from shared.models.images import Pixels

WIDTH = 128
ALONE = Axis(1, 0, None)


def rows(tools: Any, limit: int = 1000, **named: Any) -> list[Row]:
    return rows_of(sequences_of(*tools.step(tools.recipe(), **named)), limit, WIDTH)


def row_of(length: int, name: int = 0) -> Row:
    """A row of that many tokens, one of them a prompt's."""
    tokens = np.arange(1, length, dtype=np.int32)
    return Row((TrainSequence(name, 1, 0, np.zeros(1, np.int32), tokens, -np.ones(length - 1, np.float32), 1.0, 1.0),))


def seen_by(micro: MicroBatch, blocks: list[Block], first: int) -> list[list[int]]:
    """For each place whose answer the blocks give, in their order, the places that attention shows it."""
    found = []
    for block in blocks:
        count, keys = block.queries.shape[1], block.keys.shape[1]
        mask = block.mask
        if mask is None:
            mask = torch.ones(count, keys).tril().bool().expand(len(block.keys), 1, -1, -1)
        shown = [
            (int(block.queries[row, query]) + first, block.keys[row][mask[row, 0, query]].tolist())
            for row in range(len(block.keys))
            for query in range(count)
        ]
        found += shown if block.valid is None else [shown[index] for index in block.valid.tolist()]
    assert [place for place, _ in found] == list(range(first, first + len(found)))
    return [places for _, places in found]


@pytest.mark.parametrize("limit", [1000, 25])
def test_each_response_token_is_predicted_by_what_comes_before_it_in_its_own_sequence(tools: Any, limit: int) -> None:
    made = rows(tools, limit, samples=4)
    expected = [
        [*s.prompt.tolist(), *s.tokens.tolist()][: at + 1]
        for row in made
        for s in row.responses
        for at in range(len(s.prompt), len(s.prompt) + len(s.tokens))
    ]
    seen = []
    for row in made:
        micro = pack([row, row_of(5)])
        shown = seen_by(micro, micro.blocks, 0)
        for place, target in zip(micro.picks.tolist(), micro.targets.tolist(), strict=True):
            order = micro.positions[shown[place]]
            assert sorted(order.tolist()) == list(range(len(order)))  # what it sees, once each, where it belongs
            if place < micro.starts[1] or row.length < 5:
                seen.append([*micro.inputs[shown[place]].tolist(), target])
    assert [each for each in seen if each in expected] == expected


def test_a_line_has_all_rows_the_longest_first_and_no_padding(tools: Any) -> None:
    made = rows(tools, groups=5)
    micro = pack(made[::-1])
    assert micro.size == sum(row.length for row in made) == micro.starts[-1]
    lengths = np.diff(micro.starts).tolist()
    assert lengths == sorted(lengths, reverse=True)
    tokens = np.concatenate([s.tokens for row in made for s in row.responses])
    assert sorted(micro.targets.tolist()) == sorted(tokens.tolist())
    assert micro.tokens == len(micro.picks) == int(micro.lengths.sum()) == len(micro.engine_logprobs)


def test_padding_to_a_multiple_is_a_row_of_its_own_that_nobody_sees() -> None:
    micro = pack([row_of(9), row_of(4)], multiple=8)
    assert micro.size == 16 and micro.starts == (0, 9, 13, 16)
    assert all(place >= 13 for shown in seen_by(micro, micro.blocks, 0)[13:] for place in shown)
    assert max(micro.picks.tolist()) < 13


def test_no_rows_are_a_line_of_padding_that_teaches_nothing() -> None:
    micro = pack([], multiple=4)
    assert (micro.size, micro.tokens) == (4, 0)
    assert pack([], at_least=6, multiple=4).size == 8


@pytest.mark.parametrize("cut", [1, 7, 12, 20])
def test_ranks_that_share_a_line_see_what_one_sees(tools: Any, cut: int) -> None:
    micro = pack([*rows(tools, samples=3), row_of(6)])
    whole = seen_by(micro, micro.blocks, 0)
    parts = [seen_by(micro, micro.blocks_between(*ends), ends[0]) for ends in ((0, cut), (cut, micro.size))]
    assert [*parts[0], *parts[1]] == whole


def test_an_image_has_positions_in_time_height_and_width_and_text_counts_on_behind_it() -> None:
    values, grids = torch.zeros(24, 4), torch.tensor([[1, 4, 6]])
    prompt = np.zeros(1 + 6 + 2, np.int32)
    response = TrainSequence(0, 1, 0, prompt, np.ones(2, np.int32), -np.ones(2, np.float32), 1.0, 1.0)
    micro = pack([Row((response,), Pixels(values, grids, ((1, 7),)))], merge=2)
    assert micro.positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 7],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert micro.pixels is not None and micro.pixels.shape == (24, 4)


@pytest.mark.parametrize("ways", [1, 2, 3])
def test_rows_are_shared_out_evenly_and_none_is_lost(ways: int) -> None:
    lengths = [int(n) for n in np.random.default_rng(3).lognormal(3, 1, size=60)]
    made = [row_of(2 + length, number) for number, length in enumerate(lengths)]
    limit = max(row.length for row in made)
    shares = share_out(made, limit, ways)
    assert len({len(share) for share in shares}) == 1, "all ranks have as many micro-batches"
    bins = [micro for share in shares for micro in share]
    assert sorted(row.responses[0].group for micro in bins for row in micro) == list(range(60))
    tokens = [sum(row.length for row in micro) for micro in bins]
    assert max(tokens) <= limit
    several = [sum(row.length for row in micro) for micro in bins if len(micro) > 1]
    assert max(several) - min(several) < 0.05 * limit
    assert share_out(made, limit, ways) == shares


def test_a_row_longer_than_the_limit_makes_a_micro_batch_of_its_own() -> None:
    shares = share_out([row_of(50), row_of(3), row_of(4)], 10)
    assert [[row.length for row in micro] for micro in shares[0] if len(micro)] == [[50], [4, 3]]


def test_no_rows_make_no_micro_batches() -> None:
    assert share_out([], 10, 2) == [[], []]


@pytest.mark.parametrize("samples", [1, 3], ids=["one response a row", "shared prompts"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_is_that_of_each_row_alone(tools: Any, kv_heads: int, samples: int) -> None:
    micro = pack([*rows(tools, samples=samples, groups=5), row_of(30)])
    draw = torch.Generator().manual_seed(1)
    shapes = [(1, heads, micro.size, 8) for heads in (4, kv_heads, kv_heads)]
    packed = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    plain = [each.detach().clone().requires_grad_() for each in packed]
    module = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, hidden_size=8, num_hidden_layers=1)).model.layers[0].self_attn
    answer, _ = packed_attention(module, *packed, None, scaling=0.3, line=Line(micro.blocks, ALONE))
    parts = micro.parts
    same = torch.zeros(micro.size, micro.size, dtype=torch.bool)
    for start, stop in zip(micro.starts, micro.starts[1:], strict=False):
        same[start:stop, start:stop] = True
    seen = same & ((parts[:, None] == parts[None]) | (parts[None] == 0)) & torch.ones_like(same).tril()
    query, key, value = plain
    wide = [each.repeat_interleave(4 // kv_heads, dim=1) for each in (key, value)]
    expected = scaled_dot_product_attention(query, *wide, seen, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(answer, expected)
    upstream = torch.randn(answer.shape, generator=draw, dtype=torch.float64)
    answer.backward(upstream)
    expected.backward(upstream)
    for own, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(own.grad, other.grad)
