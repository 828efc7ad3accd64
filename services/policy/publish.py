"""Publishing weights: a staged copy taken at once, sent from a thread of its own. Called by the service.

Invariant: what goes out is the copy, so the next optimizer step neither waits for a transfer nor tears it; the copy of
the last published position stays, so that a late receiver is served while a batch is under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import nn

from shared.mesh import MeshError
from shared.mesh.membership import MeshMembership
from shared.messages import AnyMessage, Position, SendWeights, WeightsFailed, WeightsSent
from shared.weights import StagedWeights, send_weights, stage


class Publisher:
    """Answers `SendWeights`: one transfer after the other, in the order asked for."""

    def __init__(self, meshes: MeshMembership, send: Callable[[AnyMessage], object], bucket_bytes: int) -> None:
        self._meshes = meshes
        self._send = send
        self._bucket_bytes = bucket_bytes
        self._staged: tuple[Position, StagedWeights] | None = None
        self._transfers: dict[tuple[int, Position], WeightsSent | None] = {}  # None: on its way
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")

    def publish(self, message: SendWeights, model: nn.Module, held: Position) -> None:
        """Stage `model`, whose weights are those of `held`, send the copy: `WeightsSent` or `WeightsFailed` follows.

        A repeated command is answered again, and not sent again: its receivers have answered too, or their mesh failed.
        """
        key = (message.epoch, message.position)
        if key in self._transfers:
            sent = self._transfers[key]
            if sent is not None:
                self._send(sent)
            return
        if self._staged is None or self._staged[0] != message.position:
            if message.position != held:
                cause = f"the controller asked for the weights of {message.position}, but this replica holds {held}"
                self._send(WeightsFailed(message.epoch, message.position, cause))
                return
            self._staged = (held, stage(model))
        # only the position published last can be asked for again
        self._transfers = {k: v for k, v in self._transfers.items() if k[1] == message.position or v is None}
        self._transfers[key] = None
        self._worker.submit(self._transfer, message, self._staged[1])

    def close(self) -> None:
        """Start no further transfer; one that is on its way ends with its mesh."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _transfer(self, message: SendWeights, staged: StagedWeights) -> None:
        started = time.perf_counter()
        key = (message.epoch, message.position)
        try:
            with self._meshes.using(message.epoch) as mesh:
                size = send_weights(staged, mesh, self._bucket_bytes)
        except Exception as error:  # nobody waits for this thread: the controller has to hear of any failure
            self._transfers.pop(key, None)
            cause = str(error) if isinstance(error, MeshError) else f"{type(error).__name__}: {error}"
            self._send(WeightsFailed(message.epoch, message.position, cause))
            return
        seconds = time.perf_counter() - started
        sent = WeightsSent(message.epoch, message.position, staged.digest, size, seconds)
        self._transfers[key] = sent
        self._send(sent)
