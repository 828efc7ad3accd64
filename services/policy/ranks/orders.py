"""What rank 0 asks of the other ranks of its replica, and what they answer: one typed struct each, msgpack on the wire.

Invariant: an order is what rank 0 does to its own trainer at that moment. All ranks take the same orders in the same
sequence, so that they enter the same collectives. `Form` and `Revoke` alone are taken at once, and answered by what the
mesh reports. Imports no torch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from shared.messages import (
    CommitStep,
    FormMesh,
    LoadState,
    MeshFailed,
    MeshFormed,
    Position,
    RevokeMesh,
    SendWeights,
    TrainStep,
)

Kind = Literal["fatal", "restart", "mesh"]
"""What an error means: no process would do better; a fresh one may; the attempt is taken back."""


class RanksError(Exception):
    """A rank of this replica failed, died or did not answer: the replica ends, and with `fatal` the run."""

    def __init__(self, text: str, *, fatal: bool = False) -> None:
        super().__init__(text)
        self.fatal = fatal


class Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A CURVE key pair (Z85) of one crew, which nobody else knows; empty where sockets are files."""

    public: str
    secret: str


class Meet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """ZeroMQ addresses: of rank 0's `answers`, and what a member binds for its `orders`."""

    answers: str
    orders: str
    keys: Keys


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a member is told over its standard input, as a line of JSON.

    `store` is where the ranks' process group finds itself; `far` are the ranks that share no memory with rank 0; `gpu`
    is the place of the rank's own among those of its node, None for a replica that computes on CPUs.
    """

    recipe: dict[str, Any]
    run_folder: str
    replica: str
    rank: int
    world: int
    far: list[int]
    meet: Meet
    store: str
    invitation: bytes
    gpu: int | None = None


# --- orders -----------------------------------------------------------------------------------------------------------


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="order"):
    """Base of every order. `patience` is the name in [timeouts] of how long rank 0 waits for the answers."""

    patience: ClassVar[str] = "step_s"


class Load(Order, frozen=True):
    """`Learner.load`; the answer's `holds` is what that returns."""

    state: LoadState
    patience = "load_s"


class Forget(Order, frozen=True):
    """`Learner.forget`: the state will come from another policy."""


class Train(Order, frozen=True):
    """`Trainer.compute`; the step's payload frames follow."""

    step: TrainStep


class Commit(Order, frozen=True):
    """`Trainer.apply`."""

    commit: CommitStep


class Abort(Order, frozen=True):
    """`Trainer.drop`."""

    step: int
    attempt: int
    lineage: int


class Gather(Order, frozen=True):
    """`Learner.gather`: put this rank's parts of the replica's state into memory that rank 0 shares by `path`.

    `manifest`, of that memory, is a list of TensorSpec as msgpack. Far ranks send theirs.
    """

    position: Position
    manifest: bytes
    path: str
    patience = "load_s"


class Stage(Order, frozen=True):
    """`Learner.stage`: have a copy of what this rank owns of the weights; the answer's `total` is of that."""

    position: Position


class Send(Order, frozen=True):
    """`Publisher.publish`: send the copy of that position, beside whatever comes next. A failure comes as `Told`."""

    weights: SendWeights


class Take(Order, frozen=True):
    """`Learner.take`: another policy's state has come to rank 0, which shares the memory that it lies in by `path`.

    `head` is a state.Head and `manifest` a list of TensorSpec, each as msgpack. Far ranks are sent their parts.
    """

    head: bytes
    manifest: bytes
    path: str
    patience = "load_s"


class Form(Order, frozen=True):
    """Build this rank's own group of a gradients mesh, or its part of a weights mesh. Answered by `Told`."""

    mesh: FormMesh


class Revoke(Order, frozen=True):
    """Leave the group of that epoch. Not answered."""

    mesh: RevokeMesh


class Leave(Order, frozen=True):
    """End this process. Answered by its end."""


AnyOrder = Load | Forget | Train | Commit | Abort | Gather | Stage | Send | Take | Form | Revoke | Leave


class Numbered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order on the wire; answers repeat its number."""

    number: int
    order: AnyOrder


# --- answers ----------------------------------------------------------------------------------------------------------


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="answer"):
    """Base of what a member says."""

    rank: int


class Here(Answer, frozen=True):
    """The first thing that it says, as soon as it is a rank on the bus: where it takes orders."""

    orders: str


class Done(Answer, frozen=True):
    """The order was carried out. `holds`: whether a state is held now. `total`: of `Stage`, its part of the digest."""

    number: int
    holds: bool
    total: int = 0


class Failed(Answer, frozen=True):
    """The order ended in an error."""

    number: int
    kind: Kind
    cause: str


class Told(Answer, frozen=True):
    """What this rank has to say of one of its groups."""

    message: MeshFormed | MeshFailed


AnyAnswer = Here | Done | Failed | Told
