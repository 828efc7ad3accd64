"""Losses: what a lost or leaving replica leaves behind, and the rollback when nobody holds the committed state."""

from __future__ import annotations

from services.controller.core.fleet import Replica
from services.controller.core.outcome import Gone, Issued, Part, RolledBack
from services.controller.core.rules.judging import drop_round
from services.controller.core.rules.leasing import drop_partial, give_back
from services.controller.core.rules.syncing import revoke_mesh
from services.controller.core.rules.training import abort_step
from services.controller.core.state import Turn


def lose(turn: Turn, replica: Replica, cause: str, *, left: bool = False) -> None:
    """This incarnation is gone: leases go back to the queue, its meshes end, its step is assigned anew."""
    state = turn.state
    state.fleet.move(replica, "left" if left else "lost", state.now)
    state.sent.pop(replica.name, None)
    turn.fact(Gone(replica.name, replica.incarnation, replica.state, cause))
    turn.effect(Part(replica.name, replica.incarnation))
    for epoch in state.meshes.epochs_of(replica.name):
        revoke_mesh(turn, epoch, f"{replica.name} is gone: {cause}", failed=False)
    state.meshes.forget(replica.name)
    for group in state.ledger.held_by(replica.name):
        if group.state == "leased":  # an earlier one may have taken its whole wave back already
            give_back(turn, group, f"{replica.name} is gone")
    step = state.steps.step
    if step is not None and replica.name in step.shares:
        if step.state == "computing":
            abort_step(turn, f"{replica.name} is gone")
        else:
            state.steps.drop_member(replica.name)
    saving = state.lineages.saving
    if saving is not None and saving.replica == replica.name:
        state.lineages.saving = None


def ask_to_leave(turn: Turn, replica: Replica, cause: str) -> None:
    """Somebody wants this live replica to go; `draining.drain_replicas` sees to it."""
    if replica.state == "joining":  # not all of its ranks are there, nobody has work for it
        lose(turn, replica, cause)
    elif replica.state != "draining":
        turn.state.fleet.leaving.setdefault(replica.name, cause)


def roll_back_if_orphaned(turn: Turn) -> bool:
    """When a policy is there to go on but none holds the committed state: a new lineage at the last checkpoint."""
    state = turn.state
    if state.stages.outcome or state.lineages.committed == state.lineages.settled:
        return False
    waiting = any(replica.state in ("loading", "stale") for replica in state.fleet.live("policy"))
    if not waiting or anyone_holds(turn):
        return False
    _roll_back(turn)
    return True


def anyone_holds(turn: Turn) -> bool:
    """Whether a live policy holds the committed state, or is about to."""
    return any(_holds(turn, replica) for replica in turn.state.fleet.live("policy"))


def _holds(turn: Turn, replica: Replica) -> bool:
    """Whether a live policy holds the committed state, or has the gradients of the commit that leads to it."""
    state, held = turn.state, replica.position
    if held is None:
        return False
    if held == state.lineages.committed:
        return True
    step = state.steps.step
    member = step is not None and step.state == "committed" and replica.name in step.shares
    return member and (held.lineage, held.step + 1) == (state.lineage, state.lineages.committed.step)


def _roll_back(turn: Turn) -> None:
    state = turn.state
    before = state.lineage
    if state.evaluation.round is not None:
        drop_round(turn, "rollback")
    for group in state.ledger.having("leased"):
        if group.state == "leased":
            give_back(turn, group, "rollback")
    for group in state.ledger.having("queued", "train"):
        if group.partial is not None:
            drop_partial(turn, group, "rollback")  # its next lessee's weights have no part in those that sampled it
    redo = [*state.steps.unsettled, *([state.steps.batch] if state.steps.batch else []), *state.steps.pending]
    position = state.lineages.roll_back()
    for group in sorted(state.ledger.groups.values(), key=lambda g: g.id):
        state.ledger.carry(group, before, position.lineage)
        turn.fact(Issued(position.lineage, group.id, group.purpose, True))
    for batch in redo:
        batch.index = 0
    state.steps.pending, state.steps.unsettled = redo, []
    state.steps.batch, state.steps.step = None, None
    state.joining.comparison = None
    state.stages.go_back(position.version)
    for mesh in list(state.meshes.meshes.values()):
        revoke_mesh(turn, mesh.epoch, "rollback", failed=False)
    for replica in state.fleet.live():
        if replica.role != "policy" and replica.state == "ready":
            state.fleet.move(replica, "stale", state.now)
    turn.fact(RolledBack(before, position.lineage, position.version, position.step, len(redo)))
