"""Leases: which replica may work on which prompt group, and how far ahead.

Pacing (AReaL, arXiv 2505.24298, eq. 3, with the lessee's own version): a replica that holds version u is leased groups
only while accepted + running < (max_staleness + u + 1) * batch, counted from the stage's start. So at most one batch's
worth of groups can ever be due at one version, whatever the replicas lag.

A group that was handed over with tokens is as old as the oldest of them: it must fit, beside the others that old, into
the batches that may still take it. Where it does not, the tokens are dropped and the group is sampled afresh.
"""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace

from services.controller.core.evaluation import Answer
from services.controller.core.events import Spooled
from services.controller.core.fleet import Replica
from services.controller.core.ledger import Group
from services.controller.core.outcome import (
    Discarded,
    HandedOver,
    Issued,
    Leased,
    PartialDropped,
    PartialRefused,
    Requeued,
)
from services.controller.core.rules.mustering import mustered
from services.controller.core.state import Turn
from shared.data.order import permuted_row
from shared.messages import Grant, LeaseRef, Partial, Purpose, RevokeLease, Role, Sampling

ATTEMPTS = 5
"""Leases of one group before it is given up: a row that takes its replica down must not take the fleet down.

(Those that ended in tokens for the next one do not count.)
"""
NOT_JUDGED = "not judged"
"""Category of the rows that nobody could judge, in a suite that is split by category."""
AHEAD = 2
"""Sequences leased per engine slot: enough that a freed slot never waits for the controller."""
SFT_AHEAD = 2
"""Batches of worked answers prepared ahead of the trainer."""


def lease_groups(turn: Turn) -> bool:
    """Lease what may be leased: evaluation first, since training never waits long for it."""
    state = turn.state
    if state.stages.outcome or state.stages.stopping:
        return False
    leased = _lease_evaluation(turn)
    if state.stages.name == "sft" and not state.stages.rule_met:
        for replica in state.fleet.ready("policy")[:1]:
            ahead = turn.trained() + SFT_AHEAD * turn.table.batch_size
            limit = min(ahead, turn.table.batches * turn.table.batch_size)
            leased |= _lease_training(turn, replica, "sft", 1, limit, None)
    if state.stages.name == "train" and turn.recipe.train is not None and mustered(turn, "rollout"):
        if turn.recipe.run.deterministic and _wave_under_way(turn):
            return leased  # one at a time, and no judging in the same message: its composition is the same in every run
        newest = state.fleet.newest_ready("rollout", state.lineage)
        if newest is not None and _slot_is_free(turn, newest):  # if not for the newest weights, then for nobody
            leased |= _lease_evenly(turn, newest, state.hyperparameters.whole("train.samples"))
    return leased


def _takers(turn: Turn, role: Role) -> list[Replica]:
    """Ready replicas of a role with room, by name; whoever has none is struck off the list of the hungry."""
    state = turn.state
    if turn.recipe.run.deterministic:
        return state.fleet.ready(role)  # a wave asks for no room
    found = []
    for name in sorted(state.ledger.hungry):
        replica = state.fleet.replicas[name]
        if replica.state != "ready" or not replica.confirmed or replica.role == "policy" or _room(turn, replica) <= 0:
            del state.ledger.hungry[name]
        elif replica.role == role:
            found.append(replica)
    return found


def _lease_evenly(turn: Turn, newest: int, samples: int) -> bool:
    """One group after the other, each to the replica that has the least to do of those that may take it."""
    takers = _takers(turn, "rollout")
    held = {replica.position for replica in takers if replica.position is not None}
    free = {position for position in held if _slot_is_free(turn, position.version)}
    heap = [(_running(turn, replica), replica.name) for replica in takers if replica.position in free]
    heapify(heap)
    leased = False
    while heap and _slot_is_free(turn, newest):
        replica = turn.state.fleet.replicas[heap[0][1]]
        if _lease_rollout(turn, replica, samples):
            heapreplace(heap, (_running(turn, replica), replica.name))
            leased = True
        else:
            heappop(heap)
    return leased


def _lease_rollout(turn: Turn, replica: Replica, samples: int) -> bool:
    state, held = turn.state, replica.position
    if held is None or held.lineage != state.lineage or not _slot_is_free(turn, held.version):
        return False
    limit = _limit(turn, held.version)
    if turn.recipe.run.deterministic:
        state.ledger.wave += 1
        return _lease_training(turn, replica, "train", samples, limit, None)
    return _room(turn, replica) > 0 and _lease_training(turn, replica, "train", samples, limit, 1)


def _slot_is_free(turn: Turn, version: int) -> bool:
    """Whether a replica that holds `version` may get more: its tokens would be trained in time, and it is not paced."""
    return _next_batch(turn) - version <= turn.bound and _admitted(turn, "train") < _limit(turn, version)


def _comes_in_time(turn: Turn, oldest: int, version: int) -> bool:
    """Whether a group with tokens as old as `oldest` may be leased to a replica that holds `version`, which has a slot.

    For each age from the one to the other, the groups that old or older must fit into the batches that may take them:
    those which start from max_staleness above that age at most.
    """
    first, size = _next_batch(turn), turn.table.batch_size
    return all(
        turn.state.ledger.sampled_by(age, "train") < (turn.bound + age - first + 1) * size
        for age in range(oldest, version)
    )


def _next_batch(turn: Turn) -> int:
    """The version that the next batch to be formed will start from."""
    state = turn.state
    return state.version + len(state.steps.pending) + (state.steps.batch is not None)


def _limit(turn: Turn, version: int) -> int:
    """How many groups of the stage may be admitted before a replica that holds `version` gets no more."""
    ahead = (turn.bound + version - turn.state.stages.began + 1) * turn.table.batch_size
    return min(ahead, turn.table.batches * turn.table.batch_size)


def _admitted(turn: Turn, purpose: Purpose) -> int:
    """Groups of the stage that were trained, hold a slot or run; queued ones are yet to be admitted."""
    ledger = turn.state.ledger
    return turn.trained() + ledger.accepted_and_running(purpose)


def _lease_training(turn: Turn, replica: Replica, purpose: Purpose, samples: int, limit: int, most: int | None) -> bool:
    """Lease queued groups, then newly drawn ones, while fewer than `limit` are admitted; at most `most` of them."""
    queued = turn.state.ledger.having("queued", purpose)
    admitted = _admitted(turn, purpose)
    leased = 0
    while admitted + leased < limit and leased != most:
        group = queued.pop(0) if queued else _draw(turn, purpose, samples)
        if group is None:
            break
        _lease(turn, group, replica)
        leased += 1
    return leased > 0


def _lease_evaluation(turn: Turn) -> bool:
    """Lease the rows of the open round to replicas that hold its version, each to the one with the most room."""
    state, judged = turn.state, turn.state.evaluation.round
    if judged is None or not state.ledger.count("queued", "eval") or not mustered(turn, turn.recipe.judge):
        return False
    judges = [replica for replica in _takers(turn, turn.recipe.judge) if _may_judge(turn, replica)]
    queued = state.ledger.having("queued", "eval")
    room = {replica.name: _room(turn, replica) for replica in judges}
    if turn.recipe.run.deterministic:
        samples = sum(group.samples for group in queued)
        room = {replica.name: samples for replica in judges}  # all in one message
    leased = False
    for group in queued:
        name = min(room, key=lambda name: (-room[name], name), default="")
        if not name or room[name] <= 0:
            break
        _lease(turn, group, state.fleet.replicas[name])
        room[name] -= group.samples
        leased = True
    return leased


def _may_judge(turn: Turn, replica: Replica) -> bool:
    judged, held = turn.state.evaluation.round, replica.position
    if judged is None or held is None or (held.lineage, held.version) != (judged.lineage, judged.version):
        return False
    return not turn.state.weights.travelling_to(replica.name, held, turn.state.meshes.epochs_of(replica.name))


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
    if group.partial is not None and not _comes_in_time(turn, group.partial.oldest, version):
        drop_partial(turn, group, "too old")
    state.ledger.lease(group, replica.name, replica.incarnation, version, state.now, until)
    group.wave = state.ledger.wave
    turn.fact(Leased(group.id, group.attempt, replica.name, replica.incarnation, version, group.revision, group.begun))


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
        suite=group.suite,
        reward_weights=turn.state.hyperparameters.reward_weights(group.revision) if group.purpose == "train" else {},
        partial=group.partial,
    )


def hand_over(turn: Turn, group: Group, partial: Partial, spooled: Spooled, checked: int) -> None:
    """A lessee leaves a group part-way: queue it again, with the tokens so far if the next lessee may go on from them.

    Tokens of weights newer than `checked`, which were never compared with the policy's, are not taken: an earlier
    lessee's stay where they are.
    """
    state, attempt, tokens = turn.state, group.attempt, sum(partial.lengths)
    cause = ""
    if turn.recipe.run.deterministic:
        cause = "deterministic run"
    elif partial.newest > checked:
        cause = "weights not compared"
    give_back(turn, group, "handed_back", advanced=not cause)
    if cause:
        state.ledger.book(state.lineage).partials_dropped += 1
        turn.fact(PartialRefused(state.lineage, group.id, attempt, tokens, cause))
    else:
        state.ledger.hand_over(group, state.lineage, partial, spooled)
        turn.fact(HandedOver(state.lineage, group.id, attempt, tokens, partial.oldest))


def drop_partial(turn: Turn, group: Group, cause: str) -> None:
    """What was handed over of a queued group is of no use any more: its next lease begins anew."""
    assert group.partial is not None
    turn.fact(PartialDropped(turn.state.lineage, group.id, group.attempt, sum(group.partial.lengths), cause))
    turn.state.ledger.drop_partial(group, turn.state.lineage)


def give_back(turn: Turn, group: Group, cause: str, *, advanced: bool = False) -> None:
    """A lease ended without a report: queue the group again, or give it up after too many attempts.

    One that has `advanced` the group does not count as an attempt.
    In a deterministic run the whole open wave goes back with it, since its composition must be the same again.
    """
    state = turn.state
    again = [group]
    if turn.recipe.run.deterministic and group.purpose != "sft":
        wave = [*state.ledger.having("leased", group.purpose), *state.ledger.having("reported", group.purpose)]
        again = [g for g in wave if g.wave == group.wave and (g.state == "leased" or not g.kept)]
    for each in again:
        if each is group and each.attempt - each.handed_over - advanced >= ATTEMPTS:
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
        table = turn.recipe.evaluation
        split = table is not None and table.suites[group.suite].category is not None
        state.evaluation.round.answer(group.suite, group.row, Answer(0.0, NOT_JUDGED if split else ""))
    _revoke(turn, lessee, group.incarnation, group, cause)


def _revoke(turn: Turn, lessee: str, incarnation: int, group: Group, cause: str) -> None:
    replica = turn.state.fleet.replicas.get(lessee)
    if replica is not None and replica.live and replica.incarnation == incarnation:
        turn.send(replica, RevokeLease([LeaseRef(group.id, group.attempt)], cause))


def _running(turn: Turn, replica: Replica) -> int:
    return turn.state.ledger.load(replica.name)


def _room(turn: Turn, replica: Replica) -> int:
    """Sequences that a replica may still be leased."""
    table = turn.recipe.evaluator if replica.role == "evaluator" else turn.recipe.rollout
    return table.slots * AHEAD - _running(turn, replica)


def _wave_under_way(turn: Turn) -> bool:
    """Whether a deterministic run has work for its rollout under way or about to begin."""
    count = turn.state.ledger.count
    if turn.recipe.judge != "rollout":
        return count("leased", "train") > 0
    return count("leased", "train") + count("leased", "eval") + count("queued", "eval") > 0
