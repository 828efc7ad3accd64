"""The controller's end of the bus: one ROUTER socket under the sessions of `RouterSessions`.

Lives in the controller's own asyncio loop; only its shell calls it. Invariants: bytes from the network never raise out
of `recv`, a dead or slow peer never raises out of `send`; with keys, nothing is heard of who has none on the list, or
claims to be somebody else than the key's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import zmq

from shared.bus import wire
from shared.bus.errors import BindRefused, BusClosed, WireFault
from shared.bus.gate import Gate, Handshakes, public_key
from shared.bus.keys import controller_keys, keys_place
from shared.bus.router_sessions import Incoming, RouterSessions
from shared.bus.sockets import as_frames, check_bind, configure_router, max_bytes
from shared.bus.wire import Frames
from shared.messages import AnyMessage, Envelope

if TYPE_CHECKING:
    from shared.config.schema import BusTable

TICKS = 4
"""Looks at the resend clocks in each `resend_s`."""
YIELD_EVERY = 64
"""Messages taken without a pause before other tasks get their turn: a flood must not starve them."""


class RouterBus(RouterSessions):
    """See the module."""

    def __init__(self, bind: str, *, term: int, settings: BusTable, context: zmq.Context | None = None) -> None:
        """`context` is needed for `inproc://` addresses only. BindRefused, or KeysRefused for keys of no use."""
        super().__init__(term, settings, self._put, time.monotonic)
        place = keys_place(settings.keys)
        check_bind(bind, keys=place is not None)
        self.address = bind
        self._gate = Gate(controller_keys(place), self.counters) if place is not None else None
        self._handshakes: Handshakes | None = None
        self._max_bytes = max_bytes(settings)
        self._context = context or zmq.Context()
        self._own_context = context is None
        self._taken = 0
        self._socket: zmq.Socket[bytes] | None = None
        self._stirred = asyncio.Event()
        self._resending: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Bind and begin to resend; returns the address to connect to, with the real port. BindRefused if taken."""
        self._socket = self._context.socket(zmq.ROUTER)
        configure_router(self._socket, self._settings)
        if self._gate is not None:
            self._gate.open(self._context, self._socket)
        self._handshakes = Handshakes(self._context, self._socket, self.counters)
        try:
            self._socket.bind(self.address)
        except zmq.ZMQError as error:
            await self.close()
            raise BindRefused(
                f"the controller cannot listen on {self.address!r}: {error}; end what uses the address, or set "
                "bus.bind to another one (port * takes a free one)"
            ) from None
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        asyncio.get_running_loop().add_reader(self._socket.FD, self._stirred.set)
        self._resending = asyncio.create_task(self._resend_forever())
        return self.address

    async def close(self) -> None:
        """Close the socket at once; what is unacknowledged is forgotten."""
        if self._resending is not None and self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.FD)
            self._resending.cancel()
            await asyncio.gather(self._resending, return_exceptions=True)
        if self._handshakes is not None:
            self._handshakes.close()
        if self._gate is not None:
            self._gate.close()
        if self._socket is not None:
            with contextlib.suppress(zmq.ZMQError):  # not bound
                self._socket.unbind(self.address)  # closing alone frees the address only some time later
            self._socket.close(linger=0)
        self._sessions.clear()
        if self._own_context:
            self._context.destroy(linger=0)

    def send(self, peer: bytes, message: AnyMessage, frames: Frames = (), *, reply_to: int = 0) -> None:
        """As `RouterSessions.send`; WireFault for what the other side would refuse."""
        wire.check_outgoing(message, frames, self._max_bytes)
        super().send(peer, message, frames, reply_to=reply_to)

    async def recv(self) -> Incoming:
        """The next message that the controller has to look at: decoded, in order, of a known session (or a Register,
        or a person's). Everything else is answered here."""
        if self._socket is None or self._resending is None:
            raise BusClosed("the controller's bus is not open: call start() first")
        while True:
            if self._resending.done():
                self._resending.result()
            self._taken += 1
            if self._taken % YIELD_EVERY == 0:
                await asyncio.sleep(0)
            parts = await self._receive(self._socket)
            peer = parts[0].bytes
            try:
                envelope, frames = wire.decode([part.buffer for part in parts[1:]], self._max_bytes)
            except WireFault as fault:
                if not self._is_impostor(parts, peer, None):
                    self.hear_fault(peer, fault)
                continue
            if self._is_impostor(parts, peer, envelope):
                continue
            incoming = self.hear(peer, envelope, frames)
            if incoming is not None:
                return incoming

    def _is_impostor(self, parts: Sequence[zmq.Frame], peer: bytes, envelope: Envelope | None) -> bool:
        """Whether a message claims to be of somebody whom its connection's key does not stand for; it is refused."""
        if self._gate is None:
            return False
        refusal = self._gate.refusal(public_key(parts[0]), peer, envelope)
        if refusal is not None:
            self.turn_away(peer, refusal, envelope)
        return refusal is not None

    async def _receive(self, socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
        """The next message. Not through zmq.asyncio, whose futures cost several times what a message does here."""
        while True:
            self._stirred.clear()
            try:
                return socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                await self._stirred.wait()

    def _put(self, peer: bytes, envelope: Envelope, frames: Frames) -> None:
        if self._socket is None or self._socket.closed:
            raise BusClosed("the controller's bus is not open: call start() first")
        parts = [peer, *wire.encode(envelope, frames, self._max_bytes)]
        try:
            self._socket.send_multipart(as_frames(parts), zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self.counters["queue_full"] += 1
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counters["unreachable"] += 1
        self._stirred.set()  # sending swallows the signal of what came in meanwhile

    async def _resend_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.resend_s / TICKS)
            self.resend()
            if self._gate is not None:
                self._gate.look()
