"""Log-probabilities of tokens from a model's last hidden states, so that the logits of a whole batch never exist.

Forward and backward take a block of the vocabulary at a time and compute its logits from hidden states and the head's
weight, anew in backward: T x V logits become T x (a block) of them. The normaliser is gathered online (Milakov and
Gimelshein, arXiv 1805.02867); Wijmans et al., "Cut your losses in large-vocabulary language models" (arXiv 2411.09009),
do the same in one kernel. With tensor parallelism each rank has a part of the vocabulary, one more level of blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from services.policy.layouts.grid import Axis

BLOCK_ELEMENTS = 1 << 24
"""Most logits (tokens x vocabulary) that exist at one time; on a CPU a quarter, which is nearer to its caches."""

ALONE = Axis(1, 0, None)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | float = 1.0,
    *,
    axis: Axis = ALONE,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, both [T], in float32 or wider.

    `hidden` [T, H], `weight` [V, H], `targets` int64 [T], `temperature` [T] or one for all. The distribution is
    softmax(hidden weight^T / temperature), the one that was sampled from. Only the log-probability carries a gradient;
    the entropy is a metric. Of a vocabulary shared over `axis`, `weight` has the rows from `first` on; the gradient of
    `hidden` is complete on every rank.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    temperatures = torch.as_tensor(temperature, dtype=dtype, device=hidden.device).expand(targets.shape)
    logprobs, entropy = _TokenLogProbs.apply(hidden, weight, targets, temperatures, axis, first)
    return logprobs, entropy


class _TokenLogProbs(torch.autograd.Function):
    """Saves hidden states and one log-sum-exp a token: d logp_t / d logits = (onehot_t - p) / temperature."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperatures: Tensor, axis: Axis, first: int
    ) -> tuple[Tensor, Tensor]:
        dtype = temperatures.dtype
        peak = torch.full_like(temperatures, torch.finfo(dtype).min)
        mass, expected, chosen = (torch.zeros_like(temperatures) for _ in range(3))
        for block in _blocks(hidden, weight.shape[0]):
            scaled = (hidden @ weight[block].T).to(dtype).div_(temperatures[:, None])
            own, places = _own(targets - first, block)
            chosen += scaled.gather(-1, places).squeeze(-1).where(own, 0.0)
            higher = torch.maximum(peak, scaled.amax(-1))
            fall = torch.exp(peak - higher)
            weights = torch.exp(scaled - higher[:, None])
            mass = mass * fall + weights.sum(-1)
            # a logit of -inf has p = 0 and contributes nothing
            expected = expected * fall + weights.mul_(scaled).nan_to_num_(nan=0.0).sum(-1)
            peak = higher
        if axis.group is not None:
            higher = peak.clone()
            dist.all_reduce(higher, op=dist.ReduceOp.MAX, group=axis.group)
            fall, peak = torch.exp(peak - higher), higher
            sums = torch.stack([mass * fall, expected * fall, chosen])
            dist.all_reduce(sums, group=axis.group)
            mass, expected, chosen = sums
        normalisers = peak + mass.log()
        logprobs = chosen - normalisers
        entropy = normalisers - expected / mass  # H = log Z - E_p[x]
        ctx.save_for_backward(hidden, weight, targets, normalisers, temperatures)
        ctx.axis, ctx.first = axis, first
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalisers, temperatures = ctx.saved_tensors
        for_hidden = torch.zeros_like(hidden, dtype=temperatures.dtype) if ctx.needs_input_grad[0] else None
        for_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        outer = (grad_logprobs / temperatures)[:, None]
        for block in _blocks(hidden, weight.shape[0]):
            scaled = (hidden @ weight[block].T).to(temperatures.dtype).div_(temperatures[:, None])
            part = scaled.sub_(normalisers[:, None]).exp_().mul_(-outer)
            own, places = _own(targets - ctx.first, block)
            part.scatter_add_(-1, places, outer * own[:, None])
            narrow = part.to(hidden.dtype)
            if for_hidden is not None:
                for_hidden += narrow @ weight[block]
            if for_weight is not None:
                for_weight[block] = narrow.T @ hidden
        if for_hidden is not None and ctx.axis.group is not None:
            dist.all_reduce(for_hidden, group=ctx.axis.group)
        return None if for_hidden is None else for_hidden.to(hidden.dtype), for_weight, None, None, None, None


def _blocks(hidden: Tensor, vocabulary: int) -> list[slice]:
    elements = BLOCK_ELEMENTS // 4 if hidden.device.type == "cpu" else BLOCK_ELEMENTS
    width = max(1, elements // max(1, hidden.shape[0]))
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _own(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which targets [T] stand in the block, and at which column [T, 1] (any for the others)."""
    own = (targets >= block.start) & (targets < block.stop)
    return own, (targets - block.start).where(own, 0)[:, None]
