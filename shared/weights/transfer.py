"""Weights over a mesh: rank 0 sends a staged copy, all other ranks receive it.

What travels: the length of the head (int64) and the head (msgpack: manifest and bucket size, as bytes) by broadcast
from rank 0; a vote, as a sum over all ranks, of how many receivers cannot use that; then, if none, the staged memory by
broadcast in buckets. Invariants: a receiver touches no model - what arrived goes in by `load_into` once its caller says
so; a transfer refused in the vote ends on every rank at once, with a mesh that can be used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import msgspec
import torch
from torch import Tensor

from shared.mesh import Mesh
from shared.weights.digest import digest_of
from shared.weights.errors import WeightsError
from shared.weights.staging import StagedWeights, TensorSpec, allocate

SOURCE = 0
"""Mesh rank of the source."""

HEAD_LIMIT = 1 << 28
"""Most bytes of a head; more is no head."""


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    manifest: list[TensorSpec]
    bucket_bytes: int


def send_head(head: bytes, mesh: Mesh) -> None:
    """Broadcast what receivers have to know first, from rank 0: its length (int64), then its bytes."""
    mesh.broadcast(torch.tensor([len(head)], dtype=torch.int64), SOURCE)
    mesh.broadcast(torch.frombuffer(bytearray(head), dtype=torch.uint8), SOURCE)


def receive_head(mesh: Mesh, limit: int) -> bytes:
    """What rank 0 sends by `send_head`. WeightsError for more than `limit` bytes, or none."""
    length = torch.zeros(1, dtype=torch.int64)
    mesh.broadcast(length, SOURCE)
    if not 0 < int(length) <= limit:
        raise WeightsError(f"expected a head of 1 to {limit} bytes from the source, got a length of {int(length)}")
    raw = torch.zeros(int(length), dtype=torch.uint8)
    mesh.broadcast(raw, SOURCE)
    return raw.numpy().tobytes()


def send_weights(staged: StagedWeights, mesh: Mesh, bucket_bytes: int) -> int:
    """Send the staged copy to all other ranks; returns the bytes that went out. MeshError if a peer fails."""
    if mesh.rank != SOURCE:
        raise WeightsError(f"expected mesh rank {SOURCE} as the source of weights, got rank {mesh.rank}")
    head = msgspec.msgpack.encode(_Head(staged.area.manifest, bucket_bytes))
    send_head(head, mesh)
    _vote(mesh, None)
    for bucket in _buckets(staged.area.memory, bucket_bytes):
        mesh.broadcast(bucket, SOURCE)
    return len(head) + staged.area.memory.numel()


def receive_weights(manifest: Sequence[TensorSpec], mesh: Mesh, bucket_bytes: int) -> StagedWeights:
    """Receive what rank 0 sends, with the digest of what arrived.

    WeightsError, before any weight travels, if the source's manifest is not `manifest` (of the receiver's own model).
    """
    _vote(mesh, _objection(manifest, receive_head(mesh, HEAD_LIMIT), bucket_bytes))
    area = allocate(manifest)
    for bucket in _buckets(area.memory, bucket_bytes):
        mesh.broadcast(bucket, SOURCE)
    return StagedWeights(area, digest_of(area.tensors))


def _buckets(memory: Tensor, bucket_bytes: int) -> Iterator[Tensor]:
    for start in range(0, memory.numel(), bucket_bytes):
        yield memory[start : start + bucket_bytes]


def _vote(mesh: Mesh, objection: str | None) -> None:
    """End the transfer on all ranks if one of them has an objection to it."""
    against = torch.tensor([objection is not None], dtype=torch.int32)
    mesh.all_reduce(against)
    if objection is not None:
        raise WeightsError(objection)
    if int(against):
        raise WeightsError(
            f"expected all {mesh.size - 1} receivers to take the weights, {int(against)} refused; their errors say why"
        )


def _objection(manifest: Sequence[TensorSpec], raw: bytes, bucket_bytes: int) -> str | None:
    """What keeps a receiver with `manifest` from taking weights with the head `raw`."""
    try:
        head = msgspec.msgpack.decode(raw, type=_Head)
    except msgspec.MsgspecError as error:
        return f"expected a manifest from the source, got bytes that are none: {error}"
    for own, sent in zip_longest(manifest, head.manifest):
        if own != sent:
            return (
                f"the source's weights do not fit this model: expected {_described(own)}, got {_described(sent)}; "
                f"give both services the same [model] table and library versions"
            )
    if head.bucket_bytes != bucket_bytes:
        return (
            f"expected buckets of {bucket_bytes} bytes, the source sends {head.bucket_bytes}; "
            f"give both services the same weights.bucket_mb"
        )
    return None


def _described(spec: TensorSpec | None) -> str:
    return "no further tensor" if spec is None else f"{spec.name} ({spec.dtype} {spec.shape})"
