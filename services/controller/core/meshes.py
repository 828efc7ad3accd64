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

from shared.messages import MeshIdentity, MeshMember

RETRY_S = 1.0
"""Pause after a failed attempt, doubled with each one in a row, so that a broken network isn't hammered."""
RETRY_MOST_S = 16.0
REVOKED_KEPT = 256
"""Revoked epochs whose members are remembered, for those that were not there to be told."""
Purpose = Literal["gradients", "state", "weights"]


class Retry(msgspec.Struct):
    """How often in a row the meshes of one kind have failed, with whom the last one, and when the next may begin."""

    failures: int = 0
    not_before: float = 0.0
    source: str = ""


class Mesh(msgspec.Struct):
    """One attempt at a process group. `used` is when an operation on it was last ordered.

    Several ranks of one replica may be members; its rank 0 says for all of them that they stand.
    """

    epoch: int
    purpose: Purpose
    backend: Literal["gloo", "nccl"]
    members: list[MeshMember]
    state: Literal["minting", "forming", "formed", "revoked"]
    deadline: float
    unique_id: bytes = b""
    formed: list[str] = []
    used: float = 0.0
    further_ids: list[bytes] = []

    @property
    def kind(self) -> str:
        """What its failures are counted under: the receiver of weights (its last member), else the purpose."""
        return self.members[-1].replica if self.purpose == "weights" else self.purpose

    @property
    def replicas(self) -> list[str]:
        """Whose ranks its members are, each once, in the order of the members."""
        return list(dict.fromkeys(member.replica for member in self.members))

    @property
    def identity(self) -> MeshIdentity:
        """What the members are told."""
        return MeshIdentity(
            purpose=self.purpose,
            epoch=self.epoch,
            backend=self.backend,
            unique_id=self.unique_id,
            members=self.members,
            further_ids=self.further_ids,
        )

    def has(self, replica: str) -> bool:
        """Whether a rank of this replica belongs to the mesh."""
        return replica in self.replicas


class Meshes(msgspec.Struct):
    """The live meshes by epoch, the members of those revoked last, and when the next attempts may begin.

    `memberships` and `unformed` index the live ones: by replica, and those that still form. A transfer of weights has a
    mesh of its own for each receiver, so that a broken one delays nobody else.
    """

    meshes: dict[int, Mesh] = {}
    memberships: dict[str, dict[int, None]] = {}
    unformed: dict[int, None] = {}
    revoked: dict[int, list[str]] = {}
    last_epoch: int = 0
    retries: dict[str, Retry] = {}

    def begin(
        self, purpose: Purpose, backend: Literal["gloo", "nccl"], members: list[MeshMember], deadline: float
    ) -> Mesh:
        """A new attempt with a new epoch; it waits for its unique id. The first member is the source, if one is."""
        self.last_epoch += 1
        mesh = Mesh(self.last_epoch, purpose, backend, members, "minting", deadline)
        self.meshes[mesh.epoch] = mesh
        self.unformed[mesh.epoch] = None
        for name in mesh.replicas:
            self.memberships.setdefault(name, {})[mesh.epoch] = None
        return mesh

    def minted(self, epoch: int, unique_id: bytes, deadline: float, further_ids: list[bytes] | None = None) -> None:
        """The unique id is there: the members can be told. An epoch revoked meanwhile stays revoked."""
        mesh = self.meshes.get(epoch)
        if mesh is not None and mesh.state == "minting":
            mesh.unique_id, mesh.state, mesh.deadline = unique_id, "forming", deadline
            mesh.further_ids = further_ids or []

    def member_formed(self, epoch: int, replica: str) -> bool:
        """A replica's members stand; the mesh is formed when all do. Whether it is formed by this."""
        mesh = self.meshes.get(epoch)
        if mesh is None or mesh.state != "forming" or not mesh.has(replica) or replica in mesh.formed:
            return False
        mesh.formed.append(replica)
        if len(mesh.formed) < len(mesh.replicas):
            return False
        mesh.state = "formed"
        del self.unformed[epoch]
        if mesh.kind in self.retries:
            self.retries[mesh.kind].failures = 0
        return True

    def revoke(self, epoch: int, at: float, *, failed: bool) -> Mesh | None:
        """End a mesh for good; after a failure the next attempt waits a little. The mesh, unless it had ended."""
        mesh = self.meshes.pop(epoch, None)
        if mesh is None:
            return None
        mesh.state = "revoked"
        self.unformed.pop(epoch, None)
        for name in mesh.replicas:
            del self.memberships[name][epoch]
            if not self.memberships[name]:
                del self.memberships[name]
        self.revoked[epoch] = mesh.replicas
        if len(self.revoked) > REVOKED_KEPT:
            del self.revoked[next(iter(self.revoked))]
        if failed:
            retry = self.retries.setdefault(mesh.kind, Retry())
            retry.not_before = at + min(RETRY_S * 2**retry.failures, RETRY_MOST_S)
            retry.failures += 1
            retry.source = mesh.members[0].replica
        return mesh

    def may_begin(self, kind: str, at: float) -> bool:
        """Whether the pause after a failure is over."""
        retry = self.retries.get(kind)
        return retry is None or at >= retry.not_before

    def forget(self, kind: str) -> None:
        """It worked, or whom it was for is gone: the next failure is the first one again."""
        self.retries.pop(kind, None)

    def revoked_of(self, replica: str) -> list[int]:
        """The epochs revoked last that a replica was a member of."""
        return [epoch for epoch, names in self.revoked.items() if replica in names]

    def epochs_of(self, replica: str) -> list[int]:
        """The live meshes that a replica is a member of, oldest first."""
        return list(self.memberships.get(replica, ()))

    def held_by(self, replica: str) -> list[Mesh]:
        """The live meshes that a replica is a member of, oldest first."""
        return [self.meshes[epoch] for epoch in self.memberships.get(replica, ())]

    def of(self, purpose: Purpose, source: str, receiver: str) -> Mesh | None:
        """The live mesh of a purpose whose first member is the one and whose last is the other (the newest)."""
        for mesh in reversed(self.held_by(receiver)):
            ends = mesh.members[0].replica, mesh.members[-1].replica
            if mesh.purpose == purpose and ends == (source, receiver):
                return mesh
        return None
