"""How the attempt at a mesh begins: over which backend, and with how many unique ids."""

from __future__ import annotations

from typing import Literal

from services.controller.core.fleet import Replica
from services.controller.core.meshes import Mesh, Purpose
from services.controller.core.outcome import MintMeshId
from services.controller.core.state import Turn


def begin_mesh(turn: Turn, purpose: Purpose, group: list[Replica]) -> Mesh:
    """A new attempt: its ids are asked for now, and its members told when they are there."""
    state, timeouts = turn.state, turn.recipe.timeouts
    backend = _backend(turn, purpose, group)
    until = state.now + (timeouts.mint_s if backend == "nccl" else timeouts.mesh_s)
    mesh = state.meshes.begin(purpose, backend, [replica.member for replica in group], until)
    if backend == "nccl":
        turn.effect(MintMeshId(mesh.epoch, backend, len(_ranks(purpose, group)), group[0].devices[0].nccl))
    else:
        turn.effect(MintMeshId(mesh.epoch, backend))
    return mesh


def _backend(turn: Turn, purpose: Purpose, group: list[Replica]) -> Literal["gloo", "nccl"]:
    wanted = turn.recipe.weights.backend
    if wanted != "auto":
        return wanted
    for rank in _ranks(purpose, group):
        gpus = [replica.devices[rank].gpu for replica in group if rank in replica.devices]
        if len(set(gpus)) < len(group):  # NCCL takes a GPU once in a communicator
            return "gloo"
    return "nccl"


def _ranks(purpose: Purpose, group: list[Replica]) -> range:
    """The ranks of these replicas that meet, each with those of its number: for gradients all, else the ranks 0."""
    return range(max(replica.world for replica in group) if purpose == "gradients" else 1)
