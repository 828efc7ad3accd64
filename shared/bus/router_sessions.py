"""The controller's side of the protocol, without sockets, loops or a clock: a reliable channel for every rank.

Welcomes, refuses, acknowledges, repeats. `RouterBus` adds the socket, the simulator a virtual network. The sessions
decide nothing about the run: who may register, which incarnation is current and what is durable are the controller's
words (`open_session`, `durable`). Invariants: what is heard never raises; what is refused is refused by name to its
sender, and counted; a message of a reliable class is kept until its peer acknowledges it or its session ends.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shared.bus.channel import Arrival, Channel
from shared.bus.errors import WireFault
from shared.bus.person import SENDER as PERSON
from shared.bus.wire import Frames
from shared.messages import (
    PROTOCOL,
    Ack,
    AnyMessage,
    CheckpointRun,
    DrainReplica,
    Envelope,
    EvaluateRun,
    PauseRun,
    Refused,
    Register,
    Registered,
    ReplicaExited,
    ResumeRun,
    ScaleFleet,
    SetHyperparameters,
    StatusRequest,
    StopRun,
    WantedRequest,
)
from shared.telemetry import get_logger

if TYPE_CHECKING:
    from shared.config.schema import BusTable

logger = get_logger()

MOST_KNOCKS = 4096
"""Peers without a session whose latest Register is remembered; strangers must not fill the memory."""
QUESTIONS = (
    StatusRequest | StopRun | SetHyperparameters | ReplicaExited | WantedRequest
    | PauseRun | ResumeRun | CheckpointRun | EvaluateRun | DrainReplica | ScaleFleet
)  # fmt: skip
"""What a person may say without a session."""

Transmit = Callable[[bytes, Envelope, Frames], None]
"""Puts a message on its way to a peer, or drops it: what is reliable is said again."""


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


class RouterSessions:
    """See the module. `term` is stamped on everything that leaves. `clock` counts seconds from any origin."""

    def __init__(self, term: int, settings: BusTable, transmit: Transmit, clock: Callable[[], float]) -> None:
        self.term = term
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._transmit = transmit
        self._clock = clock
        self._sessions: dict[bytes, _Session] = {}
        self._knocks: OrderedDict[bytes, int] = OrderedDict()
        self._over: OrderedDict[bytes, int] = OrderedDict()
        self._requests = itertools.count(1)
        self._numbers = itertools.count(1)

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

        `now` is the clock's. The controller should treat them as lost: until then their messages are kept.
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

        A reliable message to a peer without a session is dropped and counted `no_session`.
        """
        item = _Outgoing(message, frames, next(self._requests), reply_to)
        session = self._sessions.get(peer)
        if not message.reliable:
            if session is not None and isinstance(message, Registered) and reply_to == session.knock:
                session.welcome = message
            self._say(peer, item, 0)
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
            self._say(peer, item, session.channel.push(item, self._clock()))

    def _acknowledge(self, peer: bytes, session: _Session) -> None:
        ack = Ack(sequence=session.channel.durable)
        self._say(peer, _Outgoing(ack, (), request=0, reply_to=0), 0)

    def _say(self, peer: bytes, item: _Outgoing, sequence: int) -> None:
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
        self._transmit(peer, envelope, item.frames)

    def resend(self) -> None:
        """Say again what was not acknowledged for too long. To be called several times in each `resend_s`."""
        now = self._clock()
        for peer, session in list(self._sessions.items()):
            for sequence, item in session.channel.due(now):
                self.counters["resent"] += 1
                self._say(peer, item, sequence)

    # --- incoming ---

    def hear(self, peer: bytes, envelope: Envelope, frames: Frames) -> Incoming | None:
        """Take a decoded message; what the controller has to look at comes back, all else is answered here."""
        session = self._sessions.get(peer)
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
            session.channel.acknowledge(body.sequence, self._clock())
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

    def hear_fault(self, peer: bytes, fault: WireFault) -> None:
        """Take what could not be decoded: answer it by name, and step over it if it was a report."""
        session = self._sessions.get(peer)
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

    def turn_away(self, peer: bytes, refusal: Refused, envelope: Envelope | None) -> None:
        """Refuse a message that its connection's key does not fit; None for one that did not decode."""
        if envelope is not None:
            self._refuse(peer, envelope, refusal)
        else:
            self.counters[refusal.fault] += 1
            self.send(peer, refusal)
        count = self.counters[refusal.fault]
        if count & (count - 1) == 0:
            logger.warning("refused", peer=repr(peer), fault=refusal.fault, got=refusal.got, count=count)

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


def _remember(table: OrderedDict[bytes, int], peer: bytes, request: int) -> None:
    table[peer] = request
    table.move_to_end(peer)
    if len(table) > MOST_KNOCKS:
        table.popitem(last=False)
