"""Importance weights that make up for an engine that sampled from another distribution than the trainer computes.

An engine and a trainer never agree to the bit: other kernels, other precision, quantised weights, weights that are a
few versions old. What was sampled from mu and is trained on as if from pi is biased; weighting it by pi / mu is not,
but has a variance that grows with the mismatch, and so the weights are bounded here. Called by the losses.

Shapes: T response tokens one after the other, of N sequences of `lengths` [N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Correction = Literal["none", "truncate", "mask"]
Level = Literal["token", "sequence"]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before exp: far outside any trust band, still finite in float32."""


@dataclass(frozen=True)
class CorrectionSettings:
    """What is done about ratios outside the trust band [floor, cap], and whose they are: a token's or a sequence's."""

    correction: Correction
    level: Level
    floor: float
    cap: float


@dataclass(frozen=True)
class ImportanceWeights:
    """`weights` float [T], factors of the tokens' losses; `cut` bool [T], where the ratio itself was not used."""

    weights: Tensor
    cut: Tensor


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp of log-ratios, kept finite."""
    return torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def outside_band(log_ratio: Tensor, settings: CorrectionSettings) -> Tensor:
    """Where a ratio lies outside the trust band, bool [T], whatever is done about it."""
    ratio = ratio_of(log_ratio)
    return (ratio < settings.floor) | (ratio > settings.cap)


def importance_weights(log_ratio: Tensor, lengths: Tensor, settings: CorrectionSettings) -> ImportanceWeights:
    """Weights of the tokens from log_ratio = log pi - log mu [T], pi the trainer's and mu the engine's distribution.

    rho_t = exp(log_ratio_t), or for every token of a sequence the product of all of its rho_t. Then

    - truncate: min(rho, cap)                        (AIPO, LlamaRL, arXiv 2505.24034)
    - mask:     rho where floor <= rho <= cap, or 0  (IcePop, Ring-1T, arXiv 2510.18855)
    - none:     1

    Token ratios leave a bias (the prefix was sampled from mu too) that ratios of sequences do not have, at a variance
    that grows with the length.
    """
    if settings.level == "sequence":
        log_ratio = _summed(log_ratio, lengths)
    if settings.correction == "none":
        return ImportanceWeights(torch.ones_like(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool))
    ratio = ratio_of(log_ratio)
    if settings.correction == "truncate":
        return ImportanceWeights(ratio.clamp(max=settings.cap), ratio > settings.cap)
    outside = outside_band(log_ratio, settings)
    return ImportanceWeights(ratio.masked_fill(outside, 0.0), outside)


def _summed(values: Tensor, lengths: Tensor) -> Tensor:
    """Every token's value replaced by the sum over its sequence, [T]."""
    sequence = torch.repeat_interleave(lengths, output_size=values.shape[0])
    sums = values.new_zeros(lengths.shape[0]).index_add_(0, sequence, values)
    return sums[sequence]
