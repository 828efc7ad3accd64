"""The losses against independent float64 references written as plain loops over tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import pytest
import torch

from services.policy import losses
from services.policy.correction import Correction, CorrectionSettings, Level
from services.policy.logprobs import token_logprobs
from services.policy.losses import GrpoSettings, grpo_loss, sft_loss, token_weights

REDUCTIONS = ("token_mean", "sequence_sum_mean", "sequence_mean_mean", "constant")
LENGTHS = [8, 1, 0, 9]
CONSTANT = 16


@dataclass
class Case:
    logits: torch.Tensor
    targets: torch.Tensor
    old: torch.Tensor
    engine: torch.Tensor
    reference: torch.Tensor
    advantages: torch.Tensor


def case(seed: int = 0, vocabulary: int = 11) -> Case:
    """Log-probabilities spread widely enough that both clips and the cap bind somewhere."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = normal(total, vocabulary) * 2
    targets = torch.randint(vocabulary, (total,), generator=generator)
    exact = torch.log_softmax(logits, -1)[torch.arange(total), targets]
    per_sequence = [1.3, -0.7, 0.4, -1.1]
    advantages = torch.tensor(
        [a for a, n in zip(per_sequence, LENGTHS, strict=True) for _ in range(n)], dtype=torch.float64
    )
    return Case(
        logits,
        targets,
        exact + normal(total) * 0.7,
        exact + normal(total) * 0.7,
        exact + normal(total) * 0.5,
        advantages,
    )


def grpo_settings(correction: Correction = "truncate", level: Level = "token", cap: float = 2.0) -> GrpoSettings:
    return GrpoSettings(0.2, 0.28, 0.3, CorrectionSettings(correction, level, floor=0.5, cap=cap))


def importance_by_hand(log_ratio: float, s: CorrectionSettings) -> float:
    ratio = math.exp(log_ratio)
    if s.correction == "none":
        return 1.0
    if s.correction == "truncate":
        return min(ratio, s.cap)
    return ratio if s.floor <= ratio <= s.cap else 0.0


def weight_by_hand(reduction: str, length: int, tokens: int, sequences: int) -> float:
    if reduction == "token_mean":
        return 1 / tokens
    if reduction == "sequence_sum_mean":
        return 1 / sequences
    if reduction == "sequence_mean_mean":
        return 1 / sequences / length
    return 1 / sequences / CONSTANT


def grpo_by_hand(c: Case, reduction: str, s: GrpoSettings, kl: bool) -> tuple[float, list[list[float]]]:
    """Loss and its gradient with respect to the logits, derived by hand, one token at a time."""
    tokens, sequences = sum(LENGTHS), len(LENGTHS)
    loss, gradient, t = 0.0, [], 0
    for length in LENGTHS:
        mismatch = [float(c.old[k]) - float(c.engine[k]) for k in range(t, t + length)]
        for index in range(length):
            row = c.logits[t].tolist()
            top = max(row)
            exps = [math.exp(x - top) for x in row]
            probabilities = [e / sum(exps) for e in exps]
            target = int(c.targets[t])
            logp = math.log(probabilities[target])
            a = float(c.advantages[t])
            ratio = math.exp(logp - float(c.old[t]))
            whose = sum(mismatch) if s.importance.level == "sequence" else mismatch[index]
            importance = importance_by_hand(whose, s.importance)
            if a >= 0:
                bound, binds = 1 + s.clip_high, ratio > 1 + s.clip_high
            else:
                bound, binds = 1 - s.clip_low, ratio < 1 - s.clip_low
            value = -importance * a * (bound if binds else ratio)
            slope = 0.0 if binds else -importance * a * ratio  # d value / d logp
            if kl:
                d = float(c.reference[t]) - logp
                value += s.kl_weight * (math.exp(d) - d - 1)
                slope += s.kl_weight * (1 - math.exp(d))
            w = weight_by_hand(reduction, length, tokens, sequences)
            loss += w * value
            gradient.append([w * slope * ((v == target) - p) for v, p in enumerate(probabilities)])
            t += 1
    return loss, gradient


def logprobs_of(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a head that hands its hidden states on."""
    return token_logprobs(logits, torch.eye(logits.shape[1], dtype=logits.dtype), targets)


def grpo(c: Case, reduction: str, s: GrpoSettings, kl: bool) -> tuple[losses.LossResult, torch.Tensor]:
    logits = c.logits.clone().requires_grad_()
    logprobs, entropy = logprobs_of(logits, c.targets)
    weights = token_weights(
        torch.tensor(LENGTHS), reduction, tokens=sum(LENGTHS), sequences=len(LENGTHS), constant=CONSTANT
    )
    reference = c.reference if kl else None
    lengths = torch.tensor(LENGTHS)
    result = grpo_loss(
        logprobs, c.old, c.engine, reference, c.advantages, entropy, weights, lengths, s, tokens=sum(LENGTHS)
    )
    result.loss.backward()
    assert logits.grad is not None
    return result, logits.grad


@pytest.mark.parametrize("kl", [False, True], ids=["no-kl", "kl"])
@pytest.mark.parametrize("level", get_args(Level))
@pytest.mark.parametrize("correction", get_args(Correction))
@pytest.mark.parametrize("cap", [0.9, 2.0, 100.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grpo_loss_and_gradient_equal_those_derived_by_hand(
    reduction: str, cap: float, correction: Correction, level: Level, kl: bool
) -> None:
    settings = grpo_settings(correction, level, cap)
    c = case()
    result, gradient = grpo(c, reduction, settings, kl)
    loss, by_hand = grpo_by_hand(c, reduction, settings, kl)
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor(by_hand, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_cases_bind_on_both_sides_of_the_clip_and_at_the_cap() -> None:
    c = case()
    ratio = torch.exp(torch.log_softmax(c.logits, -1)[torch.arange(len(c.targets)), c.targets] - c.old)
    assert ((ratio > 1.28) & (c.advantages > 0)).any()
    assert ((ratio < 0.8) & (c.advantages < 0)).any()
    mismatch = c.old - c.engine
    assert (torch.exp(mismatch) > 2).any() and (torch.exp(mismatch) < 0.5).any()
    whole = torch.exp(torch.stack([part.sum() for part in mismatch.split(LENGTHS) if len(part)]))
    assert (whole > 2).any() and (whole < 0.5).any() and ((whole > 0.5) & (whole < 2)).any()


def test_grpo_metrics_equal_those_counted_by_hand() -> None:
    settings = grpo_settings()
    c = case(3)
    result, _ = grpo(c, "token_mean", settings, True)
    total = sum(LENGTHS)
    logp = torch.log_softmax(c.logits, -1)[torch.arange(total), c.targets].tolist()
    clipped = truncated = outside = 0
    kl_old = kl_reference = mismatch_kl = mismatch_abs = importance = 0.0
    biggest = 0.0
    for t in range(total):
        ratio, d = math.exp(logp[t] - float(c.old[t])), float(c.old[t] - c.engine[t])
        clipped += ratio > 1.28 if c.advantages[t] > 0 else ratio < 0.8
        truncated += math.exp(d) > 2.0
        outside += not 0.5 <= math.exp(d) <= 2.0
        importance += min(math.exp(d), 2.0)
        kl_old += ratio - 1 - math.log(ratio)
        mismatch_kl += math.exp(d) - 1 - d
        mismatch_abs += abs(d)
        biggest = max(biggest, abs(d))
        back = float(c.reference[t]) - logp[t]
        kl_reference += math.exp(back) - 1 - back
    entropy = -(torch.softmax(c.logits, -1) * torch.log_softmax(c.logits, -1)).sum(-1).mean()
    expected = {
        "clip_share": clipped, "importance_cut": truncated, "importance_mean": importance, "kl_old": kl_old,
        "mismatch_outside": outside, "mismatch_kl": mismatch_kl, "mismatch_abs": mismatch_abs,
        "kl_reference": kl_reference,
    }  # fmt: skip
    for name, value in expected.items():
        assert float(result.sums[name]) == pytest.approx(value / total, abs=1e-6), name
    assert float(result.sums["entropy"]) == pytest.approx(float(entropy), abs=1e-6)
    assert float(result.maxima["mismatch_max"]) == pytest.approx(biggest, abs=1e-6)


def test_sft_loss_is_the_mean_over_all_tokens_of_the_whole_minibatch() -> None:
    c = case(1)
    logits = c.logits.clone().requires_grad_()
    logprobs, entropy = logprobs_of(logits, c.targets)
    tokens = 2 * sum(LENGTHS)  # another micro-batch holds as many again
    weights = token_weights(torch.tensor(LENGTHS), "token_mean", tokens=tokens, sequences=8)
    result = sft_loss(logprobs, entropy, weights, tokens=tokens)
    by_hand = torch.nn.functional.cross_entropy(c.logits, c.targets, reduction="sum") / tokens
    assert result.loss.item() == pytest.approx(float(by_hand), abs=1e-6)


def test_a_huge_ratio_gives_a_finite_loss_and_gradient() -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    far, zero = torch.tensor([-500.0, -500.0]), torch.zeros(2)
    advantages, lengths = torch.tensor([-1.0, 1.0]), torch.tensor([2])
    result = grpo_loss(logprobs, far, far, far, advantages, zero, torch.ones(2), lengths, grpo_settings(), tokens=2)
    result.loss.backward()
    assert torch.isfinite(result.loss) and torch.isfinite(logprobs.grad).all()


def test_no_tokens_give_a_loss_of_zero() -> None:
    none = torch.empty(0)
    lengths = torch.tensor([0])
    result = grpo_loss(none.requires_grad_(), none, none, None, none, none, none, lengths, grpo_settings(), tokens=0)
    assert result.loss.item() == 0.0
    assert token_weights(torch.tensor([0]), "token_mean", tokens=0, sequences=1).numel() == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_two_halves_are_those_of_the_whole(reduction: str) -> None:
    def of(lengths: list[int]) -> torch.Tensor:
        return token_weights(torch.tensor(lengths), reduction, tokens=18, sequences=4, constant=CONSTANT)

    assert torch.equal(torch.cat([of(LENGTHS[:2]), of(LENGTHS[2:])]), of(LENGTHS))
