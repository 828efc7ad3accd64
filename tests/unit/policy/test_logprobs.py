"""Log-probabilities from hidden states equal those from whole logits."""

from __future__ import annotations

import pytest
import torch

from services.policy import logprobs as module
from services.policy.logprobs import token_logprobs

TOKENS, WIDTH, VOCABULARY = 13, 5, 11


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), generator=draw)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("block", [1, 16 * TOKENS, 1 << 24], ids=["a-column-at-a-time", "some-columns", "all-at-once"])
def test_log_probs_entropy_and_gradients_equal_log_softmax_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, block: int, temperature: float
) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    hidden, weight, targets = case()
    mine = [each.clone().requires_grad_() for each in (hidden, weight)]
    plain = [each.clone().requires_grad_() for each in (hidden, weight)]
    upstream = torch.randn(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    logprobs, entropy = token_logprobs(*mine, targets, temperature)
    logprobs.backward(upstream)
    full = torch.log_softmax(plain[0] @ plain[1].T / temperature, -1)
    expected = full.gather(-1, targets[:, None]).squeeze(-1)
    expected.backward(upstream)
    torch.testing.assert_close(logprobs, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1), atol=1e-12, rtol=0)
    for own, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-12, rtol=0)


def test_bfloat16_gives_float32_log_probs() -> None:
    hidden, weight, targets = case(torch.bfloat16)
    logprobs, _ = token_logprobs(hidden, weight, targets)
    assert logprobs.dtype == torch.float32
    expected = torch.log_softmax((hidden @ weight.T).double(), -1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-6, rtol=0)


def test_a_vanished_probability_keeps_the_entropy_finite() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    hidden, weight = torch.ones(1, 1), logits.T.contiguous()
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0]))
    assert torch.isfinite(logprobs).all() and torch.isfinite(entropy).all()


def test_no_token_gives_no_log_prob_and_a_gradient_of_zero() -> None:
    hidden, weight, targets = case()
    weight.requires_grad_()
    logprobs, _ = token_logprobs(hidden[:0], weight, targets[:0])
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert weight.grad is not None and not weight.grad.any()
