"""Weights over a mesh: all its ranks but the last are the source, and the last one receives.

A source of one rank has a whole copy. Of a policy of several ranks each has a copy of the boxes that it owns and sends
them straight to the receiver, which puts them into whole tensors: both compute the boxes from manifest and layout.

What travels: the length of the head (int64) and the head (msgpack: manifest, bucket size, layout), by broadcast from
rank 0; a vote, as a sum over all ranks, of how many cannot use that; if none, the staged memory of one source after the
other, in buckets. Invariants: a receiver touches no model - what arrived goes in by `load_into` once its caller says
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
from shared.weights.slices import Box, PolicyLayout
from shared.weights.staging import Area, Shared, StagedWeights, TensorSpec, allocate, area_bytes, tensor_views

SOURCE = 0
"""Mesh rank of the source; of the first one, where there are several."""

HEAD_LIMIT = 1 << 28
"""Most bytes of a head; more is no head."""


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`layout` is that of a source of several ranks; `manifest` lists whole tensors."""

    manifest: list[TensorSpec]
    bucket_bytes: int
    layout: PolicyLayout | None


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
    """Send a staged copy, or this rank's part of one, to the last rank; returns the bytes that go out of all ranks.

    MeshError if a peer fails; WeightsError if the receiver cannot use them.
    """
    shared = staged.shared
    sources = shared.ranks if shared is not None else 1
    if mesh.size != sources + 1 or mesh.rank >= sources:
        raise WeightsError(
            f"expected a mesh of {sources} sources of these weights and, behind them, the receiver, got mesh rank "
            f"{mesh.rank} of {mesh.size}"
        )
    manifest = shared.manifest if shared is not None else staged.area.manifest
    head = msgspec.msgpack.encode(_Head(manifest, bucket_bytes, shared.layout if shared is not None else None))
    differs = None
    if mesh.rank == SOURCE:
        send_head(head, mesh)
    elif receive_head(mesh, HEAD_LIMIT) != head:
        differs = f"{mesh.named(SOURCE)} announces other weights than this rank has a part of"
    _vote(mesh, differs)
    for message in _messages(staged.area, bucket_bytes):
        mesh.send(message, sources)
    return len(head) + area_bytes(manifest)


def receive_weights(manifest: Sequence[TensorSpec], mesh: Mesh, bucket_bytes: int) -> StagedWeights:
    """Receive what the other ranks send, with the digest of what arrived.

    WeightsError, before any weight travels, if the source's manifest is not `manifest` (of the receiver's own model).
    """
    head = _read(receive_head(mesh, HEAD_LIMIT))
    _vote(mesh, head if isinstance(head, str) else _objection(manifest, head, mesh.size - 1, bucket_bytes))
    assert isinstance(head, _Head)
    area = allocate(manifest)
    if head.layout is None:
        for message in _messages(area, bucket_bytes):
            mesh.recv(message, SOURCE)
    else:
        shared = Shared(head.manifest, head.layout)
        for rank, boxes in enumerate(shared.owned()):
            _receive_part(area, shared.part(boxes), boxes, mesh, rank, bucket_bytes)
    return StagedWeights(area, digest_of(area.tensors))


def _receive_part(area: Area, own: list[TensorSpec], boxes: dict[str, Box], mesh: Mesh, rank: int, most: int) -> None:
    """Take what one source owns, some boxes at a time, and put them where they belong in the whole tensors."""
    for group in _groups(own, most):
        memory = torch.empty(area_bytes(group), dtype=torch.uint8)
        for bucket in _buckets(memory, most):
            mesh.recv(bucket, rank)
        for name, part in tensor_views(memory, group).items():
            whole = area.tensors[name]
            whole[boxes[name].within(Box.whole(whole.shape))].copy_(part)


def _messages(area: Area, most: int) -> Iterator[Tensor]:
    """The memory of a staged copy as it travels: so that a message holds whole tensors, or a part of one."""
    start = 0
    for group in _groups(area.manifest, most):
        stop = start + area_bytes(group)
        yield from _buckets(area.memory[start:stop], most)
        start = stop


def _groups(manifest: Sequence[TensorSpec], most: int) -> Iterator[list[TensorSpec]]:
    """A manifest in groups, each of at most `most` bytes or of one tensor."""
    group: list[TensorSpec] = []
    size = 0
    for spec in manifest:
        nbytes = area_bytes([spec])
        if group and size + nbytes > most:
            yield group
            group, size = [], 0
        group.append(spec)
        size += nbytes
    if group:
        yield group


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
            f"expected all {mesh.size} ranks to agree on the weights that travel, {int(against)} refused; "
            f"their errors say why"
        )


def _read(raw: bytes) -> _Head | str:
    """The head, or why it is none."""
    try:
        return msgspec.msgpack.decode(raw, type=_Head)
    except msgspec.MsgspecError as error:
        return f"expected a manifest from the source, got bytes that are none: {error}"


def _objection(manifest: Sequence[TensorSpec], head: _Head, sources: int, bucket_bytes: int) -> str | None:
    """What keeps a receiver with `manifest` from taking weights with this head from so many sources."""
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
    shared_by = head.layout.parallel.world if head.layout is not None else 1
    if shared_by != sources:
        return f"expected weights of {sources} sources, as the mesh has, got the layout of {shared_by}: {head.layout}"
    return None


def _described(spec: TensorSpec | None) -> str:
    return "no further tensor" if spec is None else f"{spec.name} ({spec.dtype} {spec.shape})"
