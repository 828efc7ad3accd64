"""Members: which policies take part in a step, and over which mesh.

A *member* is a ready policy that holds the committed state (or is about to apply the commit that leads to it). Two
members or more need a formed gradients mesh of exactly them before a step begins. A joiner takes part in the first step
of a batch, with an empty share, while it receives the state (see core/joining.py).
"""

from __future__ import annotations

from services.controller.core.fleet import Replica
from services.controller.core.joining import Join
from services.controller.core.meshes import Mesh
from services.controller.core.state import Turn
from shared.messages import MeshMember


def members(turn: Turn) -> list[Replica]:
    """The policies that take part in the next step, by name; those of a former term may be yet to be heard from."""
    state, step = turn.state, turn.state.steps.step
    due = step.shares if step is not None and step.state == "committed" else {}
    return [
        replica
        for replica in state.fleet.live("policy")
        if replica.state == "ready" and (replica.position == state.lineages.committed or replica.name in due)
    ]


def step_members(turn: Turn) -> tuple[list[Replica], int | None] | None:
    """Who computes the step whose turn it is, and over which mesh; None while it has to wait.

    A joiner comes last. Members of a former term are waited for, until `timeouts.rejoin_s` at most.
    """
    state, batch, group = turn.state, turn.state.steps.batch, members(turn)
    if not group or batch is None or not all(replica.confirmed for replica in group):
        return None
    join = state.joining.join
    if join is not None and batch.index == 0 and _stands(turn, join):
        return [*group, state.fleet.replicas[join.joiner]], join.gradients_mesh
    if len(group) == 1:
        return group, None
    mesh = gradients_mesh(turn, group)
    return (group, mesh.epoch) if mesh is not None and mesh.state == "formed" else None


def begin_transfer(turn: Turn, members: list[Replica]) -> None:
    """A step begins: if the joiner is in it, the source sends the state that it starts from."""
    state, join = turn.state, turn.state.joining.join
    if join is not None and join.position is None and any(replica.name == join.joiner for replica in members):
        join.position = state.lineages.committed
        join.deadline = state.now + turn.recipe.timeouts.transfer_s


def undecided(turn: Turn) -> bool:
    """Whether a member of the step in hand has yet to prove that it holds the state that the step starts from."""
    step, join = turn.state.steps.step, turn.state.joining.join
    return step is not None and join is not None and join.joiner in step.shares


def gradients_mesh(turn: Turn, group: list[Replica]) -> Mesh | None:
    """The newest gradients mesh of exactly these."""
    live, named = turn.state.meshes.meshes, [replica.member for replica in group]
    known = [live[epoch] for epoch in turn.state.joining.gradients if epoch in live]
    return next((mesh for mesh in reversed(known) if same(mesh.members, named)), None)


def same(one: list[MeshMember], other: list[MeshMember]) -> bool:
    """Whether these are the same incarnations, in whatever order."""
    return {(m.replica, m.incarnation) for m in one} == {(m.replica, m.incarnation) for m in other}


def _stands(turn: Turn, join: Join) -> bool:
    """Whether both meshes of a join have formed."""
    live, joiner = turn.state.meshes.meshes, turn.state.fleet.replicas[join.joiner]
    meshes = [live.get(join.state_mesh), live.get(join.gradients_mesh)]
    return joiner.confirmed and all(mesh is not None and mesh.state == "formed" for mesh in meshes)
