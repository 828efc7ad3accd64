"""Weight syncs: pair sources with receivers, have them meet in a mesh, start a transfer, take its outcome.

A policy is a source only between batches and with no commit on its way, so that, handling its orders in sequence, it
holds exactly the position that it is told to stage. Any other replica that is ready with the published version keeps
the copy that it received, and may serve it at any time. A source has at most `weights.fanout` edges at once, slow ones
(`weights.slow_s`) not counted: a receiver that hangs holds up its own edge and nobody else's.
"""

from __future__ import annotations

from itertools import islice

from services.controller.core.fleet import Replica
from services.controller.core.meshes import Mesh
from services.controller.core.outcome import ForgetMesh, Synced
from services.controller.core.rules.forming import begin_mesh
from services.controller.core.rules.judging import gating_round_due, round_due
from services.controller.core.rules.leasing import give_back
from services.controller.core.state import Turn
from services.controller.core.weights import Edge, Publication
from shared.messages import Position, RevokeMesh, Role, WeightsLoaded, WeightsSent

LOOKED_AT = 64
"""Candidates looked at before one is taken that has just failed with the same source."""


def sync_weights(turn: Turn) -> bool:
    """Start the transfers that are due, or the meshes that they need: evaluators, which want few versions, first."""
    state = turn.state
    if state.stages.outcome:
        return False
    _aim(turn)
    judge, weights = turn.recipe.judge == "rollout", state.weights
    acted = not judge and _evaluators_are_due(turn) and _pair(turn, "evaluator")
    acted |= _rollouts_are_due(turn) and _pair(turn, "rollout")
    if weights.publications and not weights.edges and not weights.resting:
        weights.publications[-1].complete = True
    return acted


def _aim(turn: Turn) -> None:
    """Keep the lists of candidates for the version that is committed; wake those that have paused long enough."""
    state, committed = turn.state, turn.state.lineages.committed
    target, interval = (committed.lineage, committed.version), _interval(turn)
    if target != state.weights.target:
        roles: tuple[Role, ...] = ("evaluator", "rollout")
        behind = {role: [replica.name for replica in state.fleet.behind(role, committed)] for role in roles}
        state.weights.aim(target, behind)
    elif interval < state.weights.interval:  # who was not behind far enough may be now
        for replica in state.fleet.behind("rollout", committed):
            state.weights.want(replica.name, "rollout")
    state.weights.interval = interval
    for name, role in list(state.weights.resting.items()):
        if state.meshes.may_begin(name, state.now):
            del state.weights.resting[name]
            state.weights.want(name, role)


def _interval(turn: Turn) -> int:
    """How many versions a rollout has to be behind to be sent the newest one (`weights.every`).

    Beyond the staleness bound it would have nothing to do; and what it is to judge it needs at once.
    """
    judges = turn.recipe.judge == "rollout" and round_due(turn) is not None
    return 1 if judges else max(1, min(turn.state.hyperparameters.whole("weights.every"), turn.bound))


def _rollouts_are_due(turn: Turn) -> bool:
    """Rollouts are sent versions as soon as they may hold another one."""
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


def _pair(turn: Turn, role: Role) -> bool:
    """Pair sources that have room with receivers of a role: over the meshes that stand, else over new ones."""
    waiting = turn.state.weights.waiting.get(role)
    sources = _sources(turn) if waiting else []
    acted = False
    for source in sources:
        for mesh in turn.state.meshes.held_by(source.name):
            name = mesh.members[-1].replica
            if not _stands_idle(turn, mesh, source) or not waiting or name not in waiting or not _room(turn, source):
                continue
            receiver = _fit(turn, name, role)
            if receiver is not None:
                _start(turn, mesh, source, receiver)
                acted = True
    for strict in (True, False):
        for source in sources:
            while waiting and _room(turn, source):
                receiver = _next_receiver(turn, role, source, strict=strict)
                if receiver is None:
                    break
                _meet(turn, source, receiver)
                acted = True
    return acted


def _sources(turn: Turn) -> list[Replica]:
    """Who may serve the committed version now and has room: policies at rest, then relays, first come first served."""
    state, committed = turn.state, turn.state.lineages.committed
    found = []
    if _at_rest(turn):
        ready = state.fleet.ready("policy")
        found = [replica for replica in ready if replica.position == committed and _room(turn, replica)]
    publication = state.weights.newest(committed.lineage, committed.version)
    for name in list(state.weights.free):
        replica = state.fleet.replicas[name]
        if publication is not None and _may_relay(turn, replica, publication) and _room(turn, replica):
            found.append(replica)
        else:
            del state.weights.free[name]
    return found


def _may_relay(turn: Turn, replica: Replica, publication: Publication) -> bool:
    """Whether it holds what is published, digest checked, and has not been proven to pass on something else."""
    ready = replica.role != "policy" and replica.state == "ready" and replica.confirmed
    return ready and replica.position == publication.position and replica.name not in publication.barred


def _room(turn: Turn, source: Replica) -> bool:
    """Whether a source may have one more edge; an edge that has been slow for long counts no more."""
    state, table = turn.state, turn.recipe.weights
    edges = state.weights.over(state.meshes.epochs_of(source.name))
    since = state.now - table.slow_s
    busy = sum(edge.source == source.name and edge.since > since for edge in edges)
    return busy < table.fanout


def _stands_idle(turn: Turn, mesh: Mesh, source: Replica) -> bool:
    idle = mesh.purpose == "weights" and mesh.state == "formed" and mesh.epoch not in turn.state.weights.edges
    return idle and mesh.members[0].replica == source.name


def _next_receiver(turn: Turn, role: Role, source: Replica, *, strict: bool) -> Replica | None:
    """The receiver that waits longest; a strict search leaves out whoever failed with this very source last."""
    waiting, retries = turn.state.weights.waiting[role], turn.state.meshes.retries
    while True:
        names = list(islice(waiting, LOOKED_AT))
        fit = [replica for name in names if (replica := _fit(turn, name, role)) is not None]
        for replica in fit:
            retry = retries.get(replica.name)
            if not strict or retry is None or retry.source != source.name:
                return replica
        if fit or not waiting:
            return None


def _fit(turn: Turn, name: str, role: Role) -> Replica | None:
    """A candidate, if it is behind and may be sent weights now; else it is taken off the list."""
    state, replica = turn.state, turn.state.fleet.replicas[name]
    held, edges = replica.position, state.weights.over(state.meshes.epochs_of(name))
    loaded = replica.state in ("stale", "ready") and replica.confirmed and replica.role == role
    lineage, version = state.weights.target
    enough = state.weights.interval if role == "rollout" else 1
    behind = held is None or held.lineage != lineage or version - held.version >= enough
    if not loaded or not behind or any(edge.receiver == name for edge in edges):
        del state.weights.waiting[role][name]
        return None
    if not state.meshes.may_begin(name, state.now):
        state.weights.rest(name, role)
        return None
    return replica


def _meet(turn: Turn, source: Replica, receiver: Replica) -> None:
    """Have the two form a mesh, of all ranks that weights come from and the one that they go to.

    Of the meshes that they stand in idle, the ones used longest ago make room.
    """
    state = turn.state
    state.weights.publish(_published(turn), state.now)
    for name in (source.name, receiver.name):
        _drop_idle(turn, name)
    _pair_up(turn, begin_mesh(turn, "weights", [source, receiver]), source, receiver)


def _start(turn: Turn, mesh: Mesh, source: Replica, receiver: Replica) -> None:
    """Send and receive over a mesh that stands."""
    state = turn.state
    edge = _pair_up(turn, mesh, source, receiver)
    edge.position = state.weights.publish(_published(turn), state.now).position
    edge.deadline = state.now + turn.recipe.timeouts.transfer_s
    turn.concerned |= {source.name, receiver.name}


def _pair_up(turn: Turn, mesh: Mesh, source: Replica, receiver: Replica) -> Edge:
    state = turn.state
    edge = Edge(mesh.epoch, source.name, receiver.name, state.now)
    state.weights.edges[mesh.epoch] = edge
    state.weights.waiting[receiver.role].pop(receiver.name, None)
    mesh.used = state.now
    return edge


def _published(turn: Turn) -> Position:
    """The position that stands for the committed version: the one it began with."""
    committed = turn.state.lineages.committed
    known = turn.state.weights.newest(committed.lineage, committed.version)
    return known.position if known is not None else committed


def _drop_idle(turn: Turn, name: str) -> None:
    """Keep a replica's meshes few: as many as it may serve and be served over, twice."""
    state, most = turn.state, 2 * turn.recipe.weights.fanout + 2
    held = [mesh for mesh in state.meshes.held_by(name) if mesh.purpose == "weights"]
    idle = sorted((mesh.used, mesh.epoch) for mesh in held if mesh.epoch not in state.weights.edges)
    for _, epoch in idle[: max(len(held) + 1 - most, 0)]:
        revoke_mesh(turn, epoch, "it was not used for a while", failed=False)


def mesh_formed(turn: Turn, epoch: int) -> None:
    """A mesh stands: if it is for weights, the two may be paired over it, unless the source serves them no more."""
    edge = turn.state.weights.edges.pop(epoch, None)
    if edge is not None:
        _release(turn, edge)


def revoke_mesh(turn: Turn, epoch: int, cause: str, *, failed: bool) -> None:
    """End a mesh for all its members, and the transfer on it; a receiver that is loaded stays so."""
    state = turn.state
    mesh = state.meshes.revoke(epoch, state.now, failed=failed)
    if mesh is None:
        return
    turn.effect(ForgetMesh(epoch))
    edge = state.weights.edges.pop(epoch, None)
    if edge is not None:
        _doubt(turn, edge)
        _release(turn, edge)
    for name, incarnation in dict.fromkeys((member.replica, member.incarnation) for member in mesh.members):
        if state.fleet.is_current(name, incarnation):
            turn.send(state.fleet.replicas[name], RevokeMesh(epoch, cause))


def _release(turn: Turn, edge: Edge) -> None:
    """An edge is over: both ends are candidates again, or may leave, if that was what they waited for."""
    for name in (edge.source, edge.receiver):
        consider(turn, turn.state.fleet.replicas[name])
        turn.concerned.add(name)


def consider(turn: Turn, replica: Replica) -> None:
    """A replica may be behind now, or have room to serve others: that is seen when somebody is looked for."""
    if replica.role != "policy" and replica.live:
        turn.state.weights.free[replica.name] = None
        turn.state.weights.want(replica.name, replica.role)


def _doubt(turn: Turn, edge: Edge) -> None:
    """A transfer is given up: a receiver that was not judged may have swapped in what it had got."""
    state, replica = turn.state, turn.state.fleet.replicas[edge.receiver]
    if edge.position is not None and replica.live and replica.position != edge.position:
        replica.doubtful = True
        if replica.role == "evaluator" and replica.state == "ready":
            state.fleet.move(replica, "stale", state.now)


def weights_sent(turn: Turn, sent: WeightsSent) -> None:
    """A source told its digest. A policy's first one for a position is the true one: receivers can be compared.

    It stands until no engine holds that position any more.
    """
    state = turn.state
    edge, publication = state.weights.edges[sent.epoch], state.weights.publication(sent.position)
    assert publication is not None
    edge.sent = True
    publication.bytes += sent.bytes
    state.weights.last_bytes = publication.bytes
    if state.fleet.replicas[edge.source].role == "policy" and publication.digest != sent.digest:
        if publication.digest is None or not _witnessed(turn, sent.position):
            publication.digest = sent.digest
        for each in [each for each in state.weights.edges.values() if each.position == sent.position]:
            _compare(turn, each, publication)
    elif edge.loaded is not None:
        _compare(turn, edge, publication)


def _witnessed(turn: Turn, position: Position) -> bool:
    """Whether an engine is ready with these weights."""
    roles: tuple[Role, ...] = ("rollout", "evaluator")
    return any(turn.state.fleet.anyone_holds(role, position.lineage, position.version) for role in roles)


def weights_loaded(turn: Turn, loaded: WeightsLoaded) -> None:
    """A receiver has loaded; it is ready once its digest equals the true one."""
    edge = turn.state.weights.edges[loaded.epoch]
    edge.loaded = loaded.digest
    publication = turn.state.weights.publication(loaded.position)
    assert publication is not None
    _compare(turn, edge, publication)


def weights_failed(turn: Turn, epoch: int, cause: str) -> None:
    """One end could not take part: the mesh ends for the other one, so that it does not sit out its own timeout."""
    revoke_mesh(turn, epoch, cause, failed=True)


def _compare(turn: Turn, edge: Edge, publication: Publication) -> None:
    """Judge a receiver that has loaded, once the true digest is known; the edge is over when both have answered."""
    state, replica = turn.state, turn.state.fleet.replicas[edge.receiver]
    if edge.loaded is None or publication.digest is None:
        return
    if edge.loaded != publication.digest:
        _reject(turn, edge, publication)
        return
    if replica.position != publication.position:
        _accept(turn, replica, publication)
        publication.acquit(edge.source, replica.name)
        state.weights.last_seconds = state.now - publication.began
    if edge.sent:
        del state.weights.edges[edge.epoch]
        _release(turn, edge)


def _accept(turn: Turn, replica: Replica, publication: Publication) -> None:
    """A receiver holds the true weights."""
    state, position = turn.state, publication.position
    if replica.doubtful:
        before = replica.position.version if replica.position is not None else -1
        for group in state.ledger.held_by(replica.name):
            group.newest_allowed = before if group.newest_allowed is None else group.newest_allowed
        replica.doubtful = False
    state.fleet.hold(replica, position)
    if replica.state == "stale":
        state.fleet.move(replica, "ready", state.now)
    state.ledger.hungry[replica.name] = None
    state.weights.free[replica.name] = None  # at once: its own source may have more to say before the edge is over
    state.meshes.forget(replica.name)
    turn.progress()
    turn.fact(Synced(replica.name, position.lineage, position.version, publication.digest or ""))


def _reject(turn: Turn, edge: Edge, publication: Publication) -> None:
    """A receiver holds something else: it has no weights, no work and no mesh with that source any more.

    Over the same mesh, the two would take another try for a repetition of this one.
    """
    state, replica = turn.state, turn.state.fleet.replicas[edge.receiver]
    state.weights.mismatches += 1
    if state.fleet.replicas[edge.source].role != "policy":
        publication.accuse(edge.source, edge.receiver)
    state.fleet.hold(replica, None)
    if replica.state == "ready":
        state.fleet.move(replica, "stale", state.now)
    for group in state.ledger.held_by(replica.name):
        if group.state == "leased":
            give_back(turn, group, f"{replica.name} holds weights with a wrong digest")
    cause = f"{replica.name} loaded weights with a wrong digest from {edge.source}"
    revoke_mesh(turn, edge.epoch, cause, failed=True)


def _at_rest(turn: Turn) -> bool:
    """Between batches, or in the first step of one before its commit: the policy holds the committed version."""
    steps = turn.state.steps
    if steps.step is not None and steps.step.state == "committed":
        return False
    return steps.batch is None or steps.batch.index == 0
