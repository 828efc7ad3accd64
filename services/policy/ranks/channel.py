"""The sockets between rank 0 and the other ranks of its replica: ZeroMQ over Unix sockets in a private folder.

    rank 0  PUSH --orders, payload frames--> PULL  rank n     one pair a member; the member binds
    rank 0  PULL <--------- answers -------- PUSH  rank n     one socket for all; rank 0 binds

Invariants: orders of one rank arrive in the order in which they were sent, from whichever thread; a queue that is full
is an error and drops nothing. Payload frames are not copied on their way to the socket, hence must not change.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import zmq

from services.policy.ranks.orders import AnyAnswer, AnyOrder, Numbered, RanksError
from shared.arrays import Frame

WAITING = 64
"""Orders or answers that may wait to be taken; there is one of each at a time, beside those about meshes."""
PATH_BYTES = 107
"""Longest path of a Unix socket, from linux/un.h."""


class CrewChannel:
    """Rank 0's end; `send` is for any thread, `receive` and `answers` for one."""

    def __init__(self, folder: Path, ranks: Iterable[int]) -> None:
        self._context = zmq.Context()
        self._lock = threading.Lock()
        self.answers = _socket(self._context, zmq.PULL)
        self.answers.bind(_address(folder, "answers"))
        self._orders: dict[int, zmq.Socket[bytes]] = {}
        for rank in ranks:
            # connected, not bound: orders wait in the queue until the member is there
            self._orders[rank] = _socket(self._context, zmq.PUSH)
            self._orders[rank].connect(_address(folder, str(rank)))

    def send(self, number: int, order: AnyOrder, frames: Sequence[Frame] = ()) -> None:
        """Send an order to all members; RanksError names the one whose queue is full."""
        parts = [msgspec.msgpack.encode(Numbered(number, order)), *frames]
        with self._lock:
            for rank, socket in self._orders.items():
                try:
                    socket.send_multipart(parts, zmq.DONTWAIT, copy=False)
                except zmq.Again:
                    name = type(order).__name__
                    raise RanksError(f"rank {rank} takes no order {name}: {WAITING} others wait; it hangs") from None

    def receive(self) -> AnyAnswer | None:
        """The next answer of any rank, None if there is none yet."""
        try:
            raw = self.answers.recv(zmq.DONTWAIT)
        except zmq.Again:
            return None
        return msgspec.msgpack.decode(raw, type=AnyAnswer)

    def close(self) -> None:
        """Send nothing more; orders that were not taken are dropped with their members."""
        with self._lock:
            for socket in (self.answers, *self._orders.values()):
                socket.close(linger=0)
        self._context.term()


class MemberChannel:
    """A member's end; `answer` is for any thread, `receive` for one."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.rank = rank
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._lock = threading.Lock()
        self._orders = _socket(context, zmq.PULL)
        self._orders.bind(_address(folder, str(rank)))
        self._answers = _socket(context, zmq.PUSH)
        self._answers.connect(_address(folder, "answers"))

    def receive(self) -> tuple[int, AnyOrder, list[memoryview]]:
        """Wait for the next order: its number, itself, its payload frames."""
        first, *frames = (part.buffer for part in self._orders.recv_multipart(copy=False))
        numbered = msgspec.msgpack.decode(first, type=Numbered)
        return numbered.number, numbered.order, frames

    def answer(self, answer: AnyAnswer) -> None:
        """Tell rank 0."""
        with self._lock:
            self._answers.send(msgspec.msgpack.encode(answer), zmq.DONTWAIT)


def check_path(folder: Path) -> None:
    """RanksError if sockets in this folder would have longer paths than the system takes."""
    length = len(os.fsencode(folder / "answers"))
    if length > PATH_BYTES:
        raise RanksError(
            f"expected a temporary folder for Unix sockets with paths of at most {PATH_BYTES} bytes, got {length}: "
            f"{folder}; set TMPDIR to a shorter one"
        )


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(WAITING)
    socket.linger = 0
    return socket


def _address(folder: Path, name: str) -> str:
    return f"ipc://{folder}/{name}"
