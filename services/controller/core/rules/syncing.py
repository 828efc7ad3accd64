"""Weight syncs: build the mesh of a source and its receivers, start a transfer, take its outcome.

A transfer starts only between batches and with no commit on its way, so that the source, which handles its orders in
sequence, holds exactly the position that it is told to send.
"""

from __future__ import annotations

from services.controller.core.fleet import Replica
from services.controller.core.meshes import Mesh
from services.controller.core.outcome import ForgetMesh, MintMeshId, Synced
from services.controller.core.rules.judging import gating_round_due, round_due
from services.controller.core.rules.leasing import give_back
from services.controller.core.state import Turn
from services.controller.core.weights import Transfer
from shared.messages import MeshMember, RevokeMesh, Role


def sync_weights(turn: Turn) -> bool:
    """Start the transfer that is due, or the mesh that it needs: evaluators, which want few versions, before rollouts.

    One transfer is under way at a time; the mesh of the others may form beside it.
    """
    state = turn.state
    if state.stages.outcome or not _at_rest(turn):
        return False
    if turn.recipe.judge == "rollout":
        return _rollouts_are_due(turn) and _sync(turn, "rollout")
    synced = _evaluators_are_due(turn) and _sync(turn, "evaluator")
    return (_rollouts_are_due(turn) and _sync(turn, "rollout")) or synced


def _rollouts_are_due(turn: Turn) -> bool:
    """Rollouts get every version, as soon as they may hold another one."""
    state, judge = turn.state, turn.recipe.judge == "rollout"
    if state.stages.name == "sft":  # nobody samples while worked answers are learnt: weights serve judging only
        return judge and gating_round_due(turn) and not _round_on_older_weights(turn)
    return not _round_on_older_weights(turn) if judge else state.stages.name == "train"


def _evaluators_are_due(turn: Turn) -> bool:
    """Evaluators get the version that is to be judged, and no other one before they have judged it."""
    return not _round_on_older_weights(turn) and round_due(turn) is not None


def _round_on_older_weights(turn: Turn) -> bool:
    judged = turn.state.evaluation.round
    return judged is not None and judged.version != turn.state.version


def _sync(turn: Turn, role: Role) -> bool:
    """Start the transfer to those of a role that are behind, or the mesh that it needs."""
    state, mesh = turn.state, turn.state.meshes.of("weights", role)
    if state.weights.transfer is not None or (mesh is not None and mesh.state != "formed"):
        return False
    source = next((r for r in state.fleet.ready("policy") if r.position == state.lineages.committed), None)
    wanted = state.fleet.behind(role, state.lineages.committed) if source is not None else []
    if source is None or not wanted:
        return False
    members = [_member(replica) for replica in (source, *wanted)]
    if mesh is not None and mesh.members == members:
        _start(turn, mesh, source, wanted)
        return True
    if mesh is not None:
        revoke_mesh(turn, mesh.epoch, "membership changed", failed=False)
    if not state.meshes.may_begin(role, state.now):
        return False
    until = state.now + turn.recipe.timeouts.mesh_s
    begun = state.meshes.begin("weights", role, turn.recipe.weights.backend, members, until)
    turn.effect(MintMeshId(begun.epoch, begun.backend))
    return True


def revoke_mesh(turn: Turn, epoch: int, cause: str, *, failed: bool) -> None:
    """End a mesh for all its members, and the transfer on it; receivers that are loaded stay so."""
    state = turn.state
    mesh = state.meshes.revoke(epoch, state.now, failed=failed)
    if mesh is None:
        return
    turn.effect(ForgetMesh(epoch))
    if state.weights.transfer is not None and state.weights.transfer.epoch == epoch:
        _doubt(turn, state.weights.transfer)
        state.weights.transfer = None
    for member in mesh.members:
        if state.fleet.is_current(member.replica, member.incarnation):
            turn.send(state.fleet.replicas[member.replica], RevokeMesh(epoch, cause))


def _doubt(turn: Turn, transfer: Transfer) -> None:
    """A transfer is given up: receivers that were not judged may have swapped in what they had got."""
    fleet = turn.state.fleet
    for replica in (fleet.replicas[name] for name in transfer.receivers):
        if replica.live and replica.position != transfer.position:
            replica.doubtful = True
            if replica.role == "evaluator" and replica.state == "ready":
                fleet.move(replica, "stale", turn.state.now)


def weights_sent(turn: Turn, digest: str, size: int) -> None:
    """The source told its digest: receivers that have loaded can be compared."""
    transfer = turn.state.weights.transfer
    assert transfer is not None
    transfer.digest, transfer.bytes = digest, size
    _compare(turn, transfer, list(transfer.loaded))


def weights_loaded(turn: Turn, replica: str, digest: str) -> None:
    """A receiver has loaded; it is ready once its digest equals the source's."""
    transfer = turn.state.weights.transfer
    assert transfer is not None
    transfer.loaded[replica] = digest
    _compare(turn, transfer, [replica])


def weights_failed(turn: Turn, cause: str) -> None:
    """A member could not take part: its mesh ends for all, so that nobody sits out a collective's own timeout."""
    transfer = turn.state.weights.transfer
    assert transfer is not None
    revoke_mesh(turn, transfer.epoch, cause, failed=True)


def _compare(turn: Turn, transfer: Transfer, names: list[str]) -> None:
    """Judge receivers that have loaded, once the source's digest is known."""
    state = turn.state
    for name in names if transfer.digest is not None else ():
        replica, verdict = state.fleet.replicas[name], transfer.verdict(name)
        if not replica.live or replica.position == transfer.position:
            continue
        if verdict == "different":
            state.fleet.hold(replica, None)
            if replica.state == "ready":
                state.fleet.move(replica, "stale", state.now)
            for group in state.ledger.held_by(name):
                if group.state == "leased":
                    give_back(turn, group, f"{name} holds weights with a wrong digest")
            continue
        if replica.doubtful:
            before = replica.position.version if replica.position is not None else -1
            for group in state.ledger.held_by(name):
                group.newest_allowed = before if group.newest_allowed is None else group.newest_allowed
            replica.doubtful = False
        state.fleet.hold(replica, transfer.position)
        if replica.state == "stale":
            state.fleet.move(replica, "ready", state.now)
        state.ledger.hungry[name] = None
        turn.progress()
        turn.fact(Synced(name, transfer.position.lineage, transfer.position.version, transfer.digest or ""))
    if transfer.over:
        state.weights.last_seconds = state.now - transfer.began
        state.weights.last_bytes = transfer.bytes
        state.weights.transfer = None
        wrong = [name for name in transfer.loaded if transfer.verdict(name) == "different"]
        if wrong:  # over the same mesh, the members would take another try for a repetition of this one
            state.weights.mismatches += len(wrong)
            cause = f"{', '.join(wrong)} loaded weights with a wrong digest"
            revoke_mesh(turn, transfer.epoch, cause, failed=True)


def _start(turn: Turn, mesh: Mesh, source: Replica, receivers: list[Replica]) -> None:
    state = turn.state
    state.weights.transfer = Transfer(
        epoch=mesh.epoch,
        position=state.lineages.committed,
        source=source.name,
        receivers=[replica.name for replica in receivers],
        deadline=state.now + turn.recipe.timeouts.transfer_s,
        began=state.now,
    )


def _at_rest(turn: Turn) -> bool:
    """Between batches, or in the first step of one before its commit: the policy holds the committed version."""
    steps = turn.state.steps
    if steps.step is not None and steps.step.state == "committed":
        return False
    return steps.batch is None or steps.batch.index == 0


def _member(replica: Replica) -> MeshMember:
    return MeshMember(replica.name, replica.incarnation, 0)
