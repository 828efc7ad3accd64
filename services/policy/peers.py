"""A policy and its peers: the whole state sent to one that joins, received from another, and its digest.

The *state* is everything that decides what the coming batches do: parameters and persistent buffers, the optimizer's
moments, masters and step count, the stage, the reference weights, the CPU's random generator. What travels is a head
(msgpack, as bytes) and then a staged copy in buckets, over a mesh of two. Called by the service.

Invariants: what goes out is a copy, sent from a thread, so that the next step neither waits for it nor tears it; a
receiver's digest is of what its trainer holds afterwards, not of what arrived.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.policy.trainer import Snapshot, Stage, Trainer
from shared.mesh import MeshError
from shared.mesh.membership import MeshMembership
from shared.messages import (
    AnyMessage,
    CheckState,
    Position,
    ReceiveState,
    SendState,
    StateDigest,
    StateReceived,
    StateSent,
)
from shared.telemetry import get_logger
from shared.weights import StagedWeights, TensorSpec, WeightsError, digest_of, receive_weights, send_weights
from shared.weights.staging import Area, allocate, load_tensors, manifest_of, named_weights, spec_of
from shared.weights.transfer import receive_head, send_head

MODEL, OPTIMIZER, REFERENCE, RANDOM = "model/", "optimizer/", "reference/", "random/cpu"
HEAD_LIMIT = 1 << 16
"""Most bytes of a head; more is no head."""
DIGESTS_KEPT = 4
"""Positions whose digest is remembered, for a question that comes again after the next steps."""


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scalars of a state. `reference` is where the stage's reference weights were taken."""

    position: Position
    stage: Stage | None
    steps: int
    reference: Position | None


def head_of(trainer: Trainer) -> Head:
    """The scalars of the trainer's state; it must be between two steps."""
    steps = trainer.optimizer.steps if trainer.optimizer is not None else 0
    return Head(trainer.position, trainer.stage, steps, trainer.reference.position if trainer.reference else None)


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """The tensors of the trainer's state by name; not copies."""
    found = {MODEL + name: tensor for name, tensor in named_weights(trainer.model).items()}
    if trainer.optimizer is not None:
        found |= {OPTIMIZER + name: tensor for name, tensor in trainer.optimizer.tensors().items()}
    if trainer.reference is not None:
        found |= {REFERENCE + name: tensor for name, tensor in trainer.reference.tensors.items()}
    return {**found, RANDOM: torch.get_rng_state()}


def state_digest(head: Head, tensors: dict[str, Tensor]) -> str:
    """The digest of a state: of its tensors, and of its scalars."""
    scalars = hashlib.blake2b(msgspec.msgpack.encode(head), digest_size=8).hexdigest()
    return f"{digest_of(tensors)}{scalars}"


def manifest_for(head: Head, model: PreTrainedModel) -> list[TensorSpec]:
    """What a state with this head holds, for a receiver whose model is `model`."""
    found = [TensorSpec(MODEL + spec.name, spec.dtype, spec.shape) for spec in manifest_of(model)]
    for name, parameter in model.named_parameters() if head.stage is not None else ():
        if parameter.requires_grad:
            moments = ["exp_avg", "exp_avg_sq"] if head.steps else []
            masters = ["master"] if parameter.dtype != torch.float32 else []
            found += [
                TensorSpec(f"{OPTIMIZER}{kind}/{name}", "float32", list(parameter.shape))
                for kind in (*moments, *masters)
            ]
    if head.reference is not None:
        found += [spec_of(REFERENCE + name, parameter) for name, parameter in model.named_parameters()]
    return [*found, spec_of(RANDOM, torch.get_rng_state())]


def restore(trainer: Trainer, head: Head, tensors: dict[str, Tensor]) -> None:
    """Put a state into the trainer, which holds the head's position afterwards."""
    device = next(trainer.model.parameters()).device

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    load_tensors(named_weights(trainer.model), part(MODEL))
    reference = None
    if head.reference is not None:
        copies = {name: tensor.to(device, copy=True) for name, tensor in part(REFERENCE).items()}
        reference = Snapshot(head.reference, copies)
    optimizer = {name: tensor.to(device) for name, tensor in part(OPTIMIZER).items()}
    trainer.restore(head.position, head.stage, head.steps, optimizer, reference)
    torch.set_rng_state(tensors[RANDOM].clone())


class Peers:
    """Answers `SendState`, `ReceiveState` and `CheckState`; each again when it comes again."""

    def __init__(self, meshes: MeshMembership, send: Callable[[AnyMessage], object], bucket_bytes: int) -> None:
        self._meshes = meshes
        self._send = send
        self._bucket_bytes = bucket_bytes
        self._sent: dict[int, StateSent | None] = {}  # None: on its way
        self._received: StateReceived | None = None
        self._digests: dict[Position, str] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="send-state")

    def send(self, message: SendState, trainer: Trainer) -> None:
        """Stage the trainer's state and send the copy from a thread: `StateSent` follows, or `MeshFailed`."""
        if message.epoch in self._sent:
            sent = self._sent[message.epoch]
            if sent is not None:
                self._send(sent)
            return
        if trainer.position != message.position:
            self._fail(message.epoch, f"asked for the state of {message.position}, but holds {trainer.position}")
            return
        head, tensors = head_of(trainer), tensors_of(trainer)
        manifest = [spec_of(name, tensor) for name, tensor in tensors.items()]
        area = allocate(manifest)
        load_tensors(area.tensors, tensors)
        staged = StagedWeights(area, state_digest(head, area.tensors))
        self._sent = {message.epoch: None}  # an epoch carries one state, and only the last one can be asked for again
        self._worker.submit(self._transfer, message, head, staged)

    def receive(
        self, message: ReceiveState, model: PreTrainedModel, take: Callable[[Head, Area], Trainer]
    ) -> Trainer | None:
        """Have `take` put the state that a peer sends into a trainer of `model`; None, and `MeshFailed`, if none came.

        Blocks for as long as the transfer takes: the next order is a step that needs the state.
        """
        started = time.perf_counter()
        try:
            with self._meshes.using(message.epoch) as mesh:
                try:
                    head = _read(receive_head(mesh, HEAD_LIMIT))
                    if head.position != message.position:
                        raise WeightsError(f"expected the state of {message.position}, got that of {head.position}")
                    arrived = receive_weights(manifest_for(head, model), mesh, self._bucket_bytes)
                except WeightsError as error:
                    raise MeshError(f"the state does not fit: {error}") from error
        except MeshError as error:
            get_logger().warning("no state was received", epoch=message.epoch, why=str(error))
            return None
        trainer = take(head, arrived.area)
        digest = state_digest(head_of(trainer), tensors_of(trainer))
        seconds = time.perf_counter() - started
        self._received = StateReceived(message.epoch, message.position, digest, seconds)
        self._send(self._received)
        return trainer

    def answer_again(self, message: ReceiveState, trainer: Trainer | None) -> bool:
        """Whether this very state was received before, and is held: then that was said again."""
        known = self._received
        if known is None or trainer is None or (known.epoch, known.position) != (message.epoch, message.position):
            return False
        self._send(known)
        return True

    def check(self, message: CheckState, trainer: Trainer) -> None:
        """Tell the digest of the state at a position: the trainer's own, or one that is remembered."""
        digest = self._digests.get(message.position)
        if digest is None:
            if trainer.position != message.position or not trainer.between_batches:
                get_logger().warning("cannot tell the digest of a state that is not held", asked=str(message.position))
                return
            digest = state_digest(head_of(trainer), tensors_of(trainer))
            self._digests[message.position] = digest
            while len(self._digests) > DIGESTS_KEPT:
                del self._digests[next(iter(self._digests))]
        self._send(StateDigest(message.position, digest))

    def close(self) -> None:
        """Start no further transfer; one that is on its way ends with its mesh."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _transfer(self, message: SendState, head: Head, staged: StagedWeights) -> None:
        started = time.perf_counter()
        try:
            with self._meshes.using(message.epoch) as mesh:
                try:
                    scalars = msgspec.msgpack.encode(head)
                    send_head(scalars, mesh)
                    size = len(scalars) + send_weights(staged, mesh, self._bucket_bytes)
                except WeightsError as error:
                    raise MeshError(f"the state was refused: {error}") from error
        except MeshError as error:
            get_logger().warning("the state was not sent", epoch=message.epoch, why=str(error))
            return
        except Exception as error:  # nobody waits for this thread: the controller has to hear of any failure
            self._fail(message.epoch, f"{type(error).__name__}: {error}")
            return
        seconds = time.perf_counter() - started
        sent = StateSent(message.epoch, message.position, staged.digest, size, seconds)
        self._sent[message.epoch] = sent
        self._send(sent)

    def _fail(self, epoch: int, cause: str) -> None:
        """End the mesh for all its members."""
        try:
            with self._meshes.using(epoch):
                raise MeshError(cause)
        except MeshError as error:
            get_logger().warning("the state was not sent", epoch=epoch, why=str(error))


def _read(head: bytes) -> Head:
    try:
        return msgspec.msgpack.decode(head, type=Head)
    except msgspec.MsgspecError as error:
        raise WeightsError(f"expected the scalars of a state, got bytes that are none: {error}") from error
