"""The controller's end of the bus: one ROUTER socket, and a reliable channel for every rank that has a session.

Lives in the controller's own asyncio loop; only its shell calls it. The router decides nothing about the run: who may
register, which incarnation is current and what is durable are the controller's words (`open_session`, `durable`).
Invariants: bytes from the network never raise out of `recv`, a dead or slow peer never raises out of `send`; what is
refused is refused by name to its sender, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import zmq
import zmq.asyncio

from shared.bus import wire
from shared.bus.channel import Arrival, Channel
from shared.bus.errors import BindRefused, BusClosed, WireFault
from shared.bus.person import SENDER as PERSON
from shared.bus.sockets import check_bind, configure_router, max_bytes, send_now
from shared.bus.wire import Frames
from shared.messages import (
    PROTOCOL,
    Ack,
    AnyMessage,
    Envelope,
    Refused,
    Register,
    Registered,
    ReplicaExited,
    SetHyperparameters,
    StatusRequest,
    StopRun,
)
from shared.telemetry import get_logger

if TYPE_CHECKING:
    from shared.config.schema import BusTable

logger = get_logger()

TICKS = 4
"""Looks at the resend clocks in each `resend_s`."""
YIELD_EVERY = 64
"""Messages taken without a pause before other tasks get their turn: a flood must not starve them."""
MOST_KNOCKS = 4096
"""Peers without a session whose latest Register is remembered; strangers must not fill the memory."""
QUESTIONS = StatusRequest | StopRun | SetHyperparameters | ReplicaExited
"""What a person may say without a session."""


@dataclass(frozen=True)
class Incoming:
    """A message for the controller. `session` numbers the session it came in; 0 for `Register` and for persons."""

    peer: bytes
    envelope: Envelope
    frames: Frames
    session: int


@dataclass(frozen=True)
class _Outgoing:
    message: AnyMessage
    frames: Frames
    request: int
    reply_to: int


@dataclass
class _Session:
    number: int
    sender: str
    rank: int
    incarnation: int
    channel: Channel[_Outgoing]
    knock: int
    """The request number of the Register that opened this session."""
    welcome: Registered | None = None
    backlog: deque[_Outgoing] = field(default_factory=deque)


class RouterBus:
    """See the module. `term` is stamped on everything that leaves."""

    def __init__(self, bind: str, *, term: int, settings: BusTable, context: zmq.Context | None = None) -> None:
        """`context` is needed for `inproc://` addresses only."""
        check_bind(bind)
        self.term = term
        self.address = bind
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._max_bytes = max_bytes(settings)
        self._context = context or zmq.Context()
        self._own_context = context is None
        self._sessions: dict[bytes, _Session] = {}
        self._knocks: OrderedDict[bytes, int] = OrderedDict()
        self._over: OrderedDict[bytes, int] = OrderedDict()
        self._requests = itertools.count(1)
        self._numbers = itertools.count(1)
        self._taken = 0
        self._socket: zmq.asyncio.Socket | None = None
        self._resending: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Bind and begin to resend; returns the address to connect to, with the real port. BindRefused if taken."""
        self._socket = zmq.asyncio.Context(self._context).socket(zmq.ROUTER)
        configure_router(self._socket, self._settings)
        try:
            self._socket.bind(self.address)
        except zmq.ZMQError as error:
            await self.close()
            raise BindRefused(
                f"the controller cannot listen on {self.address!r}: {error}; end what uses the address, or set "
                "bus.bind to another one (port * takes a free one)"
            ) from None
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._resending = asyncio.create_task(self._resend_forever())
        return self.address

    async def close(self) -> None:
        """Close the socket at once; what is unacknowledged is forgotten."""
        if self._resending is not None:
            self._resending.cancel()
            await asyncio.gather(self._resending, return_exceptions=True)
        if self._socket is not None:
            with contextlib.suppress(zmq.ZMQError):  # not bound
                self._socket.unbind(self.address)  # closing alone frees the address only some time later
            self._socket.close(linger=0)
        self._sessions.clear()
        if self._own_context:
            self._context.destroy(linger=0)

    # --- sessions ---

    def open_session(self, peer: bytes, sender: str, rank: int, incarnation: int) -> None:
        """Begin a session with a peer whose `Register` the controller takes, before `Registered` is sent.

        Sequences count from 1 both ways; what an earlier session of this peer still had to send is dropped, since its
        commands are derived again from the controller's state. Called again for the same Register, it changes nothing.
        """
        knock = self._knocks.get(peer, 0)
        session = self._sessions.get(peer)
        if session is not None and knock and session.knock == knock and session.incarnation == incarnation:
            return
        if knock and self._over.get(peer) == knock:
            return  # a late repetition: the peer would go on with the old session's numbers
        channel: Channel[_Outgoing] = Channel(window=self._settings.window, resend_s=self._settings.resend_s)
        self._sessions[peer] = _Session(next(self._numbers), sender, rank, incarnation, channel, knock)

    def close_session(self, peer: bytes) -> None:
        """Forget the peer's session and what it had to send; anything more from it is refused "unknown_sender"."""
        session = self._sessions.pop(peer, None)
        if session is not None:
            _remember(self._over, peer, session.knock)

    def unacknowledged(self, peer: bytes) -> int:
        """Reliable messages that this peer has not acknowledged, waiting ones included; 0 without a session."""
        session = self._sessions.get(peer)
        return len(session.channel.unacknowledged()) + len(session.backlog) if session else 0

    def overdue(self, now: float) -> list[bytes]:
        """Peers that do not keep up: a full window without progress for `bus.lost_after_s`, or a whole one waiting.

        `now` is `time.monotonic()`. The controller should treat them as lost: until then their messages are kept.
        """
        late = []
        for peer, session in self._sessions.items():
            since = session.channel.waiting_since
            stuck = session.channel.full and since is not None and now - since > self._settings.lost_after_s
            if stuck or len(session.backlog) > self._settings.window:
                late.append(peer)
        return late

    # --- outgoing ---

    def send(self, peer: bytes, message: AnyMessage, frames: Frames = (), *, reply_to: int = 0) -> None:
        """Send to a peer; a reliable message is kept until acknowledged. Never waits, never raises for the peer's sake.

        A reliable message to a peer without a session is dropped and counted `no_session`. WireFault for what the
        other side would refuse.
        """
        wire.check_outgoing(message, frames, self._max_bytes)
        item = _Outgoing(message, frames, next(self._requests), reply_to)
        session = self._sessions.get(peer)
        if not message.reliable:
            if session is not None and isinstance(message, Registered) and reply_to == session.knock:
                session.welcome = message
            self._transmit(peer, item, 0)
        elif session is None:
            self.counters["no_session"] += 1
            logger.warning("dropped: the peer has no session", message=type(message).__name__, peer=repr(peer))
        else:
            session.backlog.append(item)
            self._fill_window(peer, session)

    def reply(self, incoming: Incoming, message: AnyMessage) -> None:
        """Answer `incoming`."""
        self.send(incoming.peer, message, reply_to=incoming.envelope.request)

    def durable(self, peer: bytes, sequence: int, session: int | None = None) -> None:
        """Acknowledge everything of this peer up to `sequence`: it is on the disk.

        With `session` (`Incoming.session`), nothing happens if that session has ended meanwhile: its numbers mean
        other messages in the next one.
        """
        current = self._sessions.get(peer)
        if current is None or session not in (None, current.number) or sequence > current.channel.received:
            self.counters["stale_durable"] += 1
            return
        current.channel.mark_durable(sequence)
        self._acknowledge(peer, current)

    def _fill_window(self, peer: bytes, session: _Session) -> None:
        while session.backlog and not session.channel.full:
            item = session.backlog.popleft()
            self._transmit(peer, item, session.channel.push(item, time.monotonic()))

    def _acknowledge(self, peer: bytes, session: _Session) -> None:
        ack = Ack(sequence=session.channel.durable)
        self._transmit(peer, _Outgoing(ack, (), request=0, reply_to=0), 0)

    def _transmit(self, peer: bytes, item: _Outgoing, sequence: int) -> None:
        if self._socket is None or self._socket.closed:
            raise BusClosed("the controller's bus is not open: call start() first")
        envelope = Envelope(
            protocol=PROTOCOL,
            term=self.term,
            sender="controller",
            rank=-1,
            incarnation=0,
            sequence=sequence,
            request=item.request,
            reply_to=item.reply_to,
            body=item.message,
        )
        parts = wire.encode(envelope, item.frames, self._max_bytes)
        error = send_now(self._socket, [peer, *parts])
        if error is None:
            return
        if isinstance(error, zmq.Again):
            self.counters["queue_full"] += 1
        elif isinstance(error, zmq.ZMQError) and error.errno == zmq.EHOSTUNREACH:
            self.counters["unreachable"] += 1
        else:
            raise error

    async def _resend_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.resend_s / TICKS)
            now = time.monotonic()
            for peer, session in list(self._sessions.items()):
                for sequence, item in session.channel.due(now):
                    self.counters["resent"] += 1
                    self._transmit(peer, item, sequence)

    # --- incoming ---

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
            parts = await self._socket.recv_multipart(copy=False)
            incoming = self._take(parts[0].bytes, [part.buffer for part in parts[1:]])
            if incoming is not None:
                return incoming

    def _take(self, peer: bytes, parts: list[wire.Frame]) -> Incoming | None:
        session = self._sessions.get(peer)
        try:
            envelope, frames = wire.decode(parts, self._max_bytes)
        except WireFault as fault:
            self._take_fault(peer, session, fault)
            return None
        body = envelope.body
        if isinstance(body, Register):
            return self._take_register(peer, session, envelope)
        if envelope.sender == PERSON and isinstance(body, QUESTIONS):
            return Incoming(peer, envelope, frames, 0)
        refusal = self._refusal(session, envelope)
        if refusal is not None:
            self._refuse(peer, envelope, refusal)
            return None
        assert session is not None  # _refusal has seen to it
        if isinstance(body, Ack):
            session.channel.acknowledge(body.sequence, time.monotonic())
            self._fill_window(peer, session)
            return None
        if body.reliable:
            arrival = session.channel.arrive(envelope.sequence)
            if arrival is not Arrival.NEXT:
                self.counters[arrival.value] += 1
                if arrival is Arrival.DUPLICATE:
                    self._acknowledge(peer, session)
                return None
        return Incoming(peer, envelope, frames, session.number)

    def _take_register(self, peer: bytes, session: _Session | None, envelope: Envelope) -> Incoming | None:
        """Hand a Register up, unless it repeats the one that opened the session: then repeat the welcome.

        The welcome must be the same one: commands of this session count from it, and a fresh look at the leases would
        list some that the peer has yet to be told of.
        """
        if session is not None and session.welcome is not None and session.knock == envelope.request:
            self.counters["duplicate"] += 1
            self.send(peer, session.welcome, reply_to=envelope.request)
            return None
        if session is not None and envelope.request < session.knock:
            self.counters["stale"] += 1
            return None
        if session is None and envelope.request == self._over.get(peer):
            self._refuse(peer, envelope, self._no_session(envelope))
            return None
        _remember(self._knocks, peer, envelope.request)
        return Incoming(peer, envelope, (), 0)

    def _refusal(self, session: _Session | None, envelope: Envelope) -> Refused | None:
        """Why a message cannot be taken, or None if it can."""
        if envelope.term != self.term and envelope.sender != PERSON:
            expected, got = f"term {self.term}", f"term {envelope.term}"
            return Refused(fault="term", expected=expected, got=got, advice="register again")
        if session is None:
            return self._no_session(envelope)
        if (envelope.sender, envelope.rank) != (session.sender, session.rank):
            expected = f"{session.sender} rank {session.rank}, as registered on this connection"
            got = f"{envelope.sender} rank {envelope.rank}"
            return Refused(fault="identity", expected=expected, got=got, advice="use one connection for each rank")
        if envelope.incarnation != session.incarnation:
            expected, got = f"incarnation {session.incarnation}", f"incarnation {envelope.incarnation}"
            return Refused(fault="incarnation", expected=expected, got=got, advice="this process was replaced: end it")
        return None

    def _no_session(self, envelope: Envelope) -> Refused:
        got = f"{type(envelope.body).__name__} from {envelope.sender!r}, which has no session"
        return Refused(fault="unknown_sender", expected="Register first", got=got, advice="register again")

    def _refuse(self, peer: bytes, envelope: Envelope, refusal: Refused) -> None:
        self.counters[refusal.fault] += 1
        if not isinstance(envelope.body, Ack | Refused):  # these ask for no answer, and answering could go on for ever
            self.send(peer, refusal, reply_to=envelope.request)

    def _take_fault(self, peer: bytes, session: _Session | None, fault: WireFault) -> None:
        self.counters[fault.fault] += 1
        count = self.counters[fault.fault]
        if count & (count - 1) == 0:  # ever more rarely: a flood must not fill the disk with log lines
            logger.warning("a message cannot be taken", peer=repr(peer), cause=str(fault), count=count)
        if session is not None and fault.sequence and session.channel.arrive(fault.sequence) is Arrival.NEXT:
            # Stepped over, or it would come again and again and hold up all that follows it.
            session.channel.step_over(fault.sequence)
            self._acknowledge(peer, session)
        if fault.body_type != "refused":
            self.send(peer, fault.as_message(), reply_to=fault.request)


def _remember(table: OrderedDict[bytes, int], peer: bytes, request: int) -> None:
    table[peer] = request
    table.move_to_end(peer)
    if len(table) > MOST_KNOCKS:
        table.popitem(last=False)
