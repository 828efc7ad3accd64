"""A policy and its peers: the whole state sent to one that joins, received from another, and its digest.

What travels is the head of a state (msgpack, as bytes) and then a staged copy of its tensors in buckets, over a mesh of
two, whatever the layouts of the two replicas: see `state`. Called by the service.

Invariants: what goes out is a copy, sent from a thread, so that the next step neither waits for it nor tears it; a
receiver's digest is of what its trainer holds afterwards, not of what arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec
from torch import Tensor

from services.policy.layouts.compose import Layout
from services.policy.state import Head, head_of, manifest_for, state_digest, tensors_of
from services.policy.trainer import Trainer
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
from shared.weights import StagedWeights, WeightsError, receive_weights, send_weights
from shared.weights.staging import Area
from shared.weights.transfer import receive_head, send_head

HEAD_LIMIT = 1 << 16
"""Most bytes of a head; more is no head."""
DIGESTS_KEPT = 4
"""Positions whose digest is remembered, for a question that comes again after the next steps."""


Copy = Callable[[Trainer], Area]
"""A copy of a replica's state, put together by all its ranks."""


class Peers:
    """Answers `SendState`, `ReceiveState` and `CheckState`; each again when it comes again."""

    def __init__(
        self, meshes: MeshMembership, send: Callable[[AnyMessage], object], bucket_bytes: int, copy: Copy
    ) -> None:
        self._meshes = meshes
        self._copy = copy
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
        head, area = head_of(trainer), self._copy(trainer)
        staged = StagedWeights(area, state_digest(head, area.tensors))
        self._sent = {message.epoch: None}  # an epoch carries one state, and only the last one can be asked for again
        self._worker.submit(self._transfer, message, head, staged)

    def receive(self, message: ReceiveState, layout: Layout, take: Callable[[Head, Area], Trainer]) -> Trainer | None:
        """Have `take` put the state that a peer sends into a trainer of `layout`; None, and `MeshFailed`, if none came.

        Blocks for as long as the transfer takes: the next order is a step that needs the state.
        """
        started = time.perf_counter()
        try:
            with self._meshes.using(message.epoch) as mesh:
                try:
                    head = _read(receive_head(mesh, HEAD_LIMIT))
                    if head.position != message.position:
                        raise WeightsError(f"expected the state of {message.position}, got that of {head.position}")
                    arrived = receive_weights(manifest_for(head, layout), mesh, self._bucket_bytes)
                except WeightsError as error:
                    raise MeshError(f"the state does not fit: {error}") from error
        except MeshError as error:
            get_logger().warning("no state was received", epoch=message.epoch, why=str(error))
            return None
        trainer = take(head, arrived.area)
        digest = state_digest(head_of(trainer), self._whole(trainer))
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
            digest = state_digest(head_of(trainer), self._whole(trainer))
            self._digests[message.position] = digest
            while len(self._digests) > DIGESTS_KEPT:
                del self._digests[next(iter(self._digests))]
        self._send(StateDigest(message.position, digest))

    def _whole(self, trainer: Trainer) -> Mapping[str, Tensor]:
        """The tensors of the replica's state, to be read at once."""
        return tensors_of(trainer) if trainer.layout.whole else self._copy(trainer).tensors

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
