"""Draws: reproducible, uniform, and from the distribution that their log-probabilities belong to."""

from __future__ import annotations

import pytest
import torch

from shared.engines.sampling import as_int64, draw, stream_keys, truncate, uniforms

ROWS = 20_000


def drawn(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """`ROWS` draws from the same logits [vocabulary]: tokens and log-probabilities."""
    keys = stream_keys(torch.full((ROWS,), 11), torch.arange(ROWS))
    return draw(
        logits.expand(ROWS, -1),
        uniforms(keys, torch.zeros(ROWS, dtype=torch.int64)),
        torch.full((ROWS,), temperature),
        torch.full((ROWS,), top_k),
        torch.full((ROWS,), top_p),
        greedy=temperature == 0,
        truncated=top_k > 0 or top_p < 1,
    )


def test_uniforms_depend_on_seed_sample_and_position_alone() -> None:
    keys = stream_keys(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0]))
    first = uniforms(keys, torch.tensor([0, 0, 0]))
    assert first.unique().numel() == 3
    assert torch.equal(uniforms(keys[1:], torch.tensor([0, 0])), first[1:])
    assert not torch.equal(uniforms(keys, torch.tensor([1, 1, 1])), first)


def test_uniforms_are_uniform_over_samples_and_over_positions() -> None:
    over_samples = uniforms(
        stream_keys(torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS)), torch.zeros(ROWS, dtype=torch.int64)
    )
    over_positions = uniforms(stream_keys(torch.tensor([0]), torch.tensor([0])).expand(ROWS), torch.arange(ROWS))
    for numbers in (over_samples, over_positions):
        assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
        counts = torch.histc(numbers.float(), bins=20, min=0, max=1)
        # chi-squared with 19 degrees of freedom: above 43.8 in one of a thousand
        assert float(((counts - ROWS / 20) ** 2 / (ROWS / 20)).sum()) < 43.8


def test_splitmix64_gives_its_published_first_numbers() -> None:
    # the stream of splitmix64 seeded with 1234567, as in the reference implementation's test vector
    numbers = uniforms(torch.full((3,), 1234567), torch.arange(3))
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    assert numbers.tolist() == [(number >> 12) * 2.0**-52 for number in published]


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, 2**70 + 3])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert -(2**63) <= as_int64(seed) < 2**63
    assert as_int64(seed) % 2**64 == seed % 2**64


def test_frequencies_are_the_probabilities_that_the_logprobs_claim() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -40.0])
    tokens, logprobs = drawn(logits, temperature=0.8)
    expected = (logits / 0.8).softmax(-1)
    frequencies = torch.bincount(tokens, minlength=5) / ROWS
    torch.testing.assert_close(frequencies, expected, atol=0.012, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_temperature_zero_takes_the_argmax_and_reports_temperature_one() -> None:
    logits = torch.tensor([0.3, 1.7, 0.9])
    tokens, logprobs = drawn(logits, temperature=0.0)
    assert tokens.unique().tolist() == [1]
    torch.testing.assert_close(logprobs[0], logits.log_softmax(-1)[1])


def test_top_k_renormalises_over_the_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    tokens, logprobs = drawn(logits, top_k=2)
    assert set(tokens.tolist()) == {1, 3}
    expected = torch.tensor([3.0, 2.0]).log_softmax(-1)
    torch.testing.assert_close(logprobs[tokens == 1][0], expected[0])
    torch.testing.assert_close(logprobs[tokens == 3][0], expected[1])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.75, 2), (0.8, 3), (1.0, 4)):
        cut = truncate(logits, torch.tensor([0]), torch.tensor([top_p]))
        assert int(torch.isfinite(cut).sum()) == kept, top_p


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    cut = truncate(logits, torch.tensor([2]), torch.tensor([0.66]))
    assert torch.isfinite(cut).tolist() == [[True, False, False, False]]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((4, 3), -torch.inf)
    logits[:, 1] = 0.0
    largest = torch.tensor([0.0, 0.5, 1 - 2.0**-52, 2.0**-52], dtype=torch.float64)
    ones = torch.ones(4)
    tokens, logprobs = draw(logits, largest, ones, ones.long() * 0, ones, greedy=False, truncated=False)
    assert tokens.tolist() == [1, 1, 1, 1]
    assert logprobs.tolist() == [0.0] * 4
