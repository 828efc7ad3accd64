"""A communicator's life against scripted return codes: forming, operations and aborts, none of which may block.

What a GPU's library does between these codes is tests/gpu's; here a script stands for it, as it has no GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from shared.nccl.communicator import Communicator
from shared.nccl.library import IN_PROGRESS, SUCCESS, NcclError

REMOTE_ERROR = 6
HANDLE = 0x5EED


class Script:
    """Return codes, one after the other; the last one goes on. Every call is noted, with the thread that made it."""

    def __init__(self, *states: int, begun: tuple[int, int] = (IN_PROGRESS, HANDLE)) -> None:
        self.states, self.begun = list(states) or [SUCCESS], begun
        self.calls: list[str] = []
        self.inside = threading.Lock()
        self.aborted = threading.Event()
        self.looked: Callable[[], None] = lambda: None

    def begin(self, size: int, unique_id: bytes, rank: int) -> tuple[int, int]:
        self.calls.append("begin")
        return self.begun

    def state(self, handle: int) -> int:
        assert handle == HANDLE
        assert not self.aborted.is_set(), "a call with a handle that was freed"
        assert self.inside.acquire(blocking=False), "two threads inside NCCL"
        self.inside.release()
        self.calls.append("state")
        code = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        self.looked()
        return code

    def abort(self, handle: int) -> int:
        assert handle == HANDLE
        assert self.inside.acquire(blocking=False), "two threads inside NCCL"
        self.inside.release()
        self.calls.append("abort")
        self.aborted.set()
        return IN_PROGRESS

    def explain(self, code: int) -> str:
        return f"code {code}"


def formed(script: Script) -> Communicator:
    return Communicator(script, 2, b"id", 0, timeout_s=30.0)


def run(
    communicator: Communicator, code: int = SUCCESS, done: Callable[[], bool] = lambda: True, timeout_s: float = 30.0
) -> list[str]:
    steps: list[str] = []

    def issue(handle: int) -> int:
        steps.append(f"issue {handle:x}")
        return code

    communicator.run(issue, lambda: steps.append("record"), done, timeout_s)
    return steps


def test_it_has_formed_once_nccl_says_so() -> None:
    script = Script(IN_PROGRESS, IN_PROGRESS, SUCCESS)
    assert formed(script).cause is None
    assert script.calls == ["begin", "state", "state", "state"]


def test_one_that_cannot_even_begin_says_why_and_has_nothing_to_abort() -> None:
    script = Script(begun=(1, 0))
    with pytest.raises(NcclError, match="could not be begun: code 1"):
        formed(script)
    assert script.calls == ["begin"]


def test_forming_ends_with_a_members_error_its_timeout_or_its_revoke_and_is_aborted() -> None:
    for script, timeout_s, ended, cause in (
        (Script(IN_PROGRESS, REMOTE_ERROR), 30.0, None, "NCCL met an error: code 6"),
        (Script(IN_PROGRESS), 0.0, None, "waited 0 s for all 2 ranks to come"),
        (Script(IN_PROGRESS), 30.0, "revoked", "revoked"),
    ):
        with pytest.raises(NcclError, match=cause):
            Communicator(script, 2, b"id", 0, timeout_s, lambda ended=ended: ended)  # type: ignore[misc]
        assert script.aborted.wait(30), "it was never aborted"
        assert script.calls.count("abort") == 1


def test_a_mark_is_put_on_the_stream_only_when_nccl_has_put_its_work_there() -> None:
    script = Script(SUCCESS)
    communicator = formed(script)
    script.states = [IN_PROGRESS, IN_PROGRESS, SUCCESS]
    waiting: list[int] = []
    script.looked = lambda: waiting.append(len(script.states))
    assert run(communicator, IN_PROGRESS) == [f"issue {HANDLE:x}", "record"]
    assert len(waiting) >= 3


def test_an_operation_waits_for_the_stream() -> None:
    passed = iter([False, False, True])
    assert run(formed(Script(SUCCESS)), done=lambda: next(passed)) == [f"issue {HANDLE:x}", "record"]


@pytest.mark.parametrize(
    ("states", "code", "cause"),
    [
        ([SUCCESS], 5, "the operation was refused: code 5"),
        ([IN_PROGRESS, REMOTE_ERROR], IN_PROGRESS, "NCCL met an error: code 6"),
        ([SUCCESS, REMOTE_ERROR], SUCCESS, "NCCL met an error: code 6"),
    ],
)
def test_an_error_spends_it(states: list[int], code: int, cause: str) -> None:
    script = Script(SUCCESS)
    communicator = formed(script)
    script.states = states
    with pytest.raises(NcclError, match=cause):
        run(communicator, code, done=lambda: False)
    assert script.aborted.is_set(), "who gets the error finds the abort through"
    with pytest.raises(NcclError, match="was aborted: "):
        run(communicator)
    assert script.calls.count("abort") == 1


def test_an_operation_that_hangs_ends_at_its_timeout() -> None:
    script = Script(SUCCESS)
    communicator = formed(script)
    with pytest.raises(NcclError, match="waited 0 s"):
        run(communicator, done=lambda: False, timeout_s=0.0)
    assert script.aborted.is_set()


def test_an_abort_from_another_thread_ends_an_operation_that_hangs() -> None:
    script = Script(SUCCESS)
    communicator = formed(script)
    hangs = threading.Event()
    script.looked = hangs.set

    def revoke() -> None:
        assert hangs.wait(30)
        communicator.abort("policy-1 was lost")
        communicator.abort("a later cause")

    revoking = threading.Thread(target=revoke)
    revoking.start()
    with pytest.raises(NcclError, match="was aborted: policy-1 was lost"):
        run(communicator, done=lambda: False)
    revoking.join()
    assert communicator.cause == "policy-1 was lost"
    assert script.calls.count("abort") == 1


def test_an_abort_returns_though_nccls_own_is_stuck() -> None:
    script = Script(SUCCESS)
    communicator = formed(script)
    goes_on = threading.Event()
    script.abort = lambda handle: goes_on.wait(60) or 0  # type: ignore[method-assign]
    communicator.abort("revoked")
    assert communicator.cause == "revoked"
    goes_on.set()


def test_the_thread_that_aborts_is_on_the_ranks_device_first() -> None:
    script = Script(SUCCESS)
    communicator = Communicator(script, 2, b"id", 0, 30.0, on_device=lambda: script.calls.append("device"))
    communicator.abort("over")
    assert script.aborted.wait(30)
    assert script.calls[-2:] == ["device", "abort"]
