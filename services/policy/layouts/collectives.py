"""Collectives that autograd can go back through, each named by what it does forward and, after `_`, backward.

Megatron-LM's f and g (Shoeybi et al., arXiv 1909.08053, fig. 3) are `keep_sum` and `sum_keep`; those along the sequence
are from Korthikanti et al., arXiv 2205.05198. All of them return their argument where an axis has one rank, and are no
part of compiled layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from services.policy.layouts.grid import Axis

Collective = Callable[[Tensor, Axis, int], Tensor]


@torch.compiler.disable
def keep_sum(value: Tensor, axis: Axis) -> Tensor:
    """What every rank has, on its way to where each uses a part of it: gradients are summed."""
    return value if axis.group is None else _KeepSum.apply(value, axis)


@torch.compiler.disable
def sum_keep(value: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's part."""
    return value if axis.group is None else _SumKeep.apply(value, axis)


@torch.compiler.disable
def gather_scatter(value: Tensor, axis: Axis, dim: int) -> Tensor:
    """All ranks' parts joined along `dim`, for use in part by each: gradients are summed and cut again."""
    return value if axis.group is None else _Along.apply(value, axis, dim, _gather, _scatter)


@torch.compiler.disable
def scatter_gather(value: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum."""
    return value if axis.group is None else _Along.apply(value, axis, dim, _scatter, _gather)


@torch.compiler.disable
def gather_cut(value: Tensor, axis: Axis, dim: int) -> Tensor:
    """All ranks' parts joined along `dim`, for use alike by each: a gradient is complete, its own part counts."""
    return value if axis.group is None else _Along.apply(value, axis, dim, _gather, _cut)


@torch.compiler.disable
def cut_gather(value: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim` of what every rank has."""
    return value if axis.group is None else _Along.apply(value, axis, dim, _cut, _gather)


@torch.compiler.disable
def gather_uneven(value: Tensor, axis: Axis, sizes: Sequence[int]) -> Tensor:
    """As `gather_cut` along the first dimension, of which the rank i has `sizes[i]`."""
    return value if axis.group is None else _GatherUneven.apply(value, axis, tuple(sizes))


class _KeepSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.axis), None


class _SumKeep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis) -> Tensor:
        return _sum(value, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Along(torch.autograd.Function):
    """One collective along a dimension forward, another one backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis, dim: int, there: Collective, back: Collective) -> Tensor:
        ctx.axis, ctx.dim, ctx.back = axis, dim, back
        return there(value, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.back(grad, ctx.axis, ctx.dim), None, None, None, None


class _GatherUneven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis, sizes: tuple[int, ...]) -> Tensor:
        ctx.start, ctx.size = sum(sizes[: axis.index]), sizes[axis.index]
        padded = value.new_zeros((max(sizes), *value.shape[1:]))
        padded[: ctx.size] = value
        parts = _gather(padded, axis, 0).chunk(axis.size)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.start : ctx.start + ctx.size], None, None


def _sum(value: Tensor, axis: Axis) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.group)
    return total


def _gather(value: Tensor, axis: Axis, dim: int) -> Tensor:
    front = value.movedim(dim, 0).contiguous()
    parts = front.new_empty((axis.size * front.shape[0], *front.shape[1:]))
    dist.all_gather_single(parts, front, group=axis.group)
    return parts.movedim(0, dim)


def _scatter(value: Tensor, axis: Axis, dim: int) -> Tensor:
    front = value.movedim(dim, 0).contiguous()
    part = front.new_empty((front.shape[0] // axis.size, *front.shape[1:]))
    dist.reduce_scatter_single(part, front, group=axis.group)
    return part.movedim(0, dim)


def _cut(value: Tensor, axis: Axis, dim: int) -> Tensor:
    return value.chunk(axis.size, dim)[axis.index].contiguous()
