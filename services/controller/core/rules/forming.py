"""How the attempt at a mesh begins: over which backend, and with how many unique ids."""

from __future__ import annotations

from typing import Literal

from services.controller.core.fleet import Replica
from services.controller.core.meshes import Mesh, Purpose
from services.controller.core.outcome import MintMeshId
from services.controller.core.state import Turn
from shared.messages import MeshMember

Meeting = list[tuple[Replica, int]]
"""Ranks that are one process group: (replica, rank)."""


def begin_mesh(turn: Turn, purpose: Purpose, group: list[Replica]) -> Mesh:
    """A new attempt: its ids are asked for now, and its members told when they are there.

    Of weights, `group` is a source, of which all ranks that weights come from are members, and a receiver.
    """
    state, timeouts = turn.state, turn.recipe.timeouts
    members = [*group[0].sources, group[1].member] if purpose == "weights" else [replica.member for replica in group]
    meetings = _meetings(purpose, group, members)
    backend = _backend(turn, meetings)
    until = state.now + (timeouts.mint_s if backend == "nccl" else timeouts.mesh_s)
    mesh = state.meshes.begin(purpose, backend, members, until)
    if backend == "nccl":
        turn.effect(MintMeshId(mesh.epoch, backend, len(meetings), group[0].devices[0].nccl))
    else:
        turn.effect(MintMeshId(mesh.epoch, backend))
    return mesh


def _backend(turn: Turn, meetings: list[Meeting]) -> Literal["gloo", "nccl"]:
    wanted = turn.recipe.weights.backend
    if wanted != "auto":
        return wanted
    for meeting in meetings:
        gpus = {replica.devices[rank].gpu for replica, rank in meeting if rank in replica.devices}
        if len(gpus) < len(meeting):  # NCCL takes a GPU once in a communicator
            return "gloo"
    return "nccl"


def _meetings(purpose: Purpose, group: list[Replica], members: list[MeshMember]) -> list[Meeting]:
    """For gradients one for each rank, of that rank of every replica; else one, of the members."""
    if purpose == "gradients":
        return [[(replica, rank) for replica in group] for rank in range(max(replica.world for replica in group))]
    named = {replica.name: replica for replica in group}
    return [[(named[member.replica], member.rank) for member in members]]
