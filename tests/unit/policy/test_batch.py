"""From groups and frames to sequences and rows."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from services.policy.batch import BatchError, rows_of, sequences_of

WIDTH = 128


def test_rows_are_the_same_whatever_the_order_of_the_groups(tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), groups=4)
    turned = msgspec.structs.replace(step, groups=step.groups[::-1])
    turned_frames = [frame for start in range(12, -1, -4) for frame in frames[start : start + 4]]
    names = [
        [[(s.group, s.sample) for s in row.responses] for row in rows_of(sequences_of(*given), 1000, WIDTH)]
        for given in ((step, frames), (turned, turned_frames))
    ]
    assert names[0] == names[1]


def test_a_group_is_one_row_and_the_longest_row_comes_first(tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), groups=5, samples=4)
    rows = rows_of(sequences_of(step, frames), 1000, WIDTH)
    assert sorted(row.responses[0].group for row in rows) == [0, 1, 2, 3, 4]
    assert all([s.sample for s in row.responses] == [0, 1, 2, 3] for row in rows)
    lengths = [row.length for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    by_hand = [group.prompt_length + sum(group.lengths) for group in step.groups]
    assert sorted(lengths) == sorted(by_hand)


def test_groups_never_share_a_row_even_with_equal_prompts(tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), groups=2)
    both = msgspec.structs.replace(step, groups=[step.groups[0], msgspec.structs.replace(step.groups[0], attempt=2)])
    rows = rows_of(sequences_of(both, [*frames[:4], *frames[:4]]), 1000, WIDTH)
    assert sorted(row.responses[0].attempt for row in rows) == [1, 2]


def test_a_group_too_large_for_a_micro_batch_repeats_its_prompt_in_several_rows(tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), groups=1, samples=8)
    rows = rows_of(sequences_of(step, frames), 20, WIDTH)
    assert len(rows) > 1
    assert all(row.length <= 20 for row in rows)
    assert sorted(s.sample for row in rows for s in row.responses) == list(range(8))


def test_responses_do_not_share_a_row_where_attention_would_cost_more_than_the_prompt(tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), groups=1, samples=8)
    sequences = sequences_of(step, frames)
    assert len(rows_of(sequences, 1000, 128)) == 1
    assert len(rows_of(sequences, 1000, 1)) > 1


def test_a_sequence_longer_than_the_limit_has_a_row_of_its_own(tools: Any) -> None:
    step, frames = tools.step(tools.recipe())
    rows = rows_of(sequences_of(step, frames), 1, WIDTH)
    assert [len(row.responses) for row in rows] == [1] * step.sequences


def test_sequences_without_a_response_token_are_left_out(tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), empty=True)
    assert rows_of(sequences_of(step, frames), 1000, WIDTH) == []


@pytest.mark.parametrize("fault", ["frame missing", "array missing", "wrong length", "advantages"])
def test_a_payload_that_does_not_fit_is_refused_by_name(tools: Any, fault: str) -> None:
    step, frames = tools.step(tools.recipe(), groups=1)
    group = step.groups[0]
    if fault == "frame missing":
        frames = frames[:-1]
    elif fault == "array missing":
        group, frames = msgspec.structs.replace(group, arrays=group.arrays[1:]), frames[1:]
    elif fault == "wrong length":
        group = msgspec.structs.replace(group, lengths=[n + 1 for n in group.lengths])
    else:
        group = msgspec.structs.replace(group, advantages=[1.0])
    with pytest.raises(BatchError, match="step 0"):
        sequences_of(msgspec.structs.replace(step, groups=[group]), frames)
