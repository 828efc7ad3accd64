"""What a step of the core gives back: facts for the journal, effects for the shell.

A *fact* is a decision put on record beside the event that caused it. The audit folds facts alone, without the core's
code, and a replay must make the same facts again, so a drifting core is noticed. An *effect* is work for the shell,
done only after the event and its facts are durable.
"""

from __future__ import annotations

from typing import Any

import msgspec

from services.controller.core.events import Spooled
from shared.messages import AnyMessage, Lease, TrainStep

# --- facts ------------------------------------------------------------------------------------------------------------


class Fact(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of every fact."""


class Issued(Fact, frozen=True, tag="issued"):
    """A prompt group was created in `lineage`; `carried` marks one that a rollback brought from the lineage before."""

    lineage: int
    group: int
    purpose: str
    carried: bool


class Leased(Fact, frozen=True, tag="leased"):
    """An attempt at a group was leased to a replica that holds weights of `version`; it goes on from `begun` tokens."""

    group: int
    attempt: int
    replica: str
    incarnation: int
    version: int
    revision: int
    begun: int = 0


class Reported(Fact, frozen=True, tag="reported"):
    """A group's samples are spooled: `oldest` is the oldest version of its tokens, `newest` that of the last lease."""

    group: int
    attempt: int
    oldest: int
    newest: int


class HandedOver(Fact, frozen=True, tag="handed_over"):
    """An attempt ended with `tokens` tokens, the oldest of version `oldest`; the next one goes on from them."""

    lineage: int
    group: int
    attempt: int
    tokens: int
    oldest: int


class PartialDropped(Fact, frozen=True, tag="partial_dropped"):
    """Tokens of attempts up to `attempt` will not be gone on from, for `cause`: the next attempt begins anew."""

    lineage: int
    group: int
    attempt: int
    tokens: int
    cause: str


class PartialRefused(Fact, frozen=True, tag="partial_refused"):
    """Tokens that an attempt wanted to hand over were not taken, for `cause`; those of earlier ones stay."""

    lineage: int
    group: int
    attempt: int
    tokens: int
    cause: str


class Requeued(Fact, frozen=True, tag="requeued"):
    """A leased (or, in a deterministic run, reported) group went back to the queue."""

    group: int
    attempt: int
    cause: str


class Discarded(Fact, frozen=True, tag="discarded"):
    """A group ended unconsumed, for `cause`; its slot is free again."""

    lineage: int
    group: int
    cause: str


class Assigned(Fact, frozen=True, tag="assigned"):
    """An attempt at an optimizer step was given to a member: the message, and where its groups' payloads lie."""

    lineage: int
    step: int
    attempt: int
    version: int
    replica: str
    message: TrainStep
    payload: list[Spooled]


class Aborted(Fact, frozen=True, tag="aborted"):
    """An attempt at a step ended before its commit."""

    lineage: int
    step: int
    attempt: int
    cause: str


class Committed(Fact, frozen=True, tag="committed"):
    """Every member voted yes: the step counts. `version` is the one that its gradients started from."""

    lineage: int
    step: int
    attempt: int
    version: int


class Consumed(Fact, frozen=True, tag="consumed"):
    """The last step of a batch committed: its groups are consumed. `staleness` is the batch's largest."""

    lineage: int
    version: int
    groups: list[int]
    staleness: int
    bound: int


class Judged(Fact, frozen=True, tag="judged"):
    """An evaluation group was scored; it is consumed by its evaluation."""

    lineage: int
    group: int
    version: int


class Evaluated(Fact, frozen=True, tag="evaluated"):
    """An evaluation ended: what it found on one suite, which has `n` rows."""

    lineage: int
    version: int
    suite: str
    n: int
    correct: float
    why: str


class Settled(Fact, frozen=True, tag="settled"):
    """A checkpoint made everything consumed up to `step` durable."""

    lineage: int
    version: int
    step: int
    path: str
    groups: list[int]


class RolledBack(Fact, frozen=True, tag="rolled_back"):
    """Nobody held the committed state any more: `lineage` begins at the last checkpoint of `before`."""

    before: int
    lineage: int
    version: int
    step: int
    redo_batches: int


class Joined(Fact, frozen=True, tag="joined"):
    """A replica's incarnation is known."""

    replica: str
    role: str
    incarnation: int


class Gone(Fact, frozen=True, tag="gone"):
    """A replica's incarnation left or was lost."""

    replica: str
    incarnation: int
    state: str
    cause: str


class Draining(Fact, frozen=True, tag="draining"):
    """A replica is given nothing new: it is about to leave."""

    replica: str
    incarnation: int
    cause: str


class Synced(Fact, frozen=True, tag="synced"):
    """A replica's engine generates with these weights, digest checked."""

    replica: str
    lineage: int
    version: int
    digest: str


class CaughtUp(Fact, frozen=True, tag="caught_up"):
    """A policy has received from `source` what the members hold, digest checked: it is one of them."""

    replica: str
    source: str
    lineage: int
    version: int
    step: int
    digest: str


class Compared(Fact, frozen=True, tag="compared"):
    """The members told the digests of their states at a checkpoint; those `different` from the writer's join again."""

    lineage: int
    version: int
    step: int
    digests: dict[str, str]
    different: list[str]


class Mustered(Fact, frozen=True, tag="mustered"):
    """So many replicas of a role were `ready` when the run first gave them work; it wanted to begin with `wanted`."""

    role: str
    wanted: int
    ready: int


class Revised(Fact, frozen=True, tag="revised"):
    """A revision of the hyper-parameters is in force from `step` on."""

    revision: int
    step: int
    changes: dict[str, bool | int | float | str]


class StageBegan(Fact, frozen=True, tag="stage_began"):
    """A stage of the recipe began at `version`."""

    stage: str
    version: int


class Finished(Fact, frozen=True, tag="finished"):
    """The run ended: complete, stopped or failed."""

    outcome: str
    cause: str


AnyFact = (
    Issued | Leased | Reported | HandedOver | PartialDropped | PartialRefused | Requeued | Discarded | Assigned
    | Aborted | Committed | Consumed | Judged | Evaluated | Settled | RolledBack | Joined | Draining | Gone | Synced
    | CaughtUp | Compared | Mustered | Revised | StageBegan | Finished
)  # fmt: skip

# --- effects ----------------------------------------------------------------------------------------------------------


class Send(msgspec.Struct, frozen=True):
    """Send a reliable message to a rank, with the payloads at these places as its frames."""

    replica: str
    rank: int
    message: AnyMessage
    payload: list[Spooled]


class Welcome(msgspec.Struct, frozen=True):
    """Open a new session with this rank and answer its Register: that of the process `nonce`, and of no other."""

    replica: str
    rank: int
    nonce: int
    incarnation: int
    leases: list[tuple[int, int]]


class Part(msgspec.Struct, frozen=True):
    """Close the sessions of an incarnation that is gone: what it still says is refused."""

    replica: str
    incarnation: int


class MintMeshId(msgspec.Struct, frozen=True):
    """Make a unique id for the mesh of `epoch` and report it as `MeshIdMinted`.

    For NCCL `count` of them, by a library of version `nccl`; where that fails, `MeshIdFailed`.
    """

    epoch: int
    backend: str
    count: int = 1
    nccl: str = ""


class ForgetMesh(msgspec.Struct, frozen=True):
    """The mesh of `epoch` no longer forms: its rendezvous values can go."""

    epoch: int


class EndMint(msgspec.Struct, frozen=True):
    """All members of the mesh of `epoch` have met: what minted its unique id can go."""

    epoch: int


class RecordMetrics(msgspec.Struct, frozen=True):
    """Append a line to metrics.jsonl."""

    line: dict[str, Any]


class RecordEvaluation(msgspec.Struct, frozen=True):
    """Write a file into eval/."""

    result: dict[str, Any]


class FreeSpool(msgspec.Struct, frozen=True):
    """No live group's payload lies in a segment below `segment`."""

    segment: int


class EndRun(msgspec.Struct, frozen=True):
    """Everything is journaled and everybody told: end with this outcome (complete, stopped, failed)."""

    outcome: str
    cause: str


Effect = (
    Send | Welcome | Part | MintMeshId | ForgetMesh | EndMint | RecordMetrics | RecordEvaluation | FreeSpool | EndRun
)


MOST_MERGED_BYTES = 8 << 20
"""Payload of leases that become one message: tokens that others have begun may be many."""


def merge_leases(effects: list[Effect]) -> list[Effect]:
    """Leases to one replica that leave together become one message, unless another order to it lies between them.

    Their payloads stay in the order of their grants.
    """
    merged: list[Effect] = []
    latest: dict[str, int] = {}
    for effect in effects:
        if isinstance(effect, Send) and isinstance(effect.message, Lease):
            before = merged[latest[effect.replica]] if effect.replica in latest else None
            if isinstance(before, Send) and isinstance(before.message, Lease):
                payload = [*before.payload, *effect.payload]
                if sum(sum(place.sizes) for place in payload) <= MOST_MERGED_BYTES:
                    grants = [*before.message.grants, *effect.message.grants]
                    merged[latest[effect.replica]] = Send(effect.replica, effect.rank, Lease(grants), payload)
                    continue
            latest[effect.replica] = len(merged)
        elif isinstance(effect, Send | Welcome | Part):
            latest.pop(effect.replica, None)
        merged.append(effect)
    return merged


class Outcome(msgspec.Struct):
    """Facts and effects of one event, in order."""

    facts: list[AnyFact] = msgspec.field(default_factory=list)
    effects: list[Effect] = msgspec.field(default_factory=list)
