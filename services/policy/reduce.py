"""Sums over the members of a gradient mesh, and in buckets over anybody. Called when a step has several who add to it.

Invariant: denominators are global, so the sum over members is the gradient of the whole minibatch; no member divides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from shared.mesh import Mesh


def reduce_gradients(gradients: Sequence[Tensor], mesh: Mesh, bucket_bytes: int) -> None:
    """Replace each gradient by its sum over all members, in buckets of about `bucket_bytes`; may raise MeshError."""

    def over_mesh(flat: Tensor) -> Tensor:
        carried = flat.to(mesh.device)
        mesh.all_reduce(carried)
        return carried

    sum_in_buckets(gradients, bucket_bytes, over_mesh)


def sum_in_buckets(tensors: Iterable[Tensor], bucket_bytes: int, total: Callable[[Tensor], Tensor]) -> None:
    """Replace each tensor by its part of the `total` of flat buckets of about `bucket_bytes`.

    All who sum pass tensors of equal shapes and dtypes in equal order, so they cut the same buckets.
    """
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or tensor.nbytes > room or tensor.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    for bucket in buckets:
        flat = total(torch.cat([each.reshape(-1) for each in bucket]))
        for each, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            each.copy_(part.view_as(each))


def reduce_metrics(
    sums: dict[str, float], maxima: dict[str, float], mesh: Mesh
) -> tuple[dict[str, float], dict[str, float]]:
    """The sums added up over members, and the largest of the maxima; all members hold the same names."""
    names, peaks = sorted(sums), sorted(maxima)
    # an all-reduce sums: each member puts its maxima into a row of its own, and all rows arrive
    table = torch.zeros(len(names) + len(peaks) * mesh.size, dtype=torch.float64)
    table[: len(names)] = torch.tensor([sums[name] for name in names], dtype=torch.float64)
    own = len(names) + len(peaks) * mesh.rank
    table[own : own + len(peaks)] = torch.tensor([maxima[name] for name in peaks], dtype=torch.float64)
    mesh.all_reduce(table)
    rows = table[len(names) :].view(mesh.size, len(peaks))
    largest = rows.max(dim=0).values.tolist() if peaks else []
    return dict(zip(names, table[: len(names)].tolist(), strict=True)), dict(zip(peaks, largest, strict=True))
