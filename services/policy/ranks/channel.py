"""The sockets between rank 0 and the other ranks of its replica.

    rank 0  PUSH --orders, payload frames--> PULL  rank n     one pair a member; the member binds and says where
    rank 0  PULL <--------- answers -------- PUSH  rank n     one socket for all; rank 0 binds

Unix sockets in a private folder where all ranks are on one node, TCP under a CURVE key pair of this crew otherwise.
Invariants: orders of one rank arrive in the order in which they were sent, from whichever thread; a queue that is full
is an error and drops nothing. Payload frames are not copied on their way to the socket, hence must not change.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Sequence

import msgspec
import zmq

from services.policy.ranks.orders import AnyAnswer, AnyOrder, Keys, Meet, Numbered, RanksError
from shared.arrays import Frame

WAITING = 64
"""Orders or answers that may wait to be taken; there is one of each at a time, beside those about meshes."""
PATH_BYTES = 107
"""Longest path of a Unix socket, from linux/un.h."""


class CrewChannel:
    """Rank 0's end; `send` is for any thread, `receive` and `answers` for one.

    `interface` is the one by which nodes reach each other; without it all ranks are on this node.
    """

    def __init__(self, interface: str | None = None) -> None:
        self._interface, self._folder = interface, ""
        public = secret = b""
        if interface is None:
            self._folder = tempfile.mkdtemp(prefix="orrery-ranks-")  # for this user alone
            try:
                _check_path(self._folder)
            except RanksError:
                self.hide()
                raise
        else:
            public, secret = zmq.curve_keypair()
        self._keys = Keys(public.decode(), secret.decode())
        self._context = zmq.Context()
        self._lock = threading.Lock()
        self._orders: dict[int, zmq.Socket[bytes]] = {}
        self.answers = _socket(self._context, zmq.PULL)
        self._address = _bind(self.answers, self._place("answers"), self._keys)

    def meet(self, rank: int) -> Meet:
        """What a member is told, so that the two ends meet."""
        return Meet(self._address, self._place(str(rank)), self._keys)

    def _place(self, name: str) -> str:
        return f"ipc://{self._folder}/{name}" if self._interface is None else f"tcp://{self._interface}:*"

    def connect(self, rank: int, orders: str) -> None:
        """A member is there, and takes orders at that address."""
        socket = _socket(self._context, zmq.PUSH)
        _connect(socket, orders, self._keys)
        with self._lock:
            self._orders[rank] = socket

    def send(self, number: int, order: AnyOrder, frames: Sequence[Frame] = ()) -> None:
        """Send an order to all members that are there; RanksError names the one whose queue is full."""
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

    def hide(self) -> None:
        """Let nobody else in: all are connected, or shall not be."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""

    def close(self) -> None:
        """Send nothing more; orders that were not taken are dropped with their members."""
        with self._lock:
            for socket in (self.answers, *self._orders.values()):
                socket.close(linger=0)
        self._context.term()
        self.hide()


class MemberChannel:
    """A member's end; `answer` is for any thread, `receive` for one. `address` is where it takes orders."""

    def __init__(self, meet: Meet, rank: int) -> None:
        self.rank = rank
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._lock = threading.Lock()
        self._orders = _socket(context, zmq.PULL)
        self.address = _bind(self._orders, meet.orders, meet.keys)
        self._answers = _socket(context, zmq.PUSH)
        _connect(self._answers, meet.answers, meet.keys)

    def receive(self) -> tuple[int, AnyOrder, list[memoryview]]:
        """Wait for the next order: its number, itself, its payload frames."""
        first, *frames = (part.buffer for part in self._orders.recv_multipart(copy=False))
        numbered = msgspec.msgpack.decode(first, type=Numbered)
        return numbered.number, numbered.order, frames

    def answer(self, answer: AnyAnswer) -> None:
        """Tell rank 0."""
        with self._lock:
            self._answers.send(msgspec.msgpack.encode(answer), zmq.DONTWAIT)


def _check_path(folder: str) -> None:
    """RanksError if sockets in this folder would have longer paths than the system takes."""
    length = len(os.fsencode(f"{folder}/answers"))
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


def _bind(socket: zmq.Socket[bytes], address: str, keys: Keys) -> str:
    """Take connections at an address; the one that it came to."""
    if keys.secret:
        socket.curve_server = True
        socket.curve_secretkey = keys.secret.encode()
    socket.bind(address)
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")


def _connect(socket: zmq.Socket[bytes], address: str, keys: Keys) -> None:
    if keys.secret:
        # both ends have the same pair: a client that does not know the public one gets no answer
        socket.curve_serverkey = socket.curve_publickey = keys.public.encode()
        socket.curve_secretkey = keys.secret.encode()
    socket.connect(address)
