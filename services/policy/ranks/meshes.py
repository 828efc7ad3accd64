"""Meshes of replicas with several ranks. Rank 0 passes on what the controller issues.

A gradients mesh is one group for each rank, of that rank of every replica: the members of the identity are the ranks 0,
and rank n derives from it the identity of its own group. A weights mesh is one group, of all ranks of the source and
its receiver; a state mesh is of the ranks 0 alone. Invariant: the controller hears `MeshFormed` once all ranks of this
replica that take part stand, and the first failure of any of them, which ends the epoch on all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, TypedDict

import msgspec

from services.policy.ranks.orders import AnyOrder, Form, Revoke
from shared.config import Recipe
from shared.mesh.membership import MeshMembership
from shared.messages import (
    AnyMessage,
    FormMesh,
    MeshFailed,
    MeshFormed,
    MeshMember,
    RevokeMesh,
)


class Bounds(TypedDict):
    """What a policy's MeshMembership is made with."""

    interface: str
    operation_timeout_s: float
    reduction_timeout_s: float


def bounds(recipe: Recipe) -> Bounds:
    """The same on every rank."""
    return Bounds(
        interface=recipe.weights.interface,
        operation_timeout_s=recipe.timeouts.transfer_s,
        reduction_timeout_s=recipe.timeouts.step_s / 2,  # so that a member says so before the step has run out
    )


def of_rank(message: FormMesh, rank: int) -> FormMesh:
    """What this rank is to form: of a gradients mesh the same replicas, with an id of its own."""
    issued = message.identity
    if issued.purpose != "gradients":
        return message
    members = [MeshMember(member.replica, member.incarnation, rank) for member in issued.members]
    if issued.backend == "nccl":
        unique_id = issued.further_ids[rank - 1]
    else:
        unique_id = issued.unique_id + f"/{rank}".encode()
    return msgspec.structs.replace(
        message, identity=msgspec.structs.replace(issued, members=members, unique_id=unique_id)
    )


class Telling(Protocol):
    """Who passes orders on to the other ranks; the crew."""

    def tell(self, order: AnyOrder) -> None:
        """Send an order that nobody answers."""


class ReplicaMeshes(MeshMembership):
    """Rank 0's meshes; one of gradients or weights is of all `world` ranks of the replica."""

    def __init__(
        self,
        member: MeshMember,
        request: Callable[[AnyMessage, float], AnyMessage],
        send: Callable[[AnyMessage], object],
        recipe: Recipe,
        crew: Telling,
        world: int,
    ) -> None:
        super().__init__(member, request, lambda message: self.hear(0, message), **bounds(recipe))
        self._tell, self._crew, self._world = send, crew, world
        self._counting = threading.Lock()
        self._standing: dict[int, set[int]] = {}

    def form(self, message: FormMesh) -> None:
        """Build the groups of all ranks. Idempotent: asked again, all say again what they have."""
        if message.identity.purpose != "state":
            with self._counting:
                self._standing[message.identity.epoch] = set()
            self._crew.tell(Form(message))
        super().form(message)

    def revoke(self, message: RevokeMesh) -> None:
        """Leave the groups of that epoch on all ranks."""
        with self._counting:
            shared = self._standing.pop(message.epoch, None) is not None
        if shared:
            self._crew.tell(Revoke(message))
        super().revoke(message)

    def hear(self, rank: int, message: AnyMessage) -> None:
        """What a rank says of its group; thread-safe."""
        assert isinstance(message, MeshFormed | MeshFailed)
        with self._counting:
            standing = self._standing.get(message.epoch)
            if standing is not None and isinstance(message, MeshFormed):
                standing.add(rank)
                if len(standing) < self._world:
                    return
            elif standing is not None:
                del self._standing[message.epoch]
        if standing is None and rank != 0:
            return  # of an epoch that has ended for all
        if standing is not None and isinstance(message, MeshFailed):
            ended = RevokeMesh(message.epoch, f"rank {rank} failed: {message.cause}")
            self._crew.tell(Revoke(ended))
            super().revoke(ended)
            message = MeshFailed(message.epoch, f"rank {rank}: {message.cause}")
        self._tell(message)
