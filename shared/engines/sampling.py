"""Drawing tokens: a random number that depends on nothing but (seed, sample, position), and the inverse CDF.

Called by engines that draw their own tokens. Invariant: a row's draw never depends on the rows beside it, so that the
same seed gives the same sample alone and in any batch (up to rounding of the logits themselves).
"""

from __future__ import annotations

import torch

# splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014); as int64, which wraps.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_B = 0x94D049BB133111EB - (1 << 64)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64; torch's own shift drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64: a bijection of int64 in which every input bit reaches every output bit."""
    x = (x ^ _shifted(x, 30)) * _MIX_A
    x = (x ^ _shifted(x, 27)) * _MIX_B
    return x ^ _shifted(x, 31)


def stream_keys(seeds: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Start of each sample's own random stream, int64[rows], from int64 seeds and sample indices."""
    return _mix(_mix(seeds + _GAMMA) + (samples + 1) * _GAMMA)


def uniforms(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Uniform float64 in [0, 1) of each stream at each token position, in steps of 2**-52."""
    return _shifted(_mix(keys + (positions + 1) * _GAMMA), 12).double() * 2.0**-52


def as_int64(seed: int) -> int:
    """The low 64 bits of a Python integer as the signed number that an int64 tensor takes."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def truncate(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set to -inf what top-k, then top-p cut off; `scores` [rows, vocabulary] are logits after temperature.

    Top-p keeps the smallest set of likeliest tokens whose probability reaches `top_p` among those that top-k left
    (nucleus sampling, Holtzman et al. 2020). The likeliest token always stays. `top_k` 0 and `top_p` 1 cut nothing.
    """
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    keep = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    probabilities = ordered.masked_fill(~keep, -torch.inf).double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep[:, 0] = True
    return scores.masked_fill(~torch.zeros_like(keep).scatter_(1, order, keep), -torch.inf)


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    *,
    greedy: bool,
    truncated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row and its log-probability: int64[rows], float32[rows], from `logits` [rows, vocabulary].

    The token is the inverse CDF of the filtered distribution at `uniform`. Rows of temperature 0 take the argmax.
    `greedy` and `truncated` say whether any row is greedy or has top-k or top-p: what no row wants is not computed.
    """
    scores = logits.float()
    scores = scores / (torch.where(temperature > 0, temperature, 1.0) if greedy else temperature)[:, None]
    if truncated:
        scores = truncate(scores, top_k, top_p)
    logprobs = scores.log_softmax(-1)
    # In double precision the last entry of the CDF is within 1e-10 of 1 even for vocabularies of 150k tokens; scaling
    # the draw by it keeps the target below it, so that a token of probability 0 is never taken. (NaN would lead past
    # the end; the caller sees it in the log-probability.)
    cdf = logprobs.double().exp_().cumsum(-1)
    tokens = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(1)
    tokens = tokens.clamp_max_(logits.shape[-1] - 1)
    if greedy:
        tokens = torch.where(temperature > 0, tokens, logits.argmax(-1))
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
