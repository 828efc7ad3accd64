"""How a policy becomes a member of the steps, and what happens when a mesh of the members breaks (core/joining.py)."""

from __future__ import annotations

from services.controller.core.fleet import Replica
from services.controller.core.joining import Comparison, Join, Torn
from services.controller.core.meshes import RETRY_MOST_S, RETRY_S
from services.controller.core.outcome import CaughtUp, Compared
from services.controller.core.rules.forming import begin_mesh
from services.controller.core.rules.losing import anyone_holds
from services.controller.core.rules.members import gradients_mesh, members, same
from services.controller.core.rules.syncing import revoke_mesh
from services.controller.core.rules.training import abort_step
from services.controller.core.state import Turn

TORN_MOST = 2
"""Steps in a row that a gradients mesh may break in before one member goes on alone."""


def keep_members(turn: Turn) -> bool:
    """Everything below, in its order; one policy that is ready needs none of it."""
    state, policies = turn.state, turn.state.fleet.live("policy")
    alone = len(policies) < 2 and all(replica.state == "ready" for replica in policies)
    if alone and state.joining.join is None and not state.joining.gradients:
        return False
    acted = [rule(turn) for rule in RULES]
    return any(acted)


def _demote(turn: Turn) -> bool:
    """A policy that missed a commit is stale: it joins again."""
    state = turn.state
    policies = [replica for replica in state.fleet.live("policy") if replica.state == "ready" and replica.confirmed]
    if not policies:
        return False
    holding = {replica.name for replica in members(turn)}
    behind = [replica for replica in policies if replica.name not in holding]
    for replica in behind:
        _make_stale(turn, replica)
    return bool(behind)


def _reload(turn: Turn) -> bool:
    """Nobody is left to join, but the committed state is on the disk: stale policies load it."""
    state = turn.state
    stale = [replica for replica in state.fleet.live("policy") if replica.state == "stale" and replica.confirmed]
    if not stale or state.lineages.committed != state.lineages.settled or anyone_holds(turn):
        return False
    for replica in stale:
        state.fleet.move(replica, "loading", state.now)
        replica.deadline = state.now + turn.recipe.timeouts.load_s
    return True


def _keep_join(turn: Turn) -> bool:
    """Give up a join whose meshes, members or joiner are not what they were."""
    state, join = turn.state, turn.state.joining.join
    if join is None:
        return False
    joiner = state.fleet.replicas[join.joiner]
    if joiner.live and joiner.state == "ready":
        _end_join(turn, f"{joiner.name} is up to date")
        return True
    live = state.meshes.meshes
    stands = joiner.state == "stale" and join.state_mesh in live and join.gradients_mesh in live
    if stands and same(join.members, [replica.member for replica in (*members(turn), joiner)]):
        return False
    _end_join(turn, f"{join.joiner} cannot join as it was to")
    if all(state.fleet.is_current(m.replica, m.incarnation) for m in join.members):
        _pause(turn)  # nobody was lost: it is the network, or one of them
    return True


def _abort_torn_step(turn: Turn) -> bool:
    """The step in hand has lost its mesh before everybody had the sum: it is assigned anew."""
    state, step = turn.state, turn.state.steps.step
    if step is None or step.state != "computing" or step.mesh is None or step.mesh in state.meshes.meshes:
        return False
    if all(step.votes.get(n) and state.fleet.replicas[n].state in ("ready", "draining") for n in step.shares):
        return False
    abort_step(turn, "its mesh was revoked")
    return True


def _leave_meshes(turn: Turn) -> bool:
    """End the gradients meshes that no step will use any more."""
    state, joining = turn.state, turn.state.joining
    if not joining.gradients:
        return False
    step, wanted = state.steps.step, gradients_mesh(turn, members(turn))
    kept = {wanted.epoch if wanted is not None else 0, joining.join.gradients_mesh if joining.join is not None else 0}
    if step is not None and step.state == "computing" and step.mesh is not None:
        kept.add(step.mesh)
    left = [epoch for epoch in joining.gradients if epoch in state.meshes.meshes and epoch not in kept]
    for epoch in left:
        revoke_mesh(turn, epoch, "membership changed", failed=False)
    joining.gradients = [epoch for epoch in joining.gradients if epoch in state.meshes.meshes]
    return bool(left)


def _form_gradients(turn: Turn) -> bool:
    """Several members need a mesh of exactly them; it forms before a batch is there, so that none waits for it."""
    state = turn.state
    if state.stages.outcome or state.stages.name not in ("sft", "train"):
        return False
    group = members(turn)
    if len(group) < 2 or not all(replica.confirmed for replica in group) or gradients_mesh(turn, group) is not None:
        return False
    turn.state.joining.gradients.append(begin_mesh(turn, "gradients", group).epoch)
    return True


def _begin_join(turn: Turn) -> bool:
    """Form the meshes of the next policy that is stale, while the members go on."""
    state, joining = turn.state, turn.state.joining
    if joining.join is not None or state.stages.outcome or state.stages.name not in ("sft", "train"):
        return False
    if state.now < joining.not_before:
        return False
    stale = [replica for replica in state.fleet.live("policy") if replica.state == "stale" and replica.confirmed]
    group = members(turn)
    if not stale or not group or not all(replica.confirmed for replica in group):
        return False
    joiner = next((replica for replica in stale if replica.name > joining.last), stale[0])
    source = group[-1]  # the first one has the checkpoints to write
    joining.last = joiner.name
    state_mesh = begin_mesh(turn, "state", [source, joiner])
    gradients = begin_mesh(turn, "gradients", [*group, joiner])
    joining.gradients.append(gradients.epoch)
    joining.join = Join(joiner.name, source.name, gradients.members, state_mesh.epoch, gradients.epoch)
    return True


def close_comparison(turn: Turn) -> bool:
    """Everybody who is left has told the digest of its state: whoever differs from the writer joins again."""
    state, comparison = turn.state, turn.state.joining.comparison
    if comparison is None:
        return False
    late = comparison.deadline <= state.now
    missing = [n for n, i in comparison.asked.items() if n not in comparison.digests and state.fleet.is_current(n, i)]
    if missing and not late:
        return False
    state.joining.comparison = None
    told = comparison.digests
    if len(told) > 1:
        true = told.get(comparison.writer) or told[min(told)]
        position = comparison.position
        different = sorted(name for name, digest in told.items() if digest != true)
        turn.fact(Compared(position.lineage, position.version, position.step, dict(sorted(told.items())), different))
        state.joining.mismatches += len(different)
        for name in different:
            if state.fleet.is_current(name, comparison.asked[name]):
                _distrust(turn, state.fleet.replicas[name])
    return True


RULES = (_demote, _reload, _keep_join, _abort_torn_step, _leave_meshes, _form_gradients, _begin_join)


# --- outcomes --------------------------------------------------------------------------------------------------------


def state_sent(turn: Turn, digest: str) -> None:
    """The source told the digest of what it staged."""
    join = turn.state.joining.join
    assert join is not None
    join.sent = digest
    _decide(turn, join)


def state_received(turn: Turn, digest: str) -> None:
    """The joiner told the digest of what it holds now."""
    join = turn.state.joining.join
    assert join is not None
    join.received = digest
    _decide(turn, join)


def compare_states(turn: Turn, writer: Replica) -> None:
    """A checkpoint is written: ask all members for the digest of the state that goes into it."""
    state = turn.state
    held = [r for r in state.fleet.ready("policy") if r.position == state.lineages.committed]
    if len(held) > 1 and state.joining.comparison is None:
        until = state.now + turn.recipe.timeouts.checkpoint_s
        asked = {replica.name: replica.incarnation for replica in held}
        state.joining.comparison = Comparison(state.lineages.committed, writer.name, asked, until)


def mesh_failed(turn: Turn, epoch: int, by: str) -> None:
    """A gradients mesh did not form, or broke in use (told `by` a member): after that, one member may go on alone.

    The others become stale and join again, so that a broken network between members costs no more than their help. If
    some compute a step meanwhile, over another mesh or alone, it is they who go on.
    """
    state, joining = turn.state, turn.state.joining
    mesh = state.meshes.meshes.get(epoch)
    if mesh is None or mesh.purpose != "gradients" or (joining.join and joining.join.gradients_mesh == epoch):
        return
    if mesh.state == "formed":
        again = joining.torn is not None and joining.torn.members == mesh.members
        joining.torn = Torn(mesh.members, joining.torn.times + 1 if again and joining.torn else 1)
        if joining.torn.times < TORN_MOST:
            return
    group = {replica.name: replica for replica in members(turn) if mesh.has(replica.name)}
    alone = by if by in group else next((name for name in (*mesh.formed, *sorted(group)) if name in group), "")
    together = _computing_without(turn, epoch)
    for name, replica in group.items():
        if replica.confirmed and (name not in together if together else name != alone):
            _make_stale(turn, replica)
    joining.torn = None
    _pause(turn)


def _computing_without(turn: Turn, epoch: int) -> list[str]:
    """Who has a step in hand that does not need this mesh."""
    step = turn.state.steps.step
    stands = step is not None and (step.mesh is None or step.mesh in turn.state.meshes.meshes)
    return list(step.shares) if step is not None and stands and step.mesh != epoch else []


def join_ran_out(turn: Turn) -> Replica | None:
    """The joiner that did not take the state in time, if there is one."""
    join = turn.state.joining.join
    if join is None or join.deadline is None or join.deadline > turn.state.now:
        return None
    joiner = turn.state.fleet.replicas[join.joiner]
    return joiner if joiner.live else None


def _decide(turn: Turn, join: Join) -> None:
    state = turn.state
    joiner, committed = state.fleet.replicas[join.joiner], state.lineages.committed
    if not join.decided or join.position is None:
        return
    if join.sent != join.received:
        state.joining.mismatches += 1
        _distrust(turn, joiner)
        _end_join(turn, f"{joiner.name} holds another state than {join.source} sent")
        _pause(turn)
        return
    # the version may have risen alone, when the rest of a batch was struck off
    if (join.position.lineage, join.position.step) == (committed.lineage, committed.step):
        state.fleet.hold(joiner, committed)
        state.fleet.move(joiner, "ready", state.now)
        turn.progress()
        digest = join.received or ""
        turn.fact(CaughtUp(joiner.name, join.source, committed.lineage, committed.version, committed.step, digest))
        state.joining.failures = 0
    _end_join(turn, f"{joiner.name} has caught up")


def _end_join(turn: Turn, cause: str) -> None:
    """Forget the join; its gradients mesh stays if the joiner is a member now."""
    state, join = turn.state, turn.state.joining.join
    assert join is not None
    state.joining.join = None
    revoke_mesh(turn, join.state_mesh, cause, failed=False)
    mesh = state.meshes.meshes.get(join.gradients_mesh)
    if mesh is not None and mesh is not gradients_mesh(turn, members(turn)):
        revoke_mesh(turn, mesh.epoch, cause, failed=False)


def _distrust(turn: Turn, replica: Replica) -> None:
    """What it holds is not what it should: it forgets that, and joins again."""
    state, step = turn.state, turn.state.steps.step
    state.fleet.hold(replica, None)
    if replica.state != "draining":  # one that leaves takes it along
        state.fleet.move(replica, "loading", state.now)
        replica.doubtful = True
        replica.deadline = state.now + turn.recipe.timeouts.load_s
    if step is not None and replica.name in step.shares:
        if step.state == "computing":
            abort_step(turn, f"{replica.name} holds another state than the others")
        else:
            state.steps.drop_member(replica.name)


def _make_stale(turn: Turn, replica: Replica) -> None:
    turn.state.fleet.hold(replica, None)
    turn.state.fleet.move(replica, "stale", turn.state.now)


def _pause(turn: Turn) -> None:
    joining = turn.state.joining
    joining.not_before = turn.state.now + min(RETRY_S * 2**joining.failures, RETRY_MOST_S)
    joining.failures += 1
