"""Orders: what each replica should be doing, derived from the state alone.

The core never remembers a command to repeat it: it derives what is outstanding, compares with what the replica was
sent in its session, and sends the difference. A replica that comes back, or a new term, only empties that memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.controller.core.events import Spooled
from services.controller.core.fleet import Replica
from services.controller.core.rules.leasing import grant
from services.controller.core.rules.training import train_step
from services.controller.core.state import Turn
from shared.messages import (
    AnyMessage,
    CommitStep,
    FormMesh,
    Lease,
    LoadState,
    ReceiveWeights,
    SaveCheckpoint,
    SendWeights,
    Shutdown,
)

Order = tuple[str, AnyMessage, list[Spooled]]


def give_orders(turn: Turn) -> None:
    """Send every replica what is outstanding and was not sent in its session yet."""
    state = turn.state
    for replica in state.fleet.live():
        if not replica.confirmed or replica.state == "joining":
            continue
        known = set(state.sent.get(replica.name, ()))
        outstanding: list[str] = []
        for key, message, payload in _orders(turn, replica):
            outstanding.append(key)
            if key not in known:
                turn.send(replica, message, payload)
        grants = []
        for group in state.ledger.held_by(replica.name):
            key = lease_key(group.id, group.attempt)
            outstanding.append(key)
            if key not in known:
                grants.append(grant(turn, group))
        if grants:
            turn.send(replica, Lease(grants))
        state.sent[replica.name] = outstanding


def lease_key(group: int, attempt: int) -> str:
    """How `sent` remembers a lease."""
    return f"lease {group}/{attempt}"


def _orders(turn: Turn, replica: Replica) -> Iterator[Order]:
    state = turn.state
    if state.stages.outcome:
        yield "shutdown", Shutdown(f"the run is {state.stages.outcome}: {state.stages.cause}"), []
        return
    if replica.state == "loading":
        yield from _loading(turn, replica)
    for mesh in state.meshes.meshes.values():
        if mesh.state == "forming" and mesh.has(replica.name) and replica.name not in mesh.formed:
            yield f"form {mesh.epoch}", FormMesh(mesh.identity, turn.recipe.timeouts.mesh_s), []
    transfer = state.weights.transfer
    if transfer is not None:
        if replica.name in transfer.receivers and replica.name not in transfer.loaded:
            yield f"receive {transfer.epoch} {transfer.position}", ReceiveWeights(transfer.epoch, transfer.position), []
        if replica.name == transfer.source and transfer.digest is None:
            yield f"send {transfer.epoch} {transfer.position}", SendWeights(transfer.epoch, transfer.position), []
    saving = state.lineages.saving
    if saving is not None and saving.replica == replica.name:
        yield f"save {saving.position}", SaveCheckpoint(saving.position, "checkpoints", saving.export), []
    step = state.steps.step
    if step is not None and replica.name in step.shares:
        if step.state == "computing" and replica.name not in step.votes:
            message, payload = train_step(turn, replica.name)
            yield f"train {step.attempt}", message, payload
        if step.state == "committed" and replica.name not in step.applied:
            yield f"commit {step.attempt}", CommitStep(step.step, step.attempt, state.lineage), []


def _loading(turn: Turn, replica: Replica) -> Iterator[Order]:
    """A rollout makes its engine; a policy loads the settled state, if that is the committed one."""
    lineages = turn.state.lineages
    if replica.role == "policy" and lineages.settled != lineages.committed:
        return
    position = lineages.settled
    if replica.role == "policy" and lineages.path:
        yield f"load {position}", LoadState("checkpoint", position, lineages.path), []
    else:
        yield f"load {position}", LoadState("initial", position, ""), []
