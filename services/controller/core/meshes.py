"""The meshes: which process groups exist, by epoch.

    minting -> forming -> formed -> revoked

The controller alone issues a mesh's identity; every attempt has a new epoch and a new unique id. The first error of a
member revokes the mesh for all, and so does the loss of a member. Meshes that were forming when a controller died are
void in the next term; formed ones live on.

The transition that must not exist: revoked -> anything. A retry is a new epoch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.messages import MeshIdentity, MeshMember, Role

RETRY_S = 1.0
"""Pause after a failed attempt, doubled with each one in a row, so that a broken network isn't hammered."""
RETRY_MOST_S = 16.0
REVOKED_KEPT = 16
"""Revoked epochs whose members are remembered, for those that were not there to be told."""


class Retry(msgspec.Struct):
    """How often in a row the mesh for some receivers has failed, and when the next attempt may begin."""

    failures: int = 0
    not_before: float = 0.0


class Mesh(msgspec.Struct):
    """One attempt at a process group. `receivers` is the role that takes weights over it."""

    epoch: int
    purpose: Literal["gradients", "state", "weights"]
    receivers: Role
    backend: Literal["gloo", "nccl"]
    members: list[MeshMember]
    state: Literal["minting", "forming", "formed", "revoked"]
    deadline: float
    unique_id: bytes = b""
    formed: list[str] = []

    @property
    def identity(self) -> MeshIdentity:
        """What the members are told."""
        return MeshIdentity(
            purpose=self.purpose,
            epoch=self.epoch,
            backend=self.backend,
            unique_id=self.unique_id,
            members=self.members,
        )

    def has(self, replica: str) -> bool:
        """Whether a rank of this replica belongs to the mesh."""
        return any(member.replica == replica for member in self.members)


class Meshes(msgspec.Struct):
    """The live meshes by epoch, the members of those revoked last, and when the next attempts may begin.

    Rollouts and evaluators have a mesh each, so that a broken one of the former never delays the latter, nor the other
    way round.
    """

    meshes: dict[int, Mesh] = {}
    revoked: dict[int, list[str]] = {}
    last_epoch: int = 0
    retries: dict[Role, Retry] = {}

    def begin(
        self,
        purpose: Literal["gradients", "state", "weights"],
        receivers: Role,
        backend: Literal["gloo", "nccl"],
        members: list[MeshMember],
        deadline: float,
    ) -> Mesh:
        """A new attempt with a new epoch; it waits for its unique id."""
        self.last_epoch += 1
        mesh = Mesh(self.last_epoch, purpose, receivers, backend, members, "minting", deadline)
        self.meshes[mesh.epoch] = mesh
        return mesh

    def minted(self, epoch: int, unique_id: bytes, deadline: float) -> None:
        """The unique id is there: the members can be told. An epoch revoked meanwhile stays revoked."""
        mesh = self.meshes.get(epoch)
        if mesh is not None and mesh.state == "minting":
            mesh.unique_id, mesh.state, mesh.deadline = unique_id, "forming", deadline

    def member_formed(self, epoch: int, replica: str) -> None:
        """A member stands; the mesh is formed when all do."""
        mesh = self.meshes.get(epoch)
        if mesh is None or mesh.state != "forming" or not mesh.has(replica) or replica in mesh.formed:
            return
        mesh.formed.append(replica)
        if len(mesh.formed) == len(mesh.members):
            mesh.state = "formed"
            self._retry(mesh.receivers).failures = 0

    def revoke(self, epoch: int, at: float, *, failed: bool) -> Mesh | None:
        """End a mesh for good; after a failure the next attempt waits a little. The mesh, unless it had ended."""
        mesh = self.meshes.pop(epoch, None)
        if mesh is None:
            return None
        mesh.state = "revoked"
        self.revoked[epoch] = [member.replica for member in mesh.members]
        if len(self.revoked) > REVOKED_KEPT:
            del self.revoked[next(iter(self.revoked))]
        if failed:
            retry = self._retry(mesh.receivers)
            retry.not_before = at + min(RETRY_S * 2**retry.failures, RETRY_MOST_S)
            retry.failures += 1
        return mesh

    def may_begin(self, receivers: Role, at: float) -> bool:
        """Whether the pause after a failure is over."""
        return at >= self._retry(receivers).not_before

    def _retry(self, receivers: Role) -> Retry:
        return self.retries.setdefault(receivers, Retry())

    def revoked_of(self, replica: str) -> list[int]:
        """The epochs revoked last that a replica was a member of."""
        return [epoch for epoch, names in self.revoked.items() if replica in names]

    def of(self, purpose: str, receivers: Role) -> Mesh | None:
        """The live mesh of a purpose for these receivers (the newest, should there be two)."""
        live = [mesh for mesh in self.meshes.values() if (mesh.purpose, mesh.receivers) == (purpose, receivers)]
        return max(live, key=lambda mesh: mesh.epoch) if live else None
