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
    CheckState,
    CommitStep,
    Drain,
    FormMesh,
    Lease,
    LoadState,
    ReceiveState,
    ReceiveWeights,
    SaveCheckpoint,
    SendState,
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
            groups = [group for group in untold if group.purpose == purpose]
            begun = [group.partial_at for group in groups if group.partial_at is not None]
            if groups:
                turn.send(replica, Lease([grant(turn, group) for group in groups]), begun)
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
    return sorted(names | turn.concerned)


def _orders(turn: Turn, replica: Replica) -> Iterator[Order]:
    state = turn.state
    if state.stages.outcome:
        yield "shutdown", partial(Shutdown, f"the run is {state.stages.outcome}: {state.stages.cause}")
        return
    if replica.state == "loading":
        yield from _loading(turn, replica)
    if replica.state == "draining" and not needed(state, replica):
        yield "drain", partial(Drain, "it was asked to leave, and nothing waits for it")
    for mesh in state.meshes.held_by(replica.name):
        if mesh.state == "forming" and replica.name not in mesh.formed:
            yield f"form {mesh.epoch}", partial(FormMesh, mesh.identity, turn.recipe.timeouts.mesh_s)
        edge = state.weights.edges.get(mesh.epoch)
        if edge is None or edge.position is None:
            continue
        if replica.name == edge.receiver and edge.loaded is None:
            yield f"receive {edge.epoch} {edge.position}", partial(ReceiveWeights, edge.epoch, edge.position)
        if replica.name == edge.source and not edge.sent:
            yield f"send {edge.epoch} {edge.position}", partial(SendWeights, edge.epoch, edge.position)
    yield from _joining(turn, replica)
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


def _joining(turn: Turn, replica: Replica) -> Iterator[Order]:
    """State from policy to policy, before the step that starts from it; digests, before the step that changes them."""
    join, comparison = turn.state.joining.join, turn.state.joining.comparison
    if join is not None and join.position is not None:
        if replica.name == join.source and join.sent is None:
            yield f"send state {join.state_mesh}", partial(SendState, join.state_mesh, join.position)
        if replica.name == join.joiner and join.received is None:
            yield f"receive state {join.state_mesh}", partial(ReceiveState, join.state_mesh, join.position)
    asked = comparison.asked.get(replica.name) == replica.incarnation if comparison is not None else False
    if comparison is not None and asked and replica.name not in comparison.digests:
        yield f"check {comparison.position}", partial(CheckState, comparison.position)


def _train_step(turn: Turn, replica: str, attempt: int) -> tuple[AnyMessage, list[Spooled]]:
    """As it was put on record in this very turn, or, for a replica that is back, made again."""
    for fact in turn.outcome.facts:
        if isinstance(fact, Assigned) and (fact.replica, fact.attempt) == (replica, attempt):
            return fact.message, fact.payload
    return train_step(turn, replica)


def _loading(turn: Turn, replica: Replica) -> Iterator[Order]:
    """A rollout makes its engine; a policy loads the settled state if that is the committed one, else its model."""
    lineages = turn.state.lineages
    if replica.role == "policy" and (replica.doubtful or lineages.settled != lineages.committed):
        yield "load from a peer", partial(LoadState, "peer", lineages.committed, "")
        return
    position = lineages.settled
    if replica.role == "policy" and lineages.path:
        yield f"load {position}", partial(LoadState, "checkpoint", position, lineages.path)
    else:
        yield f"load {position}", partial(LoadState, "initial", position, "")
