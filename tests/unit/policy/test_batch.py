"""From groups and frames to micro-batches."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from services.policy.batch import BatchError, micro_batches, sequences_of


def test_sequences_stand_longest_first_whatever_the_order_of_the_groups(tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), groups=4)
    names = [(s.group, s.sample) for s in sequences_of(step, frames)]
    turned = msgspec.structs.replace(step, groups=step.groups[::-1])
    turned_frames = [frame for start in range(12, -1, -4) for frame in frames[start : start + 4]]
    assert [(s.group, s.sample) for s in sequences_of(turned, turned_frames)] == names
    lengths = [s.length for s in sequences_of(step, frames)]
    assert lengths == sorted(lengths, reverse=True)


def test_no_micro_batch_has_more_padded_tokens_than_the_limit_and_none_is_lost(tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), groups=6, samples=4)
    batches = micro_batches(sequences_of(step, frames), 40, pad=0)
    assert all(micro.inputs.numel() <= 40 for micro in batches)
    assert len(batches) > 3
    assert sum(micro.tokens for micro in batches) == step.tokens


def test_a_sequence_longer_than_the_limit_makes_a_micro_batch_of_its_own(tools: Any) -> None:
    step, frames = tools.step(tools.recipe())
    batches = micro_batches(sequences_of(step, frames), 1, pad=0)
    assert [micro.inputs.shape[0] for micro in batches] == [1] * step.sequences


def test_picks_point_from_each_response_token_to_the_position_before_it(tools: Any) -> None:
    step, frames = tools.step(tools.recipe())
    for micro in micro_batches(sequences_of(step, frames), 1000, pad=0):
        row, column = micro.picks // micro.keep, micro.picks % micro.keep
        following = column + micro.inputs.shape[1] - micro.keep + 1
        assert (micro.inputs[row, following] == micro.targets).all()
        assert (micro.attention[row, following] == 1).all()


def test_sequences_without_a_response_token_are_left_out(tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), empty=True)
    assert micro_batches(sequences_of(step, frames), 1000, pad=0) == []


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


def test_padding_never_reaches_the_arrays(tools: Any) -> None:
    step, frames = tools.step(tools.recipe())
    sequences = sequences_of(step, frames)
    together = micro_batches(sequences, 10_000, pad=0)
    assert len(together) == 1
    tokens = np.concatenate([s.tokens for s in sequences])
    assert (together[0].targets.numpy() == tokens).all()
    assert together[0].engine_logprobs.numpy() == pytest.approx(np.concatenate([s.logprobs for s in sequences]))
