"""The frames between a rewards pool and its workers."""

from __future__ import annotations

import pytest

from services.rollout.reward_wire import MAX_FRAME, Ready, ToPool, Verdict, WireError, Working, frame, split_to_pool

MESSAGES: list[ToPool] = [Ready(100), Working(1, "verifier"), Verdict(1, 0.5, {"verifier": 0.5}, "")]


def test_frames_that_come_in_pieces_are_put_together() -> None:
    buffer, found = bytearray(), []
    for byte in b"".join(frame(message) for message in MESSAGES):
        buffer.append(byte)
        found += split_to_pool(buffer)
    assert found == MESSAGES and not buffer


@pytest.mark.parametrize(
    ("garbage", "said"),
    [
        (b"\xff" * 64, f"at most {MAX_FRAME} bytes, got one of 4294967295"),
        (b"\x00\x00\x00\x02hi", "expected a message of the rewards pool, got b'hi'"),
    ],
    ids=["an-impossible-length", "no-message"],
)
def test_what_came_whole_before_garbage_is_taken(garbage: bytes, said: str) -> None:
    buffer = bytearray(b"".join(frame(message) for message in MESSAGES) + garbage)
    frames = split_to_pool(buffer)
    assert [next(frames) for _ in MESSAGES] == MESSAGES
    with pytest.raises(WireError, match=said):
        next(frames)
