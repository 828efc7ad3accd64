"""Publishing weights: a copy that nobody changes, sent to one receiver after the other or to several at once.

Used by every replica: each rank of a policy offers a copy of its part, an engine what it has received. Invariant: what
goes out is the copy, so neither the next optimizer step nor the next swap waits for a transfer or tears it; the copy of
the last position stays, so that a late receiver is served while a batch is under way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from shared.mesh import MeshError
from shared.mesh.membership import MeshMembership
from shared.messages import AnyMessage, Position, SendWeights, WeightsFailed, WeightsSent
from shared.weights.staging import StagedWeights
from shared.weights.transfer import send_weights


class Publisher:
    """Answers `SendWeights`: each transfer runs on a thread of its own, over a mesh of its own. Thread-safe.

    Those over one mesh follow one another: of several sources one may not have ended while another begins the next.
    """

    def __init__(self, meshes: MeshMembership, send: Callable[[AnyMessage], object], bucket_bytes: int) -> None:
        self._meshes = meshes
        self._send = send
        self._bucket_bytes = bucket_bytes
        self._lock = threading.Lock()
        self._offered: tuple[Position, StagedWeights] | None = None
        self._transfers: dict[tuple[int, Position], WeightsSent | None] = {}  # None: on its way
        self._threads: dict[int, threading.Thread] = {}
        self._closed = False

    @property
    def offered(self) -> Position | None:
        """The position whose copy is at hand."""
        return self._offered[0] if self._offered is not None else None

    def offer(self, position: Position, staged: StagedWeights) -> None:
        """Serve this copy from now on; transfers of the one before go on with theirs."""
        with self._lock:
            self._offered = position, staged
            self._threads = {epoch: thread for epoch, thread in self._threads.items() if thread.is_alive()}
            # only the position offered last can be asked for again
            self._transfers = {k: v for k, v in self._transfers.items() if k[1] == position or v is None}

    def publish(self, message: SendWeights) -> None:
        """Send the copy of that position: `WeightsSent` or `WeightsFailed` follows.

        A repeated command is answered again, and not sent again: its receiver has answered too, or their mesh failed.
        """
        key = (message.epoch, message.position)
        with self._lock:
            known, offered = key in self._transfers, self._offered
            sent = self._transfers.get(key)
            mine = not known and not self._closed and offered is not None and offered[0] == message.position
            if mine:
                self._transfers[key] = None
        if sent is not None:
            self._send(sent)
        elif mine and offered is not None:
            before = self._threads.get(message.epoch)
            work = threading.Thread(target=self._transfer, args=(message, offered[1], before), daemon=True)
            self._threads[message.epoch] = work
            work.start()
        elif not known:
            held = offered[0] if offered is not None else "none"
            cause = f"expected to have a copy of the weights of {message.position}, but this replica has {held}"
            self._send(WeightsFailed(message.epoch, message.position, cause))

    def close(self) -> None:
        """Start no further transfer; one that is on its way ends with its mesh."""
        with self._lock:
            self._closed = True

    def _transfer(self, message: SendWeights, staged: StagedWeights, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        started = time.perf_counter()
        key = (message.epoch, message.position)
        try:
            with self._meshes.using(message.epoch) as mesh:
                size = send_weights(staged, mesh, self._bucket_bytes)
        except Exception as error:  # nobody waits for this thread: the controller has to hear of any failure
            with self._lock:
                self._transfers.pop(key, None)
            cause = str(error) if isinstance(error, MeshError) else f"{type(error).__name__}: {error}"
            self._send(WeightsFailed(message.epoch, message.position, cause))
            return
        seconds = time.perf_counter() - started
        sent = WeightsSent(message.epoch, message.position, staged.digest, size, seconds)
        with self._lock:
            self._transfers[key] = sent
        self._send(sent)
