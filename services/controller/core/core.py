"""The core: `outcome = core.step(event)`.

The shell hands in one event after the other, each with the time; the same events from the same start give the same
state, facts and effects, in any process. Replay after a crash, the simulator and the audit of a replay rest on that.
"""

from __future__ import annotations

import msgspec

from services.controller.core import refusals
from services.controller.core.deadlines import expire, next_deadline
from services.controller.core.events import (
    AnyEvent,
    DeadlinePassed,
    HyperparametersRequested,
    MeshIdFailed,
    MeshIdMinted,
    MessageReceived,
    ReplicaLost,
    ReplicaMessage,
    ReplicaRegistered,
    RunBegan,
    Spooled,
    Steered,
    SteeringOrder,
    StopRequested,
    TermBegan,
)
from services.controller.core.fleet import Replica
from services.controller.core.ledger import Group
from services.controller.core.orders import give_orders
from services.controller.core.outcome import EndMint, Joined, Outcome, Reported, StageBegan, Welcome
from services.controller.core.rules import (
    draining,
    joining,
    judging,
    leasing,
    losing,
    mustering,
    saving,
    steering,
    syncing,
    training,
)
from services.controller.core.state import State, Turn, initial_state
from shared.config import Recipe
from shared.messages import (
    CheckpointFailed,
    CheckpointSaved,
    Goodbye,
    GradientsReady,
    GroupReport,
    LeaseReturned,
    Leaving,
    MeshFailed,
    MeshFormed,
    Refused,
    Register,
    ReplicaFailed,
    RevokeMesh,
    StateDigest,
    StateLoaded,
    StateReceived,
    StateSent,
    StepApplied,
    WeightsFailed,
    WeightsLoaded,
    WeightsSent,
)

RULES = (
    training.close_step,
    mustering.muster,
    joining.close_comparison,
    saving.stop_run,
    saving.turn_stage,
    saving.save_regularly,
    saving.close_run,
    draining.drain_replicas,
    losing.roll_back_if_orphaned,
    joining.keep_members,
    judging.judge_rows,
    judging.cancel_round,
    judging.close_round,
    judging.open_round,
    training.commit_step,
    training.filter_groups,
    training.form_batch,
    syncing.sync_weights,
    training.begin_step,
    leasing.lease_groups,
    saving.end_run,
)
"""What may begin, in order of precedence: a checkpoint and a sync are ordered before the step that would change what
they take."""

MOST_PASSES = 1000
"""A rule set that never comes to rest is a bug; better a crash with a name than a silent loop."""


class Core:
    """The state and the only way to change it."""

    def __init__(self, recipe: Recipe, state: State | None = None) -> None:
        self.recipe = recipe
        self.state = state if state is not None else initial_state(recipe)

    @classmethod
    def restore(cls, recipe: Recipe, snapshot: bytes) -> Core:
        """The core as it was when `snapshot` was taken."""
        return cls(recipe, msgspec.msgpack.decode(snapshot, type=State))

    def snapshot(self) -> bytes:
        """The whole state as msgpack."""
        return msgspec.msgpack.encode(self.state)

    def next_deadline(self) -> float:
        """When `DeadlinePassed` is due, in the controller's clock."""
        return next_deadline(self.state, self.recipe)

    def judge_registration(self, register: Register) -> Refused | None:
        """Why a rank may not join; changes nothing."""
        return refusals.judge_registration(self.state, self.recipe, register)

    def judge(self, replica: str, incarnation: int, message: ReplicaMessage) -> refusals.Verdict:
        """Whether a message is fresh, a duplicate, or refused; changes nothing."""
        return refusals.judge(self.state, replica, incarnation, message)

    def judge_order(self, order: SteeringOrder) -> refusals.Verdict:
        """Whether what a person asks is fresh, done already, or refused; changes nothing."""
        return steering.judge_order(self.state, self.recipe, order)

    def step(self, event: AnyEvent) -> Outcome:
        """Take one event."""
        turn = Turn(self.state, self.recipe, event)
        self.state.now = event.at
        _take(turn, event)
        for _ in range(MOST_PASSES):
            acted = [rule(turn) for rule in RULES]
            if not any(acted):
                break
        else:
            raise RuntimeError(f"the rules did not come to rest after {type(event).__name__}")
        give_orders(turn)
        return turn.outcome


def _take(turn: Turn, event: AnyEvent) -> None:
    state = turn.state
    match event:
        case RunBegan():
            state.run = event.run
            turn.progress()
            turn.fact(StageBegan(state.stages.name, 0))
        case TermBegan():
            _begin_term(turn, event.term)
        case ReplicaRegistered():
            _register(turn, event.register)
        case ReplicaLost():
            if state.fleet.is_current(event.replica, event.incarnation):
                losing.lose(turn, state.fleet.replicas[event.replica], event.cause)
        case DeadlinePassed():
            expire(turn)
        case MeshIdMinted():
            until = state.now + turn.recipe.timeouts.mesh_s
            state.meshes.minted(event.epoch, event.unique_id, until, event.further_ids)
        case MeshIdFailed():
            joining.mesh_failed(turn, event.epoch, "")
            syncing.revoke_mesh(turn, event.epoch, event.cause, failed=True)
        case HyperparametersRequested():
            step = state.lineages.committed.step + (state.steps.step is not None)
            state.hyperparameters.request(event.changes, max(event.at_step or 0, step))
        case StopRequested():
            state.stages.stopping = event.cause
            state.stages.stop_deadline = state.now + turn.recipe.timeouts.step_s
        case Steered():
            steering.take_order(turn, event.order)
        case MessageReceived():
            _receive(turn, state.fleet.replicas[event.replica], event.body, event.spooled)


def _begin_term(turn: Turn, term: int) -> None:
    """A new controller process: sessions begin anew, waits are granted again, what was forming is void."""
    state = turn.state
    state.term = term
    state.sent = {}
    if state.stages.outcome:  # resumed after its end: what it had given up on is tried as often again
        state.stages.filtered_in_a_row, state.steps.nonfinite, state.lineages.failures = 0, 0, 0
        state.steering.paused = ""
    state.stages.reopen()
    turn.progress()
    for replica in state.fleet.live():
        state.fleet.doubt(replica, state.now + turn.recipe.timeouts.rejoin_s)
    for epoch in list(state.meshes.unformed):
        syncing.revoke_mesh(turn, epoch, "the controller died while it was forming", failed=False)
    for group in state.ledger.having("leased"):
        group.deadline = state.now + turn.recipe.timeouts.lease_s
    if state.steps.step is not None:
        state.steps.step.deadline = state.now + turn.recipe.timeouts.step_s
    for edge in state.weights.edges.values():
        edge.deadline = state.now + turn.recipe.timeouts.transfer_s
    if state.lineages.saving is not None:
        state.lineages.saving.deadline = state.now + turn.recipe.timeouts.checkpoint_s


def _register(turn: Turn, register: Register) -> None:
    state = turn.state
    returning = state.fleet.knows(register)
    replica = state.fleet.same_start(register)
    if replica is None:
        before = state.fleet.replicas.get(register.replica)
        if before is not None and before.live:
            losing.lose(turn, before, "a new process took its name")
        replica = state.fleet.enter(register, state.now)
        turn.fact(Joined(replica.name, replica.role, replica.incarnation))
        replica.deadline = state.now + turn.recipe.timeouts.load_s
    else:
        state.fleet.hear(replica, register)
        if not replica.confirmed and not replica.absent:
            _confirm(turn, replica)
    if replica.state == "joining" and not replica.missing:
        _complete(turn, replica, register)
    held = {(ref.group, ref.attempt) for ref in register.leases}
    leased = state.ledger.held_by(replica.name)
    standing = [(group.id, group.attempt) for group in leased if (group.id, group.attempt) in held]
    if register.rank == 0:
        state.sent[replica.name] = []
        for group in leased:
            group.told = (group.id, group.attempt) in held
    turn.effect(Welcome(replica.name, register.rank, register.nonce, replica.incarnation, standing))
    if returning and register.rank == 0:
        for epoch in state.meshes.revoked_of(replica.name):
            turn.send(replica, RevokeMesh(epoch, "it was revoked, perhaps while this rank had no session"))


def _confirm(turn: Turn, replica: Replica) -> None:
    """Every rank that had registered before this term has done so again."""
    state = turn.state
    until = state.now + turn.recipe.timeouts.load_s if replica.state in ("joining", "loading") else None
    if replica.state == "draining":
        until = draining.gone_by(turn, replica)
    state.fleet.confirm(replica, True, until)
    state.ledger.hungry[replica.name] = None
    syncing.consider(turn, replica)


def _complete(turn: Turn, replica: Replica, register: Register) -> None:
    """All ranks are there. A policy that proves to hold the committed state, lost though it was, need not load it."""
    state = turn.state
    holds = (
        replica.role == "policy" and register.holds == state.lineages.committed and state.lineages.committed.step > 0
    )
    state.fleet.move(replica, "loading", state.now)
    if holds:
        state.fleet.hold(replica, register.holds)
        state.fleet.move(replica, "ready", state.now)
    else:
        replica.deadline = state.now + turn.recipe.timeouts.load_s


def _receive(turn: Turn, replica: Replica, message: ReplicaMessage, spooled: Spooled | None) -> None:
    state = turn.state
    match message:
        case Goodbye():
            losing.lose(turn, replica, message.cause, left=True)
        case Leaving():
            losing.ask_to_leave(turn, replica, message.cause)
        case ReplicaFailed():
            losing.lose(turn, replica, message.cause)
            if message.fatal:
                state.stages.finish("failed", f"{replica.name}: {message.cause}")
        case StateLoaded():
            turn.progress()
            if replica.role == "policy":
                replica.doubtful = False
                current = message.position == state.lineages.committed
                state.fleet.hold(replica, message.position if current else None)
                state.fleet.move(replica, "ready" if current else "stale", state.now)
            else:
                state.fleet.move(replica, "stale", state.now)
            syncing.consider(turn, replica)
        case GroupReport():
            replica.answered = state.now
            _take_report(turn, message, spooled)
        case LeaseReturned():
            replica.answered = state.now
            group = turn.group(message.group)
            if message.partial is not None and spooled is not None:
                leasing.hand_over(turn, group, message.partial, spooled, _checked_version(turn, group))
            elif message.cause == "handed_back":
                leasing.give_back(turn, group, "handed_back")
            else:
                leasing.end_group(turn, group, message.cause)
        case GradientsReady():
            if state.steps.vote(replica.name, message.finite, message.metrics) == "no":
                training.reject_step(turn)
        case StepApplied():
            state.fleet.hold(replica, state.lineages.committed)
            state.steps.applied_by(replica.name)
        case CheckpointSaved():
            saving.checkpoint_saved(turn, message.position, message.path)
        case CheckpointFailed():
            saving.checkpoint_failed(turn, message.cause)
        case StateSent():
            joining.state_sent(turn, message.digest)
        case StateReceived():
            joining.state_received(turn, message.digest)
        case StateDigest():
            if state.joining.comparison is not None:
                state.joining.comparison.digests[replica.name] = message.digest
        case MeshFormed():
            if state.meshes.member_formed(message.epoch, replica.name):
                syncing.mesh_formed(turn, message.epoch)
                if state.meshes.meshes[message.epoch].backend == "nccl":
                    turn.effect(EndMint(message.epoch))
        case MeshFailed():
            joining.mesh_failed(turn, message.epoch, replica.name)
            syncing.revoke_mesh(turn, message.epoch, f"{replica.name}: {message.cause}", failed=True)
        case WeightsSent():
            syncing.weights_sent(turn, message)
        case WeightsLoaded():
            syncing.weights_loaded(turn, message)
        case WeightsFailed():
            syncing.weights_failed(turn, message.epoch, f"{replica.name}: {message.cause}")


def _take_report(turn: Turn, report: GroupReport, spooled: Spooled | None) -> None:
    state = turn.state
    group = turn.group(report.group)
    judged = state.evaluation.round
    turn.progress()
    if group.purpose == "eval" and judged is not None and not report.oldest == report.newest == judged.version:
        leasing.give_back(turn, group, f"judged with versions {report.oldest}..{report.newest}, not {judged.version}")
        return
    if group.purpose == "train" and report.newest > _checked_version(turn, group):
        leasing.give_back(turn, group, "sampled with weights whose digest was not compared yet")
        return
    state.ledger.report(group, report, spooled)
    turn.fact(Reported(group.id, group.attempt, group.oldest, group.newest))
    state.ledger.prolong(group, state.now + turn.recipe.timeouts.lease_s)


def _checked_version(turn: Turn, group: Group) -> int:
    """The newest version that this group's lessee samples with for certain; a swap may be ahead of its verdict."""
    if group.newest_allowed is not None:
        return group.newest_allowed
    position = turn.state.fleet.replicas[group.replica].position
    return position.version if position is not None else -1
