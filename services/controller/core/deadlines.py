"""Deadlines: when the core wants to be woken, and what has run out when it is. Nobody waits without one."""

from __future__ import annotations

import math
from collections.abc import Iterator

from services.controller.core.ledger import PURPOSES, Group
from services.controller.core.rules.joining import join_ran_out, mesh_failed
from services.controller.core.rules.leasing import drop_partial, give_back
from services.controller.core.rules.losing import lose
from services.controller.core.rules.saving import checkpoint_failed
from services.controller.core.rules.syncing import revoke_mesh
from services.controller.core.state import State, Turn
from shared.config import Recipe

_WAITS = {"joining": "timeouts.load_s", "loading": "timeouts.load_s", "draining": "timeouts.exit_s"}


def next_deadline(state: State, recipe: Recipe) -> float:
    """The earliest moment at which something runs out, in the controller's clock; never, once the run has ended."""
    return math.inf if state.stages.outcome else min(_moments(state, recipe), default=math.inf)


def _moments(state: State, recipe: Recipe) -> Iterator[float]:
    if not state.steering.paused:
        yield state.progressed + recipe.timeouts.stall_s
    for purpose in PURPOSES:
        group = state.ledger.first("leased", purpose)  # shelves are in order of deadlines
        if group is not None:
            yield group.deadline
    for replica in state.fleet.live():
        if replica.deadline is not None:
            yield replica.deadline
    for epoch in state.meshes.unformed:
        yield state.meshes.meshes[epoch].deadline
    if state.steps.step is not None:
        yield state.steps.step.deadline
    for edge in state.weights.edges.values():
        if edge.position is not None:
            yield edge.deadline
        if edge.since + recipe.weights.slow_s > state.now:
            yield edge.since + recipe.weights.slow_s
    if state.lineages.saving is not None:
        yield state.lineages.saving.deadline
    if state.stages.stopping:
        yield state.stages.stop_deadline
    if state.joining.join is not None and state.joining.join.deadline is not None:
        yield state.joining.join.deadline
    if state.joining.comparison is not None:
        yield state.joining.comparison.deadline
    if state.joining.not_before > state.now:
        yield state.joining.not_before
    yield from state.mustering.until.values()
    for retry in state.meshes.retries.values():
        if retry.not_before > state.now:
            yield retry.not_before


def expire(turn: Turn) -> None:
    """Act on everything that has run out by now."""
    state, now = turn.state, turn.state.now
    for group in state.ledger.having("leased"):
        if group.state == "leased" and group.deadline <= now:  # an earlier one may have taken its wave back with it
            _expire_lease(turn, group)
    for replica in state.fleet.live():
        if replica.deadline is not None and replica.deadline <= now:
            waited = _WAITS.get(replica.state, "timeouts.rejoin_s") if replica.confirmed else "timeouts.rejoin_s"
            cause = f"the controller waited for it in state {replica.state} past {waited}"
            if replica.world > 1 and replica.missing:
                absent = ", ".join(map(str, replica.missing))
                cause += f"; of its {replica.world} ranks these did not register: {absent}"
            lose(turn, replica, cause)
    for mesh in [state.meshes.meshes[epoch] for epoch in state.meshes.unformed]:
        if mesh.deadline <= now:
            missing = [name for name in mesh.replicas if name not in mesh.formed]
            cause = f"{', '.join(missing)} did not form it within timeouts.mesh_s"
            if mesh.state == "minting" and mesh.backend == "nccl":
                cause = "the controller waited for its unique id past timeouts.mint_s"
            mesh_failed(turn, mesh.epoch, "")
            revoke_mesh(turn, mesh.epoch, cause, failed=True)
    _expire_step(turn)
    for edge in list(state.weights.edges.values()):
        if edge.position is not None and edge.deadline <= now:
            revoke_mesh(turn, edge.epoch, "the transfer took longer than timeouts.transfer_s", failed=True)
        elif edge.since + turn.recipe.weights.slow_s <= now:
            state.weights.free[edge.source] = None  # it counts no longer: the source may have room again
    joiner = join_ran_out(turn)
    if joiner is not None:
        lose(turn, joiner, "it did not take the others' state within timeouts.transfer_s")
    saving = state.lineages.saving
    if saving is not None and saving.deadline <= now:
        cause = f"{saving.replica} did not answer within timeouts.checkpoint_s"
        checkpoint_failed(turn, cause)
        lose(turn, state.fleet.replicas[saving.replica], cause)
    if state.stages.stopping and state.stages.stop_deadline <= now:
        state.stages.finish(
            "stopped", f"{state.stages.stopping}; the batch in hand was not finished within timeouts.step_s"
        )
    if not state.steering.paused and state.progressed + turn.recipe.timeouts.stall_s <= now:
        state.stages.finish("failed", f"nothing moved for timeouts.stall_s: {_waiting_for(state)}")


def _expire_lease(turn: Turn, group: Group) -> None:
    """A straggler of a replica that has answered others is leased afresh; one that answers nothing at all is stuck.

    (Not a policy: worked answers wait behind the step that it computes, which has a deadline of its own.)
    """
    replica = turn.state.fleet.replicas[group.replica]
    if not turn.state.fleet.is_current(group.replica, group.incarnation):
        return  # lost a moment ago, and the group was given up with it
    if replica.answered < group.leased_at and replica.role != "policy":
        lose(turn, replica, "it has answered nothing since it was leased a group, for timeouts.lease_s")
    else:
        give_back(turn, group, f"lease of {group.replica} ran out (timeouts.lease_s)")
        if group.state == "queued" and group.partial is not None:
            drop_partial(turn, group, "lease ran out")


def _expire_step(turn: Turn) -> None:
    state, step = turn.state, turn.state.steps.step
    if step is None or step.deadline > state.now:
        return
    answered = step.votes if step.state == "computing" else step.applied
    late = [name for name in step.shares if name not in answered]
    if not late:
        step.deadline = (
            state.now + turn.recipe.timeouts.step_s
        )  # all have voted; the commit waits for a straggler's lease
    if late and step.mesh is not None and not answered and step.state == "computing":
        # each waits for the others' gradients, and nobody knows for whose: the mesh ends, the step is assigned anew
        mesh_failed(turn, step.mesh, "")
        revoke_mesh(turn, step.mesh, f"step {step.step} waited past timeouts.step_s", failed=True)
        return
    for name in late:
        lose(turn, state.fleet.replicas[name], f"step {step.step} was {step.state} and waited past timeouts.step_s")


def _waiting_for(state: State) -> str:
    """One line for a person: who waits for whom."""
    wanted = [role for role, names in state.scaling.names.items() if names]
    roles = {role: [f"{r.name} {r.state}" for r in state.fleet.live(role)] for role in wanted}
    present = "; ".join(f"{role}: {', '.join(names) or 'none registered'}" for role, names in roles.items())
    leased, reported = len(state.ledger.having("leased")), len(state.ledger.having("reported"))
    return f"stage {state.stages.name}, {leased} groups leased, {reported} reported; {present}"
