"""Orders: what each replica should be doing, derived from the state alone.

The core never remembers a command to repeat it: it derives what is outstanding, compares with what the replica was
sent in its session, and sends the difference. A replica that comes back, or a new term, only empties that memory.

Nobody else is looked at than those whose outstanding orders can have grown in this turn (`_concerned`), so that an
event costs the same in a fleet of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from services.controller.core.events import MeshIdMinted, ReplicaRegistered, Spooled
from services.controller.core.fleet import Replica
from services.controller.core.ledger import PURPOSES
from services.controller.core.outcome import Assigned, Draining, Leased
from services.controller.core.rules.draining import needed
from services.controller.core.rules.leasing import grant
from services.controller.core.rules.training import train_step
from services.controller.core.state import Turn
from shared.messages import (
    AnyMessage,
    CommitStep,
    Drain,
    FormMesh,
    Lease,
    LoadState,
    ReceiveWeights,
    SaveCheckpoint,
    SendWeights,
    Shutdown,
)

Order = tuple[str, Callable[[], AnyMessage | tuple[AnyMessage, list[Spooled]]]]
"""How `sent` remembers an order, and what makes its message (and tells where the payload lies)."""


def give_orders(turn: Turn) -> None:
    """Send what is outstanding and was not sent in the replica's session yet."""
    state = turn.state
    for name in _concerned(turn):
        replica = state.fleet.replicas.get(name)
        if replica is None or not replica.live or not replica.confirmed or replica.state == "joining":
            continue
        known = state.sent.get(name, ())
        outstanding: list[str] = []
        for key, make in _orders(turn, replica):
            outstanding.append(key)
            if key not in known:
                made = make()
                message, payload = made if isinstance(made, tuple) else (made, [])
                turn.send(replica, message, payload)
        state.sent[name] = outstanding
        untold = [group for group in state.ledger.held_by(name) if not group.told]
        for purpose in PURPOSES:  # apart, so that a deterministic run's waves are composed alike whatever is judged
            grants = [grant(turn, group) for group in untold if group.purpose == purpose]
            if grants:
                turn.send(replica, Lease(grants))
        for group in untold:
            group.told = True


def _concerned(turn: Turn) -> list[str]:
    """Who may have something new to do: policies, who registered, was leased groups, is to form or use a mesh, drains.

    When the run ends, everybody.
    """
    state = turn.state
    if state.stages.outcome and not turn.was_over:
        return [replica.name for replica in state.fleet.live()]
    names = {replica.name for replica in state.fleet.live("policy")}
    names |= {fact.replica for fact in turn.outcome.facts if isinstance(fact, Leased | Draining)}
    if isinstance(turn.event, ReplicaRegistered):
        names.add(turn.event.register.replica)
    if isinstance(turn.event, MeshIdMinted) and turn.event.epoch in state.meshes.meshes:
        names |= {member.replica for member in state.meshes.meshes[turn.event.epoch].members}
    transfer = state.weights.transfer
    if transfer is not None and transfer is not turn.transfer_before:
        names |= {transfer.source, *transfer.receivers}
    return sorted(names)


def _orders(turn: Turn, replica: Replica) -> Iterator[Order]:
    state = turn.state
    if state.stages.outcome:
        yield "shutdown", partial(Shutdown, f"the run is {state.stages.outcome}: {state.stages.cause}")
        return
    if replica.state == "loading":
        yield from _loading(turn, replica)
    if replica.state == "draining" and not needed(state, replica):
        yield "drain", partial(Drain, "it was asked to leave, and nothing waits for it")
    for mesh in state.meshes.meshes.values():
        if mesh.state == "forming" and mesh.has(replica.name) and replica.name not in mesh.formed:
            yield f"form {mesh.epoch}", partial(FormMesh, mesh.identity, turn.recipe.timeouts.mesh_s)
    transfer = state.weights.transfer
    if transfer is not None:
        if replica.name in transfer.receivers and replica.name not in transfer.loaded:
            yield (
                f"receive {transfer.epoch} {transfer.position}",
                partial(ReceiveWeights, transfer.epoch, transfer.position),
            )
        if replica.name == transfer.source and transfer.digest is None:
            yield f"send {transfer.epoch} {transfer.position}", partial(SendWeights, transfer.epoch, transfer.position)
    saving = state.lineages.saving
    if saving is not None and saving.replica == replica.name:
        key = f"save {saving.position} {saving.export} {state.lineages.failures}"  # a failed one is ordered anew
        yield key, partial(SaveCheckpoint, saving.position, "checkpoints", saving.export)
    step = state.steps.step
    if step is not None and replica.name in step.shares:
        if step.state == "computing" and replica.name not in step.votes:
            yield f"train {step.attempt}", partial(_train_step, turn, replica.name, step.attempt)
        if step.state == "committed" and replica.name not in step.applied:
            yield f"commit {step.attempt}", partial(CommitStep, step.step, step.attempt, state.lineage)


def _train_step(turn: Turn, replica: str, attempt: int) -> tuple[AnyMessage, list[Spooled]]:
    """As it was put on record in this very turn, or, for a replica that is back, made again."""
    for fact in turn.outcome.facts:
        if isinstance(fact, Assigned) and (fact.replica, fact.attempt) == (replica, attempt):
            return fact.message, fact.payload
    return train_step(turn, replica)


def _loading(turn: Turn, replica: Replica) -> Iterator[Order]:
    """A rollout makes its engine; a policy loads the settled state, if that is the committed one."""
    lineages = turn.state.lineages
    if replica.role == "policy" and lineages.settled != lineages.committed:
        return
    position = lineages.settled
    if replica.role == "policy" and lineages.path:
        yield f"load {position}", partial(LoadState, "checkpoint", position, lineages.path)
    else:
        yield f"load {position}", partial(LoadState, "initial", position, "")
