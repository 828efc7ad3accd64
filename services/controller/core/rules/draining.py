"""Leaving of one's own will: a replica is asked to go, given nothing new, and told `Drain` once nobody needs it.

    ready -> asked to leave -> draining -> left

Rollouts and evaluators drain at once. A policy that others can replace does too: it stays a member of the step in hand,
and is no member of the next. The only policy that holds what is committed but not settled first hands its state over:
no new batch begins, a checkpoint is written, and then it goes, so that nothing has to be trained again.
"""

from __future__ import annotations

from services.controller.core.fleet import Replica
from services.controller.core.outcome import Draining
from services.controller.core.state import State, Turn


def drain_replicas(turn: Turn) -> bool:
    """Whoever was asked to leave, and may, gets nothing new from now on."""
    state = turn.state
    drained = False
    for name, cause in list(state.fleet.leaving.items()):
        replica = state.fleet.replicas[name]
        if state.stages.outcome or hands_over(turn, replica):
            continue
        del state.fleet.leaving[name]
        state.fleet.move(replica, "draining", state.now)
        replica.deadline = gone_by(turn, replica)
        turn.fact(Draining(name, replica.incarnation, cause))
        drained = True
    return drained


def gone_by(turn: Turn, replica: Replica) -> float:
    """When a draining replica is given up; a policy may have a step to finish first."""
    times = turn.recipe.timeouts
    return turn.state.now + times.exit_s + (times.step_s if replica.role == "policy" else 0.0)


def hands_over(turn: Turn, replica: Replica) -> bool:
    """Whether this replica has to stay until a checkpoint holds what it alone has."""
    state = turn.state
    if replica.role != "policy" or replica.state != "ready":
        return False
    if any(other.name not in state.fleet.leaving for other in state.fleet.ready("policy")):
        return False
    steps, lineages = state.steps, state.lineages
    if steps.batch is not None or steps.step is not None:
        return True
    # a checkpoint that cannot be written is no reason to stay for ever
    return lineages.settled != lineages.committed and lineages.failed != lineages.committed


def somebody_hands_over(turn: Turn) -> bool:
    """Whether a policy waits for the batch's end and a checkpoint to leave: then no new batch begins."""
    fleet = turn.state.fleet
    return any(hands_over(turn, fleet.replicas[name]) for name in fleet.leaving)


def needed(state: State, replica: Replica) -> bool:
    """Whether a draining replica still has a part in something that others wait for."""
    step, saving = state.steps.step, state.lineages.saving
    if step is not None and replica.name in step.shares and replica.name not in step.applied:
        return True
    if saving is not None and saving.replica == replica.name:
        return True
    edges = state.weights.over(state.meshes.epochs_of(replica.name))
    return any(edge.source == replica.name and edge.position is not None for edge in edges)
