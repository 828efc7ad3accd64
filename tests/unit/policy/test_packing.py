"""Rows in lines without padding: who gets which, what predicts what, and what attention sees in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from services.policy.batch import Row, TrainSequence
from services.policy.packing import Block, MicroBatch, pack, share_out
from shared.models.images import Pixels

LENGTHS = ((3, (4, 2)), (6, (5,)), (2, (1, 1, 7)), (9, (1,)), (4, (8, 3)), (1, (1,)), (1, (2,)))
"""Tokens of a row's prompt and of its responses."""


def make_rows(lengths: Sequence[tuple[int, Sequence[int]]] = LENGTHS) -> list[Row]:
    """Rows of which no token is like another."""
    found, token = [], 1
    for group, (prompt_length, responses) in enumerate(lengths):
        prompt = np.arange(token, token + prompt_length, dtype=np.int32)
        token += prompt_length
        samples = []
        for sample, length in enumerate(responses):
            tokens = np.arange(token, token + length, dtype=np.int32)
            token += length
            logprobs = (-tokens / 100).astype(np.float32)
            samples.append(TrainSequence(group, 1, sample, prompt, tokens, logprobs, sample + 0.5, 1.0 + group, "r"))
        found.append(Row(tuple(samples)))
    return found


def long_tail(count: int = 64, seed: int = 0) -> list[Row]:
    lengths = np.random.default_rng(seed).lognormal(3.0, 0.8, count).astype(int) + 1
    return make_rows([(2, (int(length),)) for length in lengths])


def size(rows: Sequence[Row]) -> int:
    return sum(row.length for row in rows)


def names(shares: list[list[list[Row]]]) -> list[list[list[int]]]:
    return [[[row.responses[0].group for row in rows] for rows in way] for way in shares]


def seen(micro: MicroBatch, first: int = 0, last: int | None = None) -> list[list[int]]:
    """For each place from `first` on, the places that attention shows it, from what the blocks say."""
    found = []
    for block in micro.blocks_between(first, micro.size if last is None else last):
        keys, queries = places(block, block.keys), places(block, block.queries)
        for row in range(block.rows):
            for column, query in enumerate(queries[row]):
                if query < 0:
                    continue
                before = int((keys[row] == query + first).nonzero()) + 1
                visible = torch.arange(block.length) < before if block.mask is None else block.mask[row, 0, column]
                found.append(keys[row][visible].tolist())
    return found


def places(block: Block, span: tuple[int, int]) -> torch.Tensor:
    """The places of a span as the block's rows [b, q or k], -1 on padding."""
    line = torch.arange(*span)
    if block.valid is None:
        return line.view(block.rows, -1)
    return torch.full((block.rows * block.length,), -1).index_copy(0, block.valid, line).view(block.rows, -1)


# --- who gets which row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 12, 20, 1000])
def test_every_row_is_given_to_one_way_and_all_have_as_many_micro_batches(limit: int, ways: int) -> None:
    shares = share_out(make_rows(), limit, ways)
    assert len(shares) == ways
    assert len({len(way) for way in shares}) == 1
    given = sorted(number for way in names(shares) for rows in way for number in rows)
    assert given == list(range(len(LENGTHS)))


@pytest.mark.parametrize("limit", [12, 20, 40])
def test_no_micro_batch_has_more_tokens_than_the_limit_but_for_a_single_row(limit: int) -> None:
    for rows in (rows for way in share_out(make_rows(), limit, 2) for rows in way):
        assert size(rows) <= limit or len(rows) == 1


def test_micro_batches_have_about_equal_numbers_of_tokens() -> None:
    sizes = [size(rows) for way in share_out(long_tail(), 400, 2) for rows in way]
    assert len(sizes) > 4
    assert max(sizes) - min(sizes) < 0.1 * max(sizes)


def test_tokens_that_fit_are_not_spread_over_more_micro_batches_than_they_fill() -> None:
    rows = long_tail()
    shares = share_out(rows, 400)
    assert len(shares[0]) <= -(-size(rows) // 400) + 1


@pytest.mark.parametrize("ways", [1, 2, 3])
def test_rows_longer_than_the_limit_are_spread_over_no_more_micro_batches_than_there_are_rows(ways: int) -> None:
    shares = share_out(make_rows(), 1, ways)
    assert len(shares[0]) == -(-len(LENGTHS) // ways)


def test_sharing_out_depends_on_the_rows_alone() -> None:
    assert names(share_out(long_tail(), 300, 3)) == names(share_out(long_tail(), 300, 3))


def test_of_no_rows_each_way_gets_no_micro_batch() -> None:
    assert share_out([], 100, 3) == [[], [], []]


# --- the line -------------------------------------------------------------------------------------------------------


def test_a_line_has_the_tokens_of_its_rows_longest_first_and_no_others() -> None:
    rows = make_rows()
    micro = pack(rows)
    longest_first = sorted(rows, key=lambda row: -row.length)
    expected = [np.concatenate([row.prompt, *(s.tokens for s in row.responses)]) for row in longest_first]
    assert micro.inputs.tolist() == np.concatenate(expected).tolist()
    assert np.diff(micro.starts).tolist() == [len(each) for each in expected]


def test_what_belongs_to_each_response_token_stands_in_the_order_of_the_targets() -> None:
    rows = make_rows()
    micro = pack(rows)
    responses = [s for row in sorted(rows, key=lambda row: -row.length) for s in row.responses]
    assert micro.targets.tolist() == np.concatenate([s.tokens for s in responses]).tolist()
    assert micro.lengths.tolist() == [len(s.tokens) for s in responses]
    assert micro.tokens == sum(len(s.tokens) for s in responses)
    torch.testing.assert_close(micro.engine_logprobs, torch.from_numpy(np.concatenate([s.logprobs for s in responses])))
    for found, name in ((micro.advantages, "advantage"), (micro.temperatures, "temperature")):
        assert found.tolist() == [getattr(s, name) for s in responses for _ in s.tokens]


@pytest.mark.parametrize("multiple", [1, 4, 7])
@pytest.mark.parametrize("limit", [1, 12, 20, 1000])
def test_each_response_token_is_predicted_by_what_comes_before_it_in_its_own_sequence(
    limit: int, multiple: int
) -> None:
    rows = make_rows()
    found = []
    for members in share_out(rows, limit)[0]:
        micro = pack(members, multiple)
        visible = seen(micro)
        for place, target in zip(micro.picks.tolist(), micro.targets.tolist(), strict=True):
            context = visible[place]
            assert micro.positions[context].tolist() == list(range(len(context)))  # once each, where it belongs
            found.append([*micro.inputs[context].tolist(), target])
    sequences = [[*row.prompt.tolist(), *s.tokens.tolist()] for row in rows for s in row.responses]
    prompts = [len(s.prompt) for row in rows for s in row.responses]
    expected = [s[: at + 1] for s, p in zip(sequences, prompts, strict=True) for at in range(p, len(s))]
    assert sorted(found) == sorted(expected)


def test_padding_to_a_multiple_is_a_row_of_its_own_and_never_reaches_the_arrays() -> None:
    rows = make_rows()
    plain, padded = pack(rows), pack(rows, 8, at_least=size(rows) + 9)
    assert padded.size % 8 == 0
    assert padded.size >= plain.size + 9
    assert padded.starts == (*plain.starts, padded.size)
    for name in ("picks", "targets", "lengths", "advantages", "engine_logprobs", "temperatures"):
        assert torch.equal(getattr(padded, name), getattr(plain, name))
    assert seen(padded)[: plain.size] == seen(plain)
    assert all(min(places) >= plain.size for places in seen(padded)[plain.size :])


def test_a_line_of_no_rows_is_padding_that_can_be_computed() -> None:
    micro = pack([], 4)
    assert (micro.size, micro.tokens, len(micro.lengths)) == (4, 0, 0)
    assert seen(micro) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_positions_go_on_from_an_image_in_time_height_and_width() -> None:
    (row,) = make_rows([(8, (2, 1))])
    # the tokens 2 to 6 of the prompt are an image of 4 x 4 patches, four of which make a token
    pixels = Pixels(torch.ones(16, 3), torch.tensor([[1, 4, 4]]), ((2, 6),))
    plain = make_rows([(3, (4,))])
    micro = pack([*plain, Row(row.responses, pixels)], merge=2)
    time, height, width = micro.positions.tolist()
    assert time[:11] == [0, 1, 2, 2, 2, 2, 4, 5, 6, 7, 6]
    assert height[:11] == [0, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6]
    assert width[:11] == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 6]
    assert time[11:] == height[11:] == width[11:] == list(range(7))
    assert micro.pixels is not None and micro.pixels.shape == (16, 3)
    assert micro.grids is not None and micro.grids.tolist() == [[1, 4, 4]]


# --- blocks ---------------------------------------------------------------------------------------------------------


def test_answers_of_the_blocks_are_those_of_the_places_in_order() -> None:
    micro = pack(make_rows(), 4)
    assert [places[-1] for places in seen(micro)] == list(range(micro.size))
    spans = [block.queries for block in micro.blocks]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == micro.size


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_part_of_the_line_sees_what_it_would_see_in_the_whole(parts: int) -> None:
    micro = pack(make_rows(), parts)
    here = micro.size // parts
    together = []
    for index in range(parts):
        own = seen(micro, index * here, (index + 1) * here)
        assert len(own) == here
        together += own
    assert together == seen(micro)


def test_rows_of_about_one_length_are_computed_together_and_others_are_not() -> None:
    micro = pack(make_rows([(1, (length - 1,)) for length in (20, 20, 18, 16, 9, 9, 3)]))
    assert [(block.rows, block.length) for block in micro.blocks] == [(4, 20), (2, 9), (1, 3)]
    assert [block.valid is None for block in micro.blocks] == [False, True, True]


def test_rows_of_one_response_need_no_mask_and_those_of_several_do() -> None:
    micro = pack(make_rows([(5, (15,)), (4, (4,)), (1, (1, 1))]))
    assert [block.mask is None for block in micro.blocks] == [True, True, False]


def test_padding_longer_than_a_row_does_not_stretch_the_row() -> None:
    micro = pack(make_rows([(2, (3,))]), at_least=100)
    assert [(block.rows, block.length) for block in micro.blocks] == [(1, 5), (1, 95)]
