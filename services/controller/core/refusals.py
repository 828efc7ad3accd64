"""Which messages the core takes: fresh ones; duplicates are acknowledged and ignored, the rest is refused by name.

Pure reading: nothing here changes the state. The shell asks before it spools or journals anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import msgspec

from services.controller.core.events import ReplicaMessage
from services.controller.core.fleet import Replica
from services.controller.core.ledger import Group
from services.controller.core.state import State
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
    Partial,
    Refused,
    Register,
    ReplicaFailed,
    StateDigest,
    StateLoaded,
    StateReceived,
    StateSent,
    StepApplied,
    WeightsFailed,
    WeightsLoaded,
    WeightsSent,
)

Verdict = Refused | Literal["fresh", "duplicate"]


def judge_registration(state: State, recipe: Recipe, register: Register) -> Refused | None:
    """Why this rank may not join, or None when it may."""
    if register.role == "person":
        return Refused(
            "role", "policy, rollout or evaluator", register.role, "a person asks questions without registering"
        )
    if register.role == "evaluator" and recipe.judge != "evaluator":
        return Refused(
            "role", 'a recipe with evaluator.engine = "own"', f"evaluator.engine = {recipe.evaluator.engine!r}",
            "start no evaluator for this run, or set the key in its recipe",
        )  # fmt: skip
    if not 0 <= register.rank < register.world:
        return Refused(
            "malformed", f"a rank below {register.world}", str(register.rank), "give each rank its own number"
        )
    if state.fleet.superseded(register):
        return Refused(
            "incarnation", f"the newest start of {register.replica}",
            f"rank {register.rank} of one that is over (pid {register.pid})", "this process was replaced: end it",
        )  # fmt: skip
    if recipe.run.deterministic and register.role == "policy":
        names = ", ".join(r.name for r in state.fleet.live("policy") if r.name != register.replica)
        if names:
            return Refused(
                "role", "one policy replica in a deterministic run", f"{register.replica} beside {names}",
                "stop the other one first, or set run.deterministic = false",
            )  # fmt: skip
    known = state.fleet.replicas.get(register.replica)
    same = state.fleet.same_start(register)
    if same is not None and same.world != register.world:
        return Refused(
            "identity", f"a rank of {same.name}'s {same.world}", f"one of {register.world}",
            "start all ranks of a replica with the same number of them",
        )  # fmt: skip
    if known is not None and known.live and known.role != register.role:
        return Refused("identity", f"{register.replica} as {known.role}", register.role, "choose another replica name")
    conflict = state.fleet.dataset_conflict(register)
    if conflict is not None:
        expected, got = (f"{d.name}: {d.length} rows, fingerprint {d.fingerprint}" for d in conflict)
        return Refused("dataset", expected, got, "every service must read the same data: compare files and versions")
    return _judge_device(state, recipe, register)


def _judge_device(state: State, recipe: Recipe, register: Register) -> Refused | None:
    if register.device is None and recipe.weights.backend == "nccl":
        return Refused(
            "nccl", 'a GPU for every rank (weights.backend = "nccl")', f"rank {register.rank} without one",
            'start it where it sees a GPU, or set weights.backend = "auto" or "gloo"',
        )  # fmt: skip
    conflict = state.fleet.nccl_conflict(register)
    if conflict is not None and register.device is not None:
        other, version = conflict
        return Refused(
            "nccl", f"NCCL {version}, as {other.name} has", f"NCCL {register.device.nccl}",
            "a communicator wants one version on all ranks: set weights.nccl_library to one file for all services",
        )  # fmt: skip
    return None


def judge(state: State, name: str, incarnation: int, message: ReplicaMessage) -> Verdict:
    """Fresh, duplicate, or why the message is refused."""
    replica = state.fleet.replicas.get(name)
    if replica is None or not state.fleet.is_current(name, incarnation):
        now = f"incarnation {replica.incarnation} ({replica.state})" if replica else "no such replica"
        if replica is not None and replica.live:
            return Refused("incarnation", now, f"incarnation {incarnation}", "this process was replaced: end it")
        return Refused("unknown_sender", now, f"incarnation {incarnation}", "register again")
    judge_one: Callable[[State, Replica, ReplicaMessage], Verdict] = _JUDGES[type(message)]
    return judge_one(state, replica, message)


def _always(state: State, replica: Replica, message: ReplicaMessage) -> Verdict:
    return "fresh"


def _leaving(state: State, replica: Replica, message: Leaving) -> Verdict:
    return "duplicate" if state.fleet.goes(replica) else "fresh"


def _loaded(state: State, replica: Replica, message: StateLoaded) -> Verdict:
    held, lineages = message.position, state.lineages
    if replica.role != "policy" or held is None:
        return "fresh" if replica.state == "loading" else "duplicate"
    if replica.doubtful:
        return "duplicate"  # an answer to an older order: what it says it holds it is to forget
    if replica.state == "stale":  # a checkpoint overtook the state that another policy was to send
        join = state.joining.join
        sent = join is not None and join.joiner == replica.name and join.position is not None
        return "fresh" if held == lineages.committed and not sent else "duplicate"
    if replica.state != "loading":
        return "duplicate"
    older = held.lineage == lineages.settled.lineage and held.step < lineages.settled.step
    if held != lineages.settled and not older:  # one that a checkpoint has overtaken joins the others
        return Refused("lineage", str(lineages.settled), str(held), "load what LoadState names")
    return "fresh"


def _lease(state: State, replica: Replica, message: GroupReport | LeaseReturned) -> Verdict:
    if message.lineage != state.lineage:
        return Refused(
            "lineage", str(state.lineage), str(message.lineage), "drop this work: its weights no longer exist"
        )
    group = state.ledger.groups.get(message.group)
    named = f"group {message.group} attempt {message.attempt}"
    if group is None or group.attempt != message.attempt:
        now = f"attempt {group.attempt}" if group else "the group is closed"
        return Refused("attempt", now, named, "drop this work: the lease ended or was given to another replica")
    if group.state != "leased":
        return (
            "duplicate" if group.replica == replica.name else Refused("attempt", group.state, named, "drop this work")
        )
    if (group.replica, group.incarnation) != (replica.name, replica.incarnation):
        return Refused("attempt", f"a report of {group.replica}", f"one of {replica.name}", "report only own leases")
    if isinstance(message, GroupReport):
        return _report(message, group)
    return _partial(message, message.partial, group) if message.partial is not None else "fresh"


def _report(report: GroupReport, group: Group) -> Verdict:
    counts = {len(report.rewards), len(report.lengths), len(report.truncated), *(len(p) for p in report.parts.values())}
    if counts != {group.samples}:
        return Refused(
            "malformed", f"{group.samples} samples", f"lists of lengths {sorted(counts)}", "report every sample once"
        )
    if not all(math.isfinite(reward) for reward in report.rewards):
        return Refused("malformed", "finite rewards", str(report.rewards), "return the lease as reward_failed instead")
    if group.purpose != "eval" and (not report.arrays or min(report.lengths) < 1):
        return Refused(
            "malformed", "arrays with at least one token a sample", str(report.lengths), "see docs/protocol.md"
        )
    return _age(report.oldest, group) if group.purpose != "sft" else "fresh"


def _partial(message: LeaseReturned, partial: Partial, group: Group) -> Verdict:
    if message.cause != "handed_back" or group.purpose != "train":
        return Refused(
            "malformed", "tokens of a train group that is handed back", f"{message.cause} of a {group.purpose} group",
            "return it without a partial",
        )  # fmt: skip
    lengths = partial.lengths
    if len(lengths) != group.samples or min(lengths) < 0 or not any(lengths) or not partial.arrays:
        return Refused(
            "malformed", f"arrays, and lengths of {group.samples} samples, some begun", str(lengths),
            "return a group without tokens without a partial",
        )  # fmt: skip
    return _age(partial.oldest, group)


def _age(oldest: int, group: Group) -> Verdict:
    """Tokens of a lease are no older than its weights, or than those that it goes on from, which are among them."""
    if oldest < group.sampled_at:
        return Refused(
            "state", f"tokens of version {group.sampled_at} or newer", str(oldest), "sample with synced weights"
        )
    if group.partial is not None and oldest > group.partial.oldest:
        return Refused(
            "state", f"the tokens of version {group.partial.oldest} that the lease came with", str(oldest),
            "go on from what the grant brings, or hand it back",
        )  # fmt: skip
    return "fresh"


def _gradients(state: State, replica: Replica, message: GradientsReady) -> Verdict:
    step = state.steps.step
    if step is None or step.attempt != message.attempt or replica.name not in step.shares:
        now = f"attempt {step.attempt}" if step else "no step in hand"
        return Refused("attempt", now, f"attempt {message.attempt}", "drop these gradients")
    return "fresh" if step.state == "computing" and replica.name not in step.votes else "duplicate"


def _applied(state: State, replica: Replica, message: StepApplied) -> Verdict:
    if replica.position == message.position:
        return "duplicate"
    step, committed = state.steps.step, state.lineages.committed
    if step is None or step.state != "committed" or replica.name not in step.shares:
        return Refused(
            "state", "an answer to CommitStep", f"step {message.step} applied", "apply only what is committed"
        )
    if (message.position.lineage, message.position.step) != (committed.lineage, committed.step):
        return Refused("lineage", str(committed), str(message.position), "register anew and load what LoadState names")
    return "fresh"


def _saved(state: State, replica: Replica, message: CheckpointSaved | CheckpointFailed) -> Verdict:
    saving = state.lineages.saving
    if saving is not None and (saving.replica, saving.position) == (replica.name, message.position):
        return "fresh"
    if message.position == state.lineages.settled:
        return "duplicate"
    return Refused(
        "state", f"the checkpoint of {saving and saving.position}", str(message.position), "wait for SaveCheckpoint"
    )


def _formed(state: State, replica: Replica, message: MeshFormed | MeshFailed) -> Verdict:
    mesh = state.meshes.meshes.get(message.epoch)
    if mesh is None or not mesh.has(replica.name):
        if isinstance(message, MeshFailed):
            return "duplicate"  # the others' errors follow from the revoke
        return Refused("epoch", "a live mesh", f"epoch {message.epoch}", "leave this mesh: it was revoked")
    if isinstance(message, MeshFormed) and replica.name in mesh.formed:
        return "duplicate"
    return "fresh"


def _transferred(state: State, replica: Replica, message: StateSent | StateReceived) -> Verdict:
    join = state.joining.join
    if join is None or (join.state_mesh, join.position) != (message.epoch, message.position):
        if replica.state == "ready":
            return "duplicate"
        now = f"epoch {join.state_mesh}" if join else "no transfer"
        return Refused("epoch", now, f"epoch {message.epoch}", "drop this state: the transfer was given up")
    speaker, told = (join.source, join.sent) if isinstance(message, StateSent) else (join.joiner, join.received)
    if replica.name != speaker:
        return Refused("role", f"a word of {speaker}", f"one of {replica.name}", "answer only what you were told to do")
    return "fresh" if told is None else "duplicate"


def _compared(state: State, replica: Replica, message: StateDigest) -> Verdict:
    comparison = state.joining.comparison
    if comparison is None or comparison.position != message.position or replica.name in comparison.digests:
        return "duplicate"
    return "fresh" if comparison.asked.get(replica.name) == replica.incarnation else "duplicate"


def _weights(state: State, replica: Replica, message: WeightsSent | WeightsLoaded | WeightsFailed) -> Verdict:
    edge = state.weights.edges.get(message.epoch)
    if edge is None or edge.position != message.position:
        if isinstance(message, WeightsFailed) or replica.position == message.position:
            return "duplicate"
        now = f"weights of {edge.position}" if edge is not None and edge.position is not None else "no transfer"
        return Refused("epoch", now, f"epoch {message.epoch}", "drop these weights: the transfer was given up")
    if isinstance(message, WeightsSent):
        if replica.name != edge.source:
            return Refused("role", f"the source {edge.source}", replica.name, "only the source reports WeightsSent")
        return "duplicate" if edge.sent else "fresh"
    if isinstance(message, WeightsLoaded):
        if replica.name != edge.receiver:
            return Refused("role", f"the receiver {edge.receiver}", replica.name, "only the receiver loads")
        return "duplicate" if edge.loaded is not None else "fresh"
    ends = (edge.source, edge.receiver)
    return "fresh" if replica.name in ends else "duplicate"


_JUDGES: dict[type[msgspec.Struct], Callable[..., Verdict]] = {
    Goodbye: _always,
    Leaving: _leaving,
    ReplicaFailed: _always,
    StateLoaded: _loaded,
    GroupReport: _lease,
    LeaseReturned: _lease,
    GradientsReady: _gradients,
    StepApplied: _applied,
    CheckpointSaved: _saved,
    CheckpointFailed: _saved,
    StateSent: _transferred,
    StateReceived: _transferred,
    StateDigest: _compared,
    MeshFormed: _formed,
    MeshFailed: _formed,
    WeightsSent: _weights,
    WeightsLoaded: _weights,
    WeightsFailed: _weights,
}
