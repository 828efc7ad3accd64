"""Receives weights beside the generation loop: transfers run on a thread, into staged memory, in the order asked for.

Owned by the loop of an `EngineService`, which takes what has arrived between two decode steps. Invariant: nothing here
touches the model; a transfer that failed leaves the weights in use as they are.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shared.mesh import MeshError
from shared.mesh.membership import MeshMembership
from shared.messages import ReceiveWeights
from shared.weights import StagedWeights, TensorSpec, receive_weights


@dataclass(frozen=True, slots=True)
class Arrived:
    """The outcome of one `ReceiveWeights`: what was `staged`, or the `cause` why nothing was."""

    message: ReceiveWeights
    staged: StagedWeights | None
    cause: str
    seconds: float


class WeightsReceiver:
    """Takes weights from rank 0 of formed meshes, one after the other; `manifest` is the receiving model's own."""

    def __init__(self, meshes: MeshMembership, manifest: Sequence[TensorSpec], bucket_bytes: int) -> None:
        self._meshes = meshes
        self._manifest = manifest
        self._bucket_bytes = bucket_bytes
        self._arrived: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        self._asked: set[tuple[int, int, int]] = set()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="receive-weights")

    @property
    def busy(self) -> bool:
        """Whether a transfer is under way, or its outcome has not been taken."""
        return bool(self._asked)

    def receive(self, message: ReceiveWeights) -> None:
        """Begin the transfer; asking again for one that is under way changes nothing."""
        key = _key(message)
        if key not in self._asked:
            self._asked.add(key)
            self._worker.submit(self._transfer, message)

    def take(self) -> Arrived | None:
        """The next outcome, if there is one."""
        try:
            arrived = self._arrived.get_nowait()
        except queue.Empty:
            return None
        self._asked.discard(_key(arrived.message))
        return arrived

    def close(self) -> None:
        """Begin no further transfer; one that is under way ends with its mesh."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _transfer(self, message: ReceiveWeights) -> None:
        started = time.perf_counter()
        staged, cause = None, ""
        try:
            with self._meshes.using(message.epoch) as mesh:
                staged = receive_weights(self._manifest, mesh, self._bucket_bytes)
        except MeshError as error:
            cause = str(error)
        except Exception as error:  # nobody waits for this thread: the controller has to hear of any failure
            cause = f"{type(error).__name__}: {error}"
        self._arrived.put(Arrived(message, staged, cause, time.perf_counter() - started))


def _key(message: ReceiveWeights) -> tuple[int, int, int]:
    return message.epoch, message.position.lineage, message.position.version
