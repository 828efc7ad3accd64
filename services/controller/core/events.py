"""What can happen to the core. Each event is journaled before its consequences leave the controller.

Heartbeats, ticks and acknowledgements never come here: only facts derived from them (a replica is lost, a deadline
has passed) are events. `at` is the controller's clock in seconds; it never goes back within a journal.
"""

from __future__ import annotations

import msgspec

from shared.messages import (
    CheckpointFailed,
    CheckpointRun,
    CheckpointSaved,
    DrainReplica,
    EvaluateRun,
    Goodbye,
    GradientsReady,
    GroupReport,
    LeaseReturned,
    Leaving,
    MeshFailed,
    MeshFormed,
    PauseRun,
    Register,
    ReplicaFailed,
    ResumeRun,
    Scalar,
    ScaleFleet,
    StateDigest,
    StateLoaded,
    StateReceived,
    StateSent,
    StepApplied,
    WeightsFailed,
    WeightsLoaded,
    WeightsSent,
)

CORE_VERSION = 5
"""Version of the core's rules: a journal record says which version took it; an upgrade starts from a snapshot."""

ReplicaMessage = (
    Goodbye | Leaving | StateLoaded | ReplicaFailed | GroupReport | LeaseReturned | GradientsReady | StepApplied
    | CheckpointSaved | CheckpointFailed | StateSent | StateReceived | StateDigest
    | MeshFormed | MeshFailed | WeightsSent | WeightsLoaded | WeightsFailed
)  # fmt: skip


SteeringOrder = PauseRun | ResumeRun | CheckpointRun | EvaluateRun | DrainReplica | ScaleFleet
"""What a person may ask of a run that goes on, besides its end and its hyper-parameters."""


class Spooled(msgspec.Struct, frozen=True):
    """Where payload frames that a replica sent lie: `sizes` are their lengths, `hash` is xxh3-64 of all bytes."""

    segment: int
    offset: int
    sizes: list[int]
    hash: int


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of every event."""

    at: float


class RunBegan(Event, frozen=True, kw_only=True, tag="run_began"):
    """The first event of a journal: which run, under which recipe (TOML)."""

    run: str
    recipe: str


class TermBegan(Event, frozen=True, kw_only=True, tag="term_began"):
    """A controller process took over. Sequences begin anew; nobody is known to be there until it registers again."""

    term: int


class ReplicaRegistered(Event, frozen=True, kw_only=True, tag="replica_registered"):
    """A rank introduced itself; the same nonce again is the same incarnation coming back."""

    register: Register


class MessageReceived(Event, frozen=True, kw_only=True, tag="message_received"):
    """A reliable message of rank 0 of a replica, fresh and not refused; `spooled` tells where its payload lies."""

    replica: str
    incarnation: int
    rank: int
    body: ReplicaMessage
    spooled: Spooled | None


class ReplicaLost(Event, frozen=True, kw_only=True, tag="replica_lost"):
    """The shell knows that this incarnation is gone: silent too long, or its process ended."""

    replica: str
    incarnation: int
    cause: str


class DeadlinePassed(Event, frozen=True, kw_only=True, tag="deadline_passed"):
    """The clock reached the earliest deadline that the core asked to be woken for."""


class MeshIdMinted(Event, frozen=True, kw_only=True, tag="mesh_id_minted"):
    """The shell made the unique id that the core asked for, and those of the replicas' further ranks."""

    epoch: int
    unique_id: bytes
    further_ids: list[bytes] = []


class MeshIdFailed(Event, frozen=True, kw_only=True, tag="mesh_id_failed"):
    """There is no unique id for the mesh of `epoch`, or what minted it died before all members had come."""

    epoch: int
    cause: str


class HyperparametersRequested(Event, frozen=True, kw_only=True, tag="hyperparameters_requested"):
    """A person changed live fields (validated by the shell against the schema), from `at_step` on or at once."""

    changes: dict[str, Scalar]
    at_step: int | None


class StopRequested(Event, frozen=True, kw_only=True, tag="stop_requested"):
    """A person ends the run: finish the batch in hand, checkpoint, shut down; `orrery resume` goes on from there."""

    cause: str


class Steered(Event, frozen=True, kw_only=True, tag="steered"):
    """A person steers the run; the shell has asked `judge_order` whether it can."""

    order: SteeringOrder


AnyEvent = (
    RunBegan | TermBegan | ReplicaRegistered | MessageReceived | ReplicaLost | DeadlinePassed | MeshIdMinted
    | MeshIdFailed | HyperparametersRequested | StopRequested | Steered
)  # fmt: skip
