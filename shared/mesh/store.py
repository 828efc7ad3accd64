"""Rendezvous over the bus: the key-value store through which the members of a forming mesh find each other.

torch asks this store while it builds a process group; the store asks the controller. Invariant: keys live under the
mesh's unique id, so that values of one attempt never meet those of another.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from time import monotonic

from torch.distributed import Store

from shared.mesh.base import MeshError
from shared.messages import MeshIdentity, Message, StoreGet, StoreSet, StoreValue

Request = Callable[[Message, float], Message]
"""Asks the controller a question, with the seconds to wait for its answer."""

ASK_S = 1.0
"""Seconds that the controller may hold one question: a revoked mesh is noticed after that."""


class BusStore(Store):
    """The part of torch's store interface that process groups need, for one mesh.

    Keep a Python reference to it as long as the process group lives: torch keeps only the C++ half.
    """

    def __init__(self, identity: MeshIdentity, member: str, request: Request, timeout_s: float) -> None:
        super().__init__()
        self._identity = identity
        self._member = member
        self._request = request
        self._timeout_s = timeout_s
        self._deadline = monotonic() + timeout_s
        self._values: dict[str, bytes] = {}
        self.error: Exception | None = None

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # torch passes bytes, its stub says str
        """Publish a value to the other members."""
        self._ask(StoreSet(epoch=self._identity.epoch, key=self._full(key), value=bytes(value)))

    def get(self, key: str) -> bytes:
        """The value of `key`, waiting for it until the mesh's forming times out."""
        while key not in self._values:
            question = StoreGet(
                epoch=self._identity.epoch, key=self._full(key), timeout_s=max(0.0, min(ASK_S, self._remaining_s()))
            )
            value = self._ask(question).value
            if value is not None:
                self._values[key] = value
            elif self._remaining_s() <= 0:
                raise self._failed(self._timed_out(key))
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until every key has a value; the forming's own deadline counts, whatever `timeout` says."""
        for key in keys:
            self.get(key)

    def _ask(self, question: StoreSet | StoreGet) -> StoreValue:
        # an answer that was held until the deadline still has to travel
        patience_s = max(0.0, self._remaining_s()) + ASK_S
        try:
            answer = self._request(question, patience_s)
        except Exception as error:
            raise self._failed(error) from error
        if not isinstance(answer, StoreValue):
            raise self._failed(MeshError(f"expected a StoreValue from the controller, got {type(answer).__name__}"))
        return answer

    def _failed(self, error: Exception) -> Exception:
        # torch passes errors on as text: the first one is kept here
        self.error = self.error or error
        return error

    def _remaining_s(self) -> float:
        return self._deadline - monotonic()

    def _full(self, key: str) -> str:
        return f"{self._identity.unique_id.hex()}/{key}"

    def _timed_out(self, key: str) -> MeshError:
        members = self._identity.members
        last = key.rpartition("/")[2]
        absent = members[int(last)].replica if last.isdigit() and int(last) < len(members) else key
        return MeshError(f"{self._member} waited {self._timeout_s:g} s for {absent} to join; is it alive?")
