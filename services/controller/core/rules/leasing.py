"""Leases: which replica may work on which prompt group, and how far ahead.

Pacing (AReaL, arXiv 2505.24298, eq. 3, with the lessee's own version): a replica that holds version u is leased groups
only while accepted + running < (max_staleness + u + 1) * batch, counted from the stage's start. So at most one batch's
worth of groups can ever be due at one version, whatever the replicas lag.
"""

from __future__ import annotations

from services.controller.core.fleet import Replica
from services.controller.core.ledger import Group
from services.controller.core.outcome import Discarded, Issued, Leased, Requeued
from services.controller.core.state import Turn
from shared.data.order import permuted_row
from shared.messages import Grant, LeaseRef, Purpose, RevokeLease, Sampling

ATTEMPTS = 5
"""Leases of one group before it is given up: a row that takes its replica down must not take the fleet down."""
AHEAD = 2
"""Sequences leased per engine slot: enough that a freed slot never waits for the controller."""
SFT_AHEAD = 2
"""Batches of worked answers prepared ahead of the trainer."""


def lease_groups(turn: Turn) -> bool:
    """Lease what may be leased: evaluation first, since training never waits long for it."""
    state = turn.state
    if state.stages.outcome or state.stages.stopping:
        return False
    leased = False
    for replica in state.fleet.ready("rollout"):
        leased |= _lease_evaluation(turn, replica)
    if state.stages.name == "sft" and not state.stages.rule_met:
        for replica in state.fleet.ready("policy")[:1]:
            ahead = turn.trained() + SFT_AHEAD * turn.table.batch_size
            leased |= _lease_training(turn, replica, "sft", 1, ahead, None)
    if state.stages.name == "train" and turn.recipe.train is not None:
        if turn.recipe.run.deterministic and state.ledger.having("leased", "train"):
            return leased  # one wave at a time, so that its composition is the same in every run
        by_load = sorted(state.fleet.ready("rollout"), key=lambda r: (_running(turn, r), r.name))
        samples = state.hyperparameters.whole("train.samples")
        for replica in by_load:
            leased |= _lease_rollout(turn, replica, samples)
    return leased


def _lease_rollout(turn: Turn, replica: Replica, samples: int) -> bool:
    state, held = turn.state, replica.position
    if held is None or held.lineage != state.lineage:
        return False
    base = state.version + len(state.steps.pending) + (state.steps.batch is not None)
    if base - held.version > turn.bound:
        return False
    ahead = (turn.bound + held.version - state.stages.began + 1) * turn.table.batch_size
    if turn.recipe.run.deterministic:
        state.ledger.wave += 1
        return _lease_training(turn, replica, "train", samples, ahead, None)
    room = turn.recipe.rollout.slots * AHEAD - _running(turn, replica)
    return _lease_training(turn, replica, "train", samples, ahead, max(room, 0))


def _lease_training(turn: Turn, replica: Replica, purpose: Purpose, samples: int, ahead: int, room: int | None) -> bool:
    """Lease queued groups, then newly drawn ones, while `ahead` groups hold slots and `room` sequences are free."""
    state = turn.state
    queued = state.ledger.having("queued", purpose)
    limit = min(ahead, turn.table.batches * turn.table.batch_size)
    admitted = turn.trained() + state.ledger.accepted_and_running(purpose) - len(queued)
    leased = False
    while admitted < limit and (room is None or room > 0):
        group = queued.pop(0) if queued else _draw(turn, purpose, samples)
        if group is None:
            break
        _lease(turn, group, replica)
        admitted += 1
        leased = True
        if room is not None:
            room -= group.samples
    return leased


def _lease_evaluation(turn: Turn, replica: Replica) -> bool:
    state, held = turn.state, replica.position
    judged = state.evaluation.round
    if judged is None or held is None or (held.lineage, held.version) != (judged.lineage, judged.version):
        return False
    transfer = state.weights.transfer
    if transfer is not None and replica.name in transfer.receivers:
        return False
    room = turn.recipe.rollout.slots * AHEAD - _running(turn, replica)
    if turn.recipe.run.deterministic:
        room = judged.rows
    leased = False
    for group in state.ledger.having("queued", "eval"):
        if room <= 0:
            break
        _lease(turn, group, replica)
        room -= group.samples
        leased = True
    return leased


def _draw(turn: Turn, purpose: Purpose, samples: int) -> Group | None:
    state = turn.state
    dataset = state.fleet.datasets.get(turn.table.dataset)
    if dataset is None:
        return None
    counter = state.ledger.drawn.get(purpose, 0)
    state.ledger.drawn[purpose] = counter + 1
    epoch, row = permuted_row(counter, dataset.length, turn.recipe.run.seed)
    live = state.hyperparameters
    sampling = Sampling(
        temperature=1.0 if purpose == "sft" else live.number("rollout.temperature"),
        top_p=live.number("rollout.top_p"),
        top_k=live.whole("rollout.top_k"),
        max_new_tokens=live.whole("rollout.max_new_tokens"),
    )
    group = state.ledger.draw(state.lineage, purpose, dataset, epoch, row, samples, sampling, live.revision)
    turn.fact(Issued(state.lineage, group.id, purpose, False))
    return group


def _lease(turn: Turn, group: Group, replica: Replica) -> None:
    state = turn.state
    version = replica.position.version if replica.position is not None else state.version
    until = state.now + turn.recipe.timeouts.lease_s
    state.ledger.lease(group, replica.name, replica.incarnation, version, state.now, until)
    group.wave = state.ledger.wave
    turn.fact(Leased(group.id, group.attempt, replica.name, replica.incarnation, version, group.revision))


def grant(turn: Turn, group: Group) -> Grant:
    """What the lessee is told about a leased group."""
    return Grant(
        group=group.id,
        attempt=group.attempt,
        lineage=turn.state.lineage,
        purpose=group.purpose,
        dataset=group.dataset,
        fingerprint=group.fingerprint,
        epoch=group.epoch,
        row=group.row,
        seed=group.seed,
        samples=group.samples,
        sampling=group.sampling,
        revision=group.revision,
        version=group.version,
        deadline_s=max(group.deadline - turn.state.now, 0.0),
    )


def give_back(turn: Turn, group: Group, cause: str) -> None:
    """A lease ended without a report: queue the group again, or give it up after too many attempts.

    In a deterministic run the whole open wave goes back with it, since its composition must be the same again.
    """
    state = turn.state
    again = [group]
    if turn.recipe.run.deterministic and group.purpose == "train":
        wave = [*state.ledger.having("leased", "train"), *state.ledger.having("reported", "train")]
        again = [g for g in wave if g.wave == group.wave and (g.state == "leased" or not g.kept)]
    for each in again:
        if each.attempt >= ATTEMPTS and each is group:
            end_group(turn, each, "attempts")
            continue
        lessee, incarnation = each.replica, each.incarnation
        state.ledger.requeue(each)
        turn.fact(Requeued(each.id, each.attempt, cause))
        _revoke(turn, lessee, incarnation, each, cause)


def end_group(turn: Turn, group: Group, cause: str) -> None:
    """Discard an unconsumed group; an evaluation row that can't be judged counts as wrong."""
    state = turn.state
    lessee = group.replica if group.state == "leased" else ""
    state.ledger.discard(group, state.lineage, cause)
    turn.fact(Discarded(state.lineage, group.id, cause))
    if group.purpose == "eval" and state.evaluation.round is not None:
        state.evaluation.round.scores[group.row] = 0.0
    _revoke(turn, lessee, group.incarnation, group, cause)


def _revoke(turn: Turn, lessee: str, incarnation: int, group: Group, cause: str) -> None:
    replica = turn.state.fleet.replicas.get(lessee)
    if replica is not None and replica.live and replica.incarnation == incarnation:
        turn.send(replica, RevokeLease([LeaseRef(group.id, group.attempt)], cause))


def _running(turn: Turn, replica: Replica) -> int:
    return sum(group.samples for group in turn.state.ledger.held_by(replica.name))
