"""The protocol: every message that services exchange, grouped by conversation.

Each message is a typed struct that travels as a msgpack map with its name under `type`; unknown fields and wrong
types are refused. Arrays never travel inside a struct: they follow it as raw frames, described by `ArrayHeader`s, so
that the controller forwards them without decoding. `docs/protocol.md` shows the wire format and the conversations.

Two classes of delivery:

- **reliable** (`reliable = True`): numbered within a session, acknowledged, resent until acknowledged, delivered in
  order, duplicates dropped. The controller acknowledges only what is on its disk.
- **transient**: heartbeats, replies, rendezvous. May be lost; whoever needs an answer asks again.

This module imports neither torch nor numpy.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import msgspec

PROTOCOL = 1
"""Version of the wire format; a peer that speaks another one is refused by name."""

Role = Literal["policy", "rollout", "evaluator", "person"]
Purpose = Literal["sft", "train", "eval"]
Scalar = bool | int | float | str


def _tag(name: str) -> str:
    """`GroupReport` -> "group_report": the message's name on the wire."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag=_tag):
    """Base of every message. `reliable` tells its class of delivery."""

    reliable: ClassVar[bool] = True


class Transient(Message, frozen=True):
    """Base of messages that are neither numbered nor resent."""

    reliable: ClassVar[bool] = False


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the pieces that messages are made of."""


# --- pieces ----------------------------------------------------------------------------------------------------------


class ArrayHeader(Part):
    """Describes one raw frame: row-major, little-endian. `dtype` is numpy's name ("int32", "float32")."""

    name: str
    dtype: str
    shape: list[int]


class Position(Part):
    """A point in the life of the weights: after `step` optimizer steps, `version` batches, in `lineage`."""

    lineage: int
    version: int
    step: int


class LeaseRef(Part):
    """Names one attempt at one prompt group."""

    group: int
    attempt: int


class DatasetIdentity(Part):
    """What a service sees under a dataset's name; the first registrant's is journaled, another is refused."""

    name: str
    length: int
    fingerprint: str


class Sampling(Part):
    """How an engine samples: temperature 0 is greedy; `top_k` 0 and `top_p` 1 mean no truncation."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


class Partial(Part):
    """What attempts at a group have sampled of it so far, for another replica to go on from (partial rollout).

    `lengths` has one entry a sample, 0 for one that was not begun. Payload frames follow the message, as `arrays` says:
    `tokens`, `logprobs` and `versions`, each of sum(lengths), as those of a `GroupReport`. `oldest` is the oldest
    version of all these tokens, `newest` the newest of those that the last lease has added.
    """

    lengths: list[int]
    oldest: int
    newest: int
    arrays: list[ArrayHeader]


class Grant(Part):
    """A lease on one prompt group: which row to answer, how, by when, and with weights no older than `version`.

    `suite` names the recipe's suite that an eval group belongs to, and is empty otherwise. `reward_weights` are those
    of the reward's parts by name, under `revision`; a part that is not named keeps the recipe's. `partial` is what
    others have sampled of the group: its samples go on from there.
    """

    group: int
    attempt: int
    lineage: int
    purpose: Purpose
    dataset: str
    fingerprint: str
    epoch: int
    row: int
    seed: int
    samples: int
    sampling: Sampling
    revision: int
    version: int
    deadline_s: float
    suite: str = ""
    reward_weights: dict[str, float] = {}
    partial: Partial | None = None


class AssignedGroup(Part):
    """A group inside a `TrainStep`; its payload frames follow in the order of `arrays`.

    `temperature` is the one that its tokens were sampled with: log-probs are compared under the same distribution.
    `replica` is who sampled them, or the last of them where one has continued what others began.
    """

    group: int
    attempt: int
    purpose: Purpose
    prompt_length: int
    lengths: list[int]
    advantages: list[float]
    temperature: float
    arrays: list[ArrayHeader]
    replica: str = ""


class MeshMember(Part):
    """One rank of one incarnation of a replica inside a mesh."""

    replica: str
    incarnation: int
    rank: int


class MeshIdentity(Part):
    """Who may meet whom: issued by the controller alone, one `unique_id` per attempt, never reused.

    The index in `members` is the rank inside the mesh. For `gloo` the id prefixes the rendezvous keys; for `nccl` it
    is the ncclUniqueId, and `further_ids` are those of the groups that the replicas' further ranks have beside it.
    """

    purpose: Literal["gradients", "state", "weights"]
    epoch: int
    backend: Literal["gloo", "nccl"]
    unique_id: bytes
    members: list[MeshMember]
    further_ids: list[bytes] = []


class Device(Part):
    """The GPU that a rank meets others on: its identity (UUID, hex), and the version of the NCCL that it has loaded."""

    gpu: str
    nccl: str


# --- session: who is there --------------------------------------------------------------------------------------------


class Register(Transient):
    """Rank -> controller, first message of a session and again in every new term, until `Registered` answers it.

    `nonce` names the start of a replica, and its ranks share it: the same nonce is the same incarnation. A rank of an
    older start is refused, and so are the ranks of a start of several once it was lost. `holds` is what a surviving
    process still has. `device` is None for a rank without a GPU, or where meshes are Gloo's (`weights.backend`); one
    whose NCCL is of another version than the others' is refused. A duplicate is answered again and changes nothing.
    """

    role: Role
    replica: str
    rank: int
    world: int
    nonce: int
    pid: int
    host: str
    holds: Position | None
    leases: list[LeaseRef]
    datasets: list[DatasetIdentity]
    device: Device | None = None


class Registered(Transient):
    """Controller -> rank, answers `Register`: the incarnation to sign with, and which held leases still stand.

    Whatever the rank holds beyond `leases` is void. Both directions count their sequences from 1 again.
    """

    incarnation: int
    leases: list[LeaseRef]


class Heartbeat(Transient):
    """Rank -> controller, every `bus.heartbeat_s`, from the bus thread. `progress` is a counter of work done, apart.

    `seconds` is the time spent in each state since the process began.
    """

    state: str
    progress: int
    seconds: dict[str, float] = {}


class HeartbeatReply(Transient):
    """Controller -> rank, answers `Heartbeat`; its envelope carries the term, so a new term is noticed."""


class Ack(Transient):
    """Either side: every reliable message of this session up to `sequence` has arrived (controller: is durable)."""

    sequence: int


class Refused(Transient):
    """Either side, answers a message that cannot be taken. `fault` is a stable name; the rest is for a person.

    Faults: malformed, protocol, too_large, unknown_sender, term, incarnation, lineage, attempt, epoch, dataset,
    identity, key, role, nccl, hyperparameter, replica, state.
    """

    fault: str
    expected: str
    got: str
    advice: str


class Goodbye(Message):
    """Rank -> controller: this replica leaves of its own will, its leases go back to the queue."""

    cause: str


class Leaving(Message):
    """Replica -> controller: it was asked to leave (SIGTERM), and shall be given nothing new. -> `Drain`, in time."""

    cause: str


class Drain(Message):
    """Controller -> rank: finish or hand back what is leased, then say `Goodbye` and leave.

    A policy is told so when no step, checkpoint or transfer needs it any more; the others at once.
    """

    cause: str


class Shutdown(Message):
    """Controller -> rank: the run is over; exit with code 0."""

    cause: str


# --- loading ----------------------------------------------------------------------------------------------------------


class LoadState(Message):
    """Controller -> replica: make the model. Answered by `StateLoaded` or `ReplicaFailed`; a duplicate is, again.

    `initial`: policy loads the recipe's weights; rollout and evaluator, which have started an engine when they
    registered, answer once it stands: its weights come by sync.
    `checkpoint`: policy loads the checkpoint at `path` (model, optimizer, scheduler, RNG) as `position`.
    `peer`: policy builds the model and forgets what it holds; its state comes from another policy (`ReceiveState`).
    """

    source: Literal["initial", "checkpoint", "peer"]
    position: Position
    path: str


class StateLoaded(Message):
    """Replica -> controller: the model stands. A policy holds `position`, others nothing until their first sync.

    None: a policy whose state is to come from another one.
    """

    position: Position | None


class ReplicaFailed(Message):
    """Replica -> controller: an error that it cannot mend; `fatal` ends the run (bad recipe, bad checkpoint)."""

    cause: str
    fatal: bool


# --- leases -----------------------------------------------------------------------------------------------------------


class Lease(Message):
    """Controller -> rollout (train, eval), evaluator (eval) or policy (sft): work on these groups.

    Known attempts are ignored. Payload frames of the grants that have a `partial` follow, in the order of the grants.

    Each grant is answered by one `GroupReport` or `LeaseReturned` before its deadline.
    """

    grants: list[Grant]


class GroupReport(Message):
    """Rollout, evaluator or (sft) policy -> controller: a group is done. Payload frames follow, as `arrays` says.

    Arrays of a train or sft group: `prompt` int32[prompt_length]; `tokens` int32[sum(lengths)], the samples' response
    tokens one after the other; `logprobs` float32[sum(lengths)] under the sampling distribution; `versions`
    int32[sum(lengths)], the weight version that sampled each token. An eval report carries no arrays; its rewards are
    the verifier's raw scores, and `category` is the row's value in the suite's category column ("" without one).
    `oldest` is the oldest version of all tokens, `newest` the newest of those sampled under this lease (the lease's own
    where there are none); `seconds` is what generating took, `judge_seconds` what the rewards took after that.
    Acknowledged once spooled and journaled; a duplicate too.
    """

    group: int
    attempt: int
    lineage: int
    rewards: list[float]
    parts: dict[str, list[float]]
    prompt_length: int
    lengths: list[int]
    truncated: list[bool]
    oldest: int
    newest: int
    seconds: float
    arrays: list[ArrayHeader]
    judge_seconds: float = 0.0
    category: str = ""


class LeaseReturned(Message):
    """Replica -> controller: a grant that will not be reported. `handed_back` is leased again; other causes discard.

    With `partial`, whose payload frames follow, the next lease of a train group goes on from the tokens so far; without
    one, from those that the grant came with. Acknowledged once spooled and journaled.
    """

    group: int
    attempt: int
    lineage: int
    cause: Literal["handed_back", "row_invalid", "prompt_too_long", "reward_failed"]
    detail: str
    partial: Partial | None = None


class RevokeLease(Message):
    """Controller -> replica: stop working on these attempts; a report of one of them will be refused."""

    leases: list[LeaseRef]
    cause: str


# --- steps ------------------------------------------------------------------------------------------------------------


class TrainStep(Message):
    """Controller -> policy: compute the gradients of one optimizer step. Payload frames of all groups follow in order.

    A batch is `steps_in_batch` such steps (mu x minibatches); `index` counts within it. `position` is the state the
    gradients start from; losses divide by `tokens` and `sequences`, counted over all members. Answered by
    `GradientsReady`; nothing is applied yet. A duplicate is answered again from the gradient in hand.
    """

    step: int
    attempt: int
    stage: Literal["sft", "train"]
    position: Position
    index: int
    steps_in_batch: int
    members: list[MeshMember]
    mesh: int | None
    groups: list[AssignedGroup]
    tokens: int
    sequences: int
    revision: int
    hyperparameters: dict[str, Scalar]


class GradientsReady(Message):
    """Policy -> controller: the reduced gradients of this attempt are in hand. `finite` false is a vote against."""

    step: int
    attempt: int
    lineage: int
    finite: bool
    metrics: dict[str, float]


class CommitStep(Message):
    """Controller -> policy: all voted yes and the commit is journaled: apply the optimizer. -> `StepApplied`."""

    step: int
    attempt: int
    lineage: int


class StepApplied(Message):
    """Policy -> controller: the optimizer stepped; this replica now holds `position`."""

    step: int
    position: Position
    metrics: dict[str, float]


class AbortStep(Message):
    """Controller -> policy: drop the gradients of this attempt; the step will be assigned anew."""

    step: int
    attempt: int
    lineage: int
    cause: str


# --- checkpoints ------------------------------------------------------------------------------------------------------


class SaveCheckpoint(Message):
    """Controller -> one policy: write a checkpoint of `position` into `folder`; `export` adds a Hugging Face copy.

    Its state as it is at this order; later ones are carried out while it is written.
    """

    position: Position
    folder: str
    export: bool


class CheckpointSaved(Message):
    """Policy -> controller: the checkpoint at `path` is durable; what it holds is settled."""

    position: Position
    path: str
    digest: str


class CheckpointFailed(Message):
    """Policy -> controller: the checkpoint could not be written; training goes on, nothing is settled."""

    position: Position
    cause: str


# --- policies that join, and stay equal -------------------------------------------------------------------------------


class SendState(Message):
    """Controller -> policy: stage the whole state of `position`, send it over the mesh of `epoch`. -> `StateSent`.

    Ordered before the first step of a batch, so that the receiver misses nothing that the batch needs.
    """

    epoch: int
    position: Position


class ReceiveState(Message):
    """Controller -> policy: take the state of `position` from rank 0 of the mesh of `epoch`. -> `StateReceived`.

    The next order is the step that starts from it, with an empty share.
    """

    epoch: int
    position: Position


class StateSent(Message):
    """Policy -> controller: the staged state went out; `digest` is of what was staged."""

    epoch: int
    position: Position
    digest: str
    bytes: int
    seconds: float


class StateReceived(Message):
    """Policy -> controller: this replica holds `position`; `digest` is of its state as it is now."""

    epoch: int
    position: Position
    digest: str
    seconds: float


class CheckState(Message):
    """Controller -> policy: what is the digest of your state at `position`? Ordered with each checkpoint."""

    position: Position


class StateDigest(Message):
    """Policy -> controller, answers `CheckState`; another digest than the writer's makes the replica join again."""

    position: Position
    digest: str


# --- meshes and weights -----------------------------------------------------------------------------------------------


class FormMesh(Message):
    """Controller -> every member: build this process group now. Answered by `MeshFormed` or `MeshFailed`."""

    identity: MeshIdentity
    timeout_s: float


class MeshFormed(Message):
    """Member -> controller: the group of `epoch` stands, on all ranks of this replica that are members."""

    epoch: int


class MeshFailed(Message):
    """Member -> controller: building or using the group of `epoch` failed; the controller revokes it to the others."""

    epoch: int
    cause: str


class RevokeMesh(Message):
    """Controller -> member: leave the group of `epoch`; operations in flight on it end with an error."""

    epoch: int
    cause: str


class StoreSet(Transient):
    """Member -> controller: rendezvous value of a forming mesh (idempotent). Answered by `StoreValue`."""

    epoch: int
    key: str
    value: bytes


class StoreGet(Transient):
    """Member -> controller: wait up to `timeout_s` for a rendezvous value. Answered by `StoreValue`."""

    epoch: int
    key: str
    timeout_s: float


class StoreValue(Transient):
    """Controller -> member, answers `StoreSet` and `StoreGet`; `value` is None when the wait ran out."""

    epoch: int
    key: str
    value: bytes | None


class SendWeights(Message):
    """Controller -> source: send a copy of `position` over the mesh of `epoch`. -> `WeightsSent`.

    Each rank of a policy stages and sends what it owns, any other replica's rank 0 sends what it received.
    """

    epoch: int
    position: Position


class ReceiveWeights(Message):
    """Controller -> receiver: take `position` from all others in the mesh of `epoch`. -> `WeightsLoaded`."""

    epoch: int
    position: Position


class WeightsSent(Message):
    """Source -> controller: the copy went out; `digest` is of what was staged, here or by the policy it came from."""

    epoch: int
    position: Position
    digest: str
    bytes: int
    seconds: float


class WeightsLoaded(Message):
    """Receiver -> controller: the engine now generates with `position`; `digest` is of what was received."""

    epoch: int
    position: Position
    digest: str
    seconds: float


class WeightsFailed(Message):
    """Source or receiver -> controller: this transfer failed here; the receiver stays stale."""

    epoch: int
    position: Position
    cause: str


# --- a person, and the launcher ---------------------------------------------------------------------------------------


class StatusRequest(Transient):
    """Person -> controller: what is going on? Answered by `Status`."""


class Status(Transient):
    """Controller -> person: the run as plain maps, lists and scalars (stage, replicas, evaluations, books)."""

    run: dict[str, object]


class StopRun(Transient):
    """Person -> controller: end the run after the step in hand, with a checkpoint. Answered by `Accepted`."""

    cause: str


class SetHyperparameters(Transient):
    """Person -> controller: change live fields, from `at_step` on (None: the next step). Answered by `Accepted`."""

    changes: dict[str, Scalar]
    at_step: int | None


class PauseRun(Transient):
    """Person -> controller: begin no new batch; the one in hand is finished, leases go on as far as staleness allows.

    Answered by `Accepted`, as every message of a person that steers; a repeated one changes nothing.
    """

    cause: str


class ResumeRun(Transient):
    """Person -> controller: go on after `PauseRun`."""


class CheckpointRun(Transient):
    """Person -> controller: write a checkpoint when the batch in hand is done."""


class EvaluateRun(Transient):
    """Person -> controller: judge the newest version that the judges get to hold."""


class DrainReplica(Transient):
    """Person -> controller: this replica shall leave; it is no longer wanted, if it was."""

    replica: str
    cause: str


class ScaleFleet(Transient):
    """Person -> controller: how many replicas of each of these roles the launcher shall keep running."""

    replicas: dict[Role, int]


class WantedRequest(Transient):
    """Launcher -> controller: which replicas shall run? Answered by `Wanted`."""


class Wanted(Transient):
    """Controller -> launcher: the names of the replicas to keep running, and of those that are draining.

    Once the run is over, none is wanted.
    """

    replicas: list[str]
    draining: list[str]


class ReplicaExited(Transient):
    """Launcher -> controller: this replica's process ended, so that nobody waits for heartbeats. -> `Accepted`."""

    replica: str
    pid: int
    code: int


class Accepted(Transient):
    """Controller -> person: what was asked is journaled; `detail` says what it became."""

    detail: str


AnyMessage = (
    Register | Registered | Heartbeat | HeartbeatReply | Ack | Refused | Goodbye | Leaving | Drain | Shutdown
    | LoadState | StateLoaded | ReplicaFailed
    | Lease | GroupReport | LeaseReturned | RevokeLease
    | TrainStep | GradientsReady | CommitStep | StepApplied | AbortStep
    | SaveCheckpoint | CheckpointSaved | CheckpointFailed
    | SendState | ReceiveState | StateSent | StateReceived | CheckState | StateDigest
    | FormMesh | MeshFormed | MeshFailed | RevokeMesh | StoreSet | StoreGet | StoreValue
    | SendWeights | ReceiveWeights | WeightsSent | WeightsLoaded | WeightsFailed
    | StatusRequest | Status | StopRun | SetHyperparameters | ReplicaExited | Accepted
    | PauseRun | ResumeRun | CheckpointRun | EvaluateRun | DrainReplica | ScaleFleet | WantedRequest | Wanted
)  # fmt: skip


class Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every message travels in: who says it, in which term and incarnation, as which number of the session.

    `sequence` is 0 for transient messages. `request` numbers a question within its sender, `reply_to` repeats it in
    the answer. `rank` -1 and `sender` "controller" are the controller's own.
    """

    protocol: int
    term: int
    sender: str
    rank: int
    incarnation: int
    sequence: int
    request: int
    reply_to: int
    body: AnyMessage
