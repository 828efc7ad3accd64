"""One NCCL communicator that never blocks: every call returns at once, its outcome is polled, anyone may abort it.

    begin -> (polled) -> formed -> issue -> (polled) -> on the stream -> (polled) -> done
                                 abort(), from any thread, from any of these -> spent

NCCL has no timeouts of its own, and its abort must meet no other thread inside a call. So the calls are short and
behind one lock; the waits are loops out here that look at the communicator, the clock and the cause of an abort.
Invariants: who aborts takes the handle away first, so that nobody else can use it; a communicator is aborted exactly
once, and never destroyed in the orderly way, which waits for peers that may be gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from shared.nccl.library import IN_PROGRESS, SUCCESS, NcclError

SHORT_S, LONG_S = 20e-6, 1e-3
"""The pause between two looks begins with the one and doubles up to the other."""
ABORT_S = 5.0
"""How long a failed operation waits for the abort to be through, so that its buffers are free again."""


class Calls(Protocol):
    """What a communicator asks of the library (`Library`)."""

    def begin(self, size: int, unique_id: bytes, rank: int) -> tuple[int, int]:
        """Begin to form."""

    def state(self, handle: int) -> int:
        """What has become of the last call."""

    def abort(self, handle: int) -> int:
        """End everything and free it."""

    def explain(self, code: int) -> str:
        """An error in words."""


class Communicator:
    """A rank's end. The constructor forms it; one operation at a time, `abort` at any time."""

    def __init__(
        self,
        calls: Calls,
        size: int,
        unique_id: bytes,
        rank: int,
        timeout_s: float,
        ended: Callable[[], str | None] = lambda: None,
        on_device: Callable[[], None] = lambda: None,
    ) -> None:
        """NcclError if not all `size` ranks came within `timeout_s`, or `ended` tells a cause to give up before.

        `on_device` makes the rank's GPU the current one of a thread; it is called in that which aborts.
        """
        self._calls, self._on_device = calls, on_device
        self._lock = threading.Lock()
        self._cause: str | None = None
        self._gone = threading.Event()
        code, handle = calls.begin(size, unique_id, rank)
        self._handle: int | None = handle or None
        try:
            self._check(code, "the communicator could not be begun")
            self._settle(time.monotonic() + timeout_s, f"waited {timeout_s:g} s for all {size} ranks to come", ended)
        except NcclError as error:
            self.abort(str(error))
            raise

    @property
    def cause(self) -> str | None:
        """Why it is spent; None while it can be used."""
        return self._cause

    def run(
        self, issue: Callable[[int], int], record: Callable[[], None], done: Callable[[], bool], timeout_s: float
    ) -> None:
        """One operation: `issue` gets the handle and returns NCCL's code; `record` then marks the stream, `done` looks.

        NcclError if it fails, is aborted, or takes longer: then the communicator is spent.
        """
        deadline, waited = time.monotonic() + timeout_s, f"waited {timeout_s:g} s"
        try:
            self._check(self._with_handle(issue), "the operation was refused")
            # Until NCCL has put it on the stream, a mark there would be passed too early.
            self._settle(deadline, waited)
            record()
            self._poll(deadline, waited, lambda: self._state() == SUCCESS and done())
        except NcclError as error:
            self.abort(str(error))
            self._gone.wait(ABORT_S)
            raise

    def abort(self, cause: str) -> None:
        """End it, from any thread; returns at once. The first cause stands."""
        with self._lock:
            if self._cause is not None:
                return
            self._cause = cause
            handle, self._handle = self._handle, None
        if handle is None:
            self._gone.set()
        else:
            # NCCL's own abort waits for its threads to end, and whoever revokes a mesh must not wait with it
            threading.Thread(target=self._abort, args=(handle,), name="abort-nccl", daemon=True).start()

    def _abort(self, handle: int) -> None:
        try:
            self._on_device()
            self._calls.abort(handle)
        finally:
            self._gone.set()

    def _with_handle(self, call: Callable[[int], int]) -> int:
        with self._lock:
            if self._handle is None:
                raise NcclError(f"the communicator was aborted: {self._cause}")
            return call(self._handle)

    def _state(self) -> int:
        state = self._with_handle(self._calls.state)
        self._check(state, "NCCL met an error")
        return state

    def _check(self, code: int, what: str) -> None:
        if code not in (SUCCESS, IN_PROGRESS):
            raise NcclError(f"{what}: {self._calls.explain(code)}")

    def _settle(self, deadline: float, waited: str, ended: Callable[[], str | None] = lambda: None) -> None:
        self._poll(deadline, waited, lambda: self._state() == SUCCESS, ended)

    def _poll(
        self,
        deadline: float,
        waited: str,
        over: Callable[[], bool],
        ended: Callable[[], str | None] = lambda: None,
    ) -> None:
        pause = SHORT_S
        while not over():
            cause = ended()
            if cause is not None:
                raise NcclError(cause)
            if time.monotonic() >= deadline:
                raise NcclError(waited)
            time.sleep(pause)
            pause = min(2 * pause, LONG_S)
