"""Losses as pure functions of tensors: no model, no state, no I/O. Called by the trainer for each micro-batch.

Invariant: every reduction is a sum of per-token weights whose denominators are *global* (counted over all members,
minibatch by minibatch), so losses, gradients and metrics of micro-batches and replicas add up to those of the whole.

Shapes: T is the number of response tokens in a micro-batch, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from services.policy.correction import (
    LOG_RATIO_LIMIT,
    CorrectionSettings,
    importance_weights,
    outside_band,
    ratio_of,
)

Reduction = Literal["token_mean", "sequence_sum_mean", "sequence_mean_mean", "constant"]


def token_weights(lengths: Tensor, reduction: Reduction, *, tokens: int, sequences: int, constant: int = 1) -> Tensor:
    """Weight of every token [T] such that sum(weight * token loss), over all micro-batches, is the reduced loss.

    `lengths` int64 [sequences here]; `tokens` and `sequences` are global counts; L_i is the length of sequence i.

    - token_mean:          1 / tokens                   (DAPO, arXiv 2503.14476, eq. 8)
    - sequence_sum_mean:   1 / sequences
    - sequence_mean_mean:  1 / (sequences * L_i)        (GRPO, arXiv 2402.03300, eq. 3)
    - constant:            1 / (sequences * constant)   (Dr.GRPO, arXiv 2503.20783; constant = longest response)
    """
    total = int(lengths.sum())
    if reduction == "sequence_mean_mean":
        per_sequence = 1.0 / (max(1, sequences) * lengths.clamp(min=1).to(torch.float64))
        return torch.repeat_interleave(per_sequence, lengths, output_size=total).to(torch.float32)
    denominator = {
        "token_mean": max(1, tokens),
        "sequence_sum_mean": max(1, sequences),
        "constant": max(1, sequences) * max(1, constant),
    }[reduction]
    return torch.full((total,), 1.0 / denominator, dtype=torch.float32, device=lengths.device)


@dataclass(frozen=True)
class LossResult:
    """`loss` is to call backward on; `sums` add up over micro-batches and members, of `maxima` the largest counts."""

    loss: Tensor
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]


def sft_loss(logprobs: Tensor, entropy: Tensor, weights: Tensor, *, tokens: int) -> LossResult:
    """Negative log-likelihood, sum_t -w_t log p(y_t | y_<t, x), all inputs [T]; w from `token_weights`.

    With token_mean weights it is the mean over all `tokens` response tokens of the whole minibatch.
    """
    loss = -(weights * logprobs).sum()
    sums = {"loss": loss.detach(), "entropy": entropy.detach().sum() / max(1, tokens)}
    return LossResult(loss, sums, {})


@dataclass(frozen=True)
class GrpoSettings:
    """Live settings of `grpo_loss`; see the recipe's [train] table."""

    clip_low: float
    clip_high: float
    kl_weight: float
    importance: CorrectionSettings


def k3(log_ratio: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(q || p) per token from samples of q: exp(d) - d - 1, d = log p - log q.

    J. Schulman, "Approximating KL divergence" (2020), estimator k3. d is clamped to +-LOG_RATIO_LIMIT.
    """
    clamped = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.exp(clamped) - clamped - 1.0


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    engine_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    entropy: Tensor,
    weights: Tensor,
    lengths: Tensor,
    settings: GrpoSettings,
    *,
    tokens: int,
) -> LossResult:
    """Clipped policy-gradient loss with decoupled importance weights and optional KL; tensors are [T], `lengths` [N].

        L = sum_t w_t * ( -c_t * min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + kl_weight * k3_t )
        r_t  = exp(logp_t - old_t)                          PPO ratio to the weights that the batch started from
        c_t  = `importance_weights` of old_t - engine_t     detached; what the engine sampled from against `old`
        k3_t = exp(ref_t - logp_t) - (ref_t - logp_t) - 1   KL to the reference, gradient through logp

    Sources: GRPO arXiv 2402.03300; asymmetric clip ("clip-higher") DAPO arXiv 2503.14476. `old`, `engine` and
    `reference` carry no gradient. `reference_logprobs` None leaves the KL term out. `lengths` int64 are those of the N
    sequences here. `tokens` is the global token count, the denominator of the metrics.
    """
    old, engine = old_logprobs.detach(), engine_logprobs.detach()
    drift = logprobs - old
    ratio = ratio_of(drift)
    clipped = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)

    mismatch = old - engine
    importance = importance_weights(mismatch, lengths, settings.importance)
    per_token = -importance.weights * surrogate

    share = 1.0 / max(1, tokens)
    sums: dict[str, Tensor] = {}
    if reference_logprobs is not None:
        kl = k3(reference_logprobs.detach() - logprobs)
        per_token = per_token + settings.kl_weight * kl
        sums["kl_reference"] = kl.detach().sum() * share
    loss = (weights * per_token).sum()

    with torch.no_grad():
        binds = torch.where(advantages >= 0, ratio > 1.0 + settings.clip_high, ratio < 1.0 - settings.clip_low)
        sums |= {
            "loss": loss.detach(),
            "entropy": entropy.sum() * share,
            "clip_share": (binds & (advantages != 0)).sum() * share,
            "kl_old": k3(drift).sum() * share,
            "mismatch_abs": mismatch.abs().sum() * share,
            "mismatch_kl": k3(mismatch).sum() * share,
            "mismatch_outside": outside_band(mismatch, settings.importance).sum() * share,
            "importance_mean": importance.weights.sum() * share,
            "importance_cut": importance.cut.sum() * share,
        }
        maxima = {"mismatch_max": mismatch.abs().max()} if mismatch.numel() else {}
    return LossResult(loss, sums, maxima)
