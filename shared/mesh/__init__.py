"""Process groups built on demand from identities that the controller issues: `form_mesh`, `Mesh`, `MeshError`."""

from __future__ import annotations

from collections.abc import Callable

from shared.mesh.base import Mesh, MeshError
from shared.mesh.gloo import GlooMesh
from shared.mesh.store import Request
from shared.messages import MeshIdentity

__all__ = ["Mesh", "MeshError", "form_mesh"]


def form_mesh(
    identity: MeshIdentity,
    rank: int,
    request: Request,
    *,
    interface: str,
    form_timeout_s: float,
    operation_timeout_s: float,
    ended: Callable[[], str | None] = lambda: None,
) -> Mesh:
    """Join the mesh of `identity` as `rank`; returns when all members have joined, or raises MeshError.

    `request` asks the controller (`BusClient.request`); `interface` is the network interface to meet on.
    `form_timeout_s` bounds the forming, `operation_timeout_s` each later operation; `ended` tells why an NCCL mesh that
    is still forming is over already (members of Gloo's ask the controller, and hear it there).
    """
    if identity.backend == "nccl":
        from shared.mesh.nccl import NcclMesh

        return NcclMesh(
            identity,
            rank,
            form_timeout_s=form_timeout_s,
            operation_timeout_s=operation_timeout_s,
            ended=ended,
        )
    return GlooMesh(
        identity,
        rank,
        request,
        interface=interface,
        form_timeout_s=form_timeout_s,
        operation_timeout_s=operation_timeout_s,
    )
