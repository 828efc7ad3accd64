"""Sums over the members of a gradient mesh. Called by the trainer when a step has several members.

Invariant: denominators are global, so the sum over members is the gradient of the whole minibatch; no member divides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.mesh import Mesh

CARRIER = torch.device("cpu")
"""Where meshes take their tensors from."""


def reduce_gradients(gradients: Sequence[Tensor], mesh: Mesh, bucket_bytes: int) -> None:
    """Replace each gradient by its sum over all members, in flat buckets of about `bucket_bytes`; may raise MeshError.

    All members pass gradients of equal shapes and dtypes in equal order, so they cut the same buckets.
    """
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > bucket_bytes or gradient.dtype != bucket[0].dtype):
            _reduce_bucket(bucket, mesh)
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        _reduce_bucket(bucket, mesh)


def _reduce_bucket(bucket: Sequence[Tensor], mesh: Mesh) -> None:
    flat = torch.cat([g.reshape(-1) for g in bucket]).to(CARRIER)
    mesh.all_reduce(flat)
    for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


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
