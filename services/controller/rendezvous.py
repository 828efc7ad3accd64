"""Rendezvous values of forming meshes: a small key-value store for each epoch, kept in memory only.

A mesh that was forming when the controller died is void, so nothing here needs to survive it.
"""

from __future__ import annotations

from collections.abc import Callable

from shared.messages import Refused, StoreGet, StoreSet, StoreValue

MOST_KEYS = 4096
MOST_BYTES = 1 << 20

Reply = Callable[[StoreValue | Refused], None]


class Rendezvous:
    """Values by epoch, and the questions that wait for them. Times are seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._values: dict[int, dict[str, bytes]] = {}
        self._waiting: dict[tuple[int, str], list[tuple[float, Reply]]] = {}

    def open(self, epoch: int) -> None:
        """A mesh may form."""
        self._values.setdefault(epoch, {})

    def close(self, epoch: int) -> None:
        """It no longer does: its values go, and who still waits is told."""
        self._values.pop(epoch, None)
        for key in [key for key in self._waiting if key[0] == epoch]:
            for _, reply in self._waiting.pop(key):
                reply(_void(epoch))

    def set(self, message: StoreSet, reply: Reply) -> None:
        """Keep a value; answer it, and everyone who waits for it."""
        values = self._values.get(message.epoch)
        if values is None:
            reply(_void(message.epoch))
            return
        full = len(values) >= MOST_KEYS and message.key not in values
        if full or len(message.value) > MOST_BYTES:
            limit = f"at most {MOST_KEYS} values of {MOST_BYTES} bytes for each mesh"
            reply(Refused("too_large", limit, f"{len(message.value)} bytes", "form the mesh anew"))
            return
        values[message.key] = message.value
        answer = StoreValue(message.epoch, message.key, message.value)
        reply(answer)
        for _, waiting in self._waiting.pop((message.epoch, message.key), []):
            waiting(answer)

    def get(self, message: StoreGet, now: float, reply: Reply) -> None:
        """Answer at once when the value is there, else when it comes or the wait runs out."""
        values = self._values.get(message.epoch)
        if values is None:
            reply(_void(message.epoch))
        elif message.key in values:
            reply(StoreValue(message.epoch, message.key, values[message.key]))
        else:
            self._waiting.setdefault((message.epoch, message.key), []).append((now + message.timeout_s, reply))

    def expire(self, now: float) -> None:
        """Answer the questions whose wait has run out."""
        for key, questions in list(self._waiting.items()):
            for until, reply in questions:
                if until <= now:
                    reply(StoreValue(key[0], key[1], None))
            left = [question for question in questions if question[0] > now]
            if left:
                self._waiting[key] = left
            else:
                del self._waiting[key]


def _void(epoch: int) -> Refused:
    return Refused("epoch", "a mesh that is forming", f"epoch {epoch}", "leave this mesh: it was revoked or has formed")
