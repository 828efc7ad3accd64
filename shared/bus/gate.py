"""The gate of the controller's bus: whose key is on the list, and whether a message fits the key it came with.

Lives in the controller's loop. ZeroMQ asks it about every connection whose CURVE handshake is sound (ZAP, RFC 27); from
then on each message carries the public key, and `refusal` compares the name that it claims with the key's. The list is
read again when its file has changed, so that a key that was taken off it is refused within moments, on connections that
stand too. Invariants: without an answer from here nobody gets in; what is refused is counted, by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from pathlib import Path

import zmq
from zmq.utils import z85

from shared.bus.doorstep import Doorstep
from shared.bus.errors import KeysRefused
from shared.bus.keys import ControllerKeys, read_allowed, role_of, speaks_for
from shared.messages import Envelope, Refused, Register
from shared.telemetry import get_logger

logger = get_logger()

DOMAIN = "orrery"
ZAP_ADDRESS = "inproc://zeromq.zap.01"
USER_ID = "User-Id"
"""The property of a message that has the public key, as the gate told it to ZeroMQ."""


class AllowedKeys:
    """The controller's list, and what a key on it may say. No sockets."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _version(path)
        self._names = read_allowed(path)

    def look(self) -> None:
        """Read the list again if it has changed; one that cannot be used leaves the old one in force."""
        seen = _version(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            names = read_allowed(self._path)
        except KeysRefused as error:
            logger.error("the list of keys cannot be used: the one before stays in force", why=str(error))
            return
        added, removed = names.items() - self._names.items(), self._names.items() - names.items()
        self._names = names
        logger.info(
            "the list of keys has changed",
            added=sorted(name for _, name in added),
            removed=sorted(name for _, name in removed),
        )

    def name_of(self, public: str) -> str | None:
        """Whose key this is; None if it is not on the list."""
        return self._names.get(public)

    def refusal(self, public: str, peer: bytes, envelope: Envelope | None) -> Refused | None:
        """Why a message that came with this key over connection `peer` is refused; None if it is not.

        `envelope` is None for one that did not decode: its connection alone is looked at.
        """
        name = self._names.get(public)
        if name is None:
            advice = "ask for a key ('orrery keys add'), and start this process again"
            return Refused("key", "a key on the controller's list", "one that was taken off it", advice)
        claims = [peer.partition(b"/")[0].decode(errors="replace")]
        if envelope is not None:
            claims.append(envelope.sender)
            if isinstance(envelope.body, Register):
                claims.append(envelope.body.replica)
        for claimed in claims:
            if claimed != claims[0] or not speaks_for(name, claimed):
                return _impostor(name, claimed)
        if envelope is not None and isinstance(envelope.body, Register) and envelope.body.role != role_of(name):
            return _impostor(name, f"{envelope.body.replica} as {envelope.body.role}")
        return None


class Gate(AllowedKeys):
    """The list, with the sockets through which ZeroMQ asks about it."""

    def __init__(self, keys: ControllerKeys, counters: Counter[str]) -> None:
        super().__init__(keys.allowed)
        self._keys = keys
        self._counters = counters
        self._zap: zmq.Socket[bytes] | None = None

    def open(self, context: zmq.Context, socket: zmq.Socket[bytes]) -> None:
        """Stand before a socket that is about to be bound; to be called in the loop."""
        self._keys.configure(socket)
        socket.set_string(zmq.ZAP_DOMAIN, DOMAIN)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody to ask, nobody let in
        self._zap = context.socket(zmq.REP)
        self._zap.set(zmq.LINGER, 0)
        self._zap.bind(ZAP_ADDRESS)
        asyncio.get_running_loop().add_reader(self._zap.FD, self._answer)
        self._answer()  # the descriptor tells of news only once everything before was taken, "nothing" included

    def close(self) -> None:
        """Let nobody in any more."""
        if self._zap is not None:
            asyncio.get_running_loop().remove_reader(self._zap.FD)
            self._zap.close(linger=0)
            self._zap = None

    def _answer(self) -> None:
        """Answer all that ZeroMQ asks."""
        assert self._zap is not None
        while True:
            try:
                version, request, domain, address, _, mechanism, *credentials = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.look()  # a key that was just made must not be turned away
            public = ""
            if (version, domain, mechanism) == (b"1.0", DOMAIN.encode(), b"CURVE") and len(credentials) == 1:
                with contextlib.suppress(ValueError):
                    public = z85.encode(credentials[0]).decode()
            name = self.name_of(public)
            if name is None:
                self._counters["key"] += 1
                _warn_of_stranger(self._counters["key"], address.decode(errors="replace"), public)
                verdict = (b"400", b"this key is not on the controller's list", b"")
            else:
                verdict = (b"200", b"OK", public.encode())
            self._zap.send_multipart([b"1.0", request, *verdict, b""])


class Handshakes:
    """Counts the connections that did not get as far as the gate: without keys, or not speaking ZeroMQ at all."""

    def __init__(self, context: zmq.Context, socket: zmq.Socket[bytes], counters: Counter[str]) -> None:
        self._counters = counters
        self._doorstep = Doorstep(context, socket)
        asyncio.get_running_loop().add_reader(self._doorstep.events.FD, self._count)
        self._count()  # as above

    def close(self) -> None:
        """Before the socket is closed."""
        asyncio.get_running_loop().remove_reader(self._doorstep.events.FD)
        self._doorstep.close()

    def _count(self) -> None:
        for failure in self._doorstep.failures():
            if failure.of_key:
                continue  # the gate has counted it
            self._counters["handshake"] += 1
            count = self._counters["handshake"]
            if count & (count - 1) == 0:
                logger.warning("a connection did not get through the handshake", cause=failure.text, count=count)


def public_key(frame: zmq.Frame) -> str:
    """The public key that a message came with; "" if it came without."""
    try:
        key = frame.get(USER_ID)
    except zmq.ZMQError:
        return ""
    return key if isinstance(key, str) else ""


def _impostor(name: str, claimed: str) -> Refused:
    expected = f"{name}, whose key this connection has" if role_of(name) != name else f"a {name}, as its key says"
    return Refused("identity", expected, claimed[:200], f"give it a key of its own: 'orrery keys add {claimed[:40]}'")


def _warn_of_stranger(count: int, address: str, public: str) -> None:
    if count & (count - 1) == 0:  # ever more rarely: a flood must not fill the disk with log lines
        logger.warning("a key that is not on the list was turned away", address=address, key=public, count=count)


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_mtime_ns, about.st_ino, about.st_size
