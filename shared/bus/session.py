"""A rank's side of the protocol, without sockets, threads or a clock: what arrives goes in, what to do comes out.

Registers, keeps the reliable channel, notices new terms, repeats questions, says heartbeats. `BusClient` feeds it and
carries out its instructions; nobody else calls it. Invariants: a reliable message that was pushed is sent in every new
session until the controller acknowledges it; nothing of an older term is delivered; a fenced session says nothing more.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from enum import Enum

from shared.bus.channel import Arrival, Channel
from shared.bus.errors import WireFault
from shared.bus.instructions import (
    Answer,
    Deliver,
    Delivery,
    FencedOff,
    Freed,
    Instruction,
    KeyRefused,
    Opened,
    Rejected,
    Transmit,
)
from shared.bus.standing import Passport, Standing
from shared.bus.wire import Frames
from shared.messages import (
    PROTOCOL,
    Ack,
    AnyMessage,
    Envelope,
    GroupReport,
    LeaseRef,
    LeaseReturned,
    Refused,
    Register,
    Registered,
)

NEVER = float("-inf")


class Phase(Enum):
    """Where a session stands. FENCED is final: a process that was replaced never comes back."""

    REGISTERING = "registering"
    OPEN = "open"
    FENCED = "fenced"


@dataclass(frozen=True)
class _Outgoing:
    message: AnyMessage
    frames: Frames
    request: int


@dataclass
class _Question:
    message: AnyMessage
    say_at: float


class ReplicaSession:
    """See the module. All times are seconds of one monotonic clock, passed in as `now`."""

    def __init__(
        self,
        passport: Passport,
        standing: Standing,
        *,
        heartbeat_s: float,
        resend_s: float,
        lost_after_s: float,
        window: int,
    ) -> None:
        self.phase = Phase.REGISTERING
        self.term = 0
        self.incarnation = 0
        self.heard_at = NEVER
        self.counters: Counter[str] = Counter()
        self._passport = passport
        self._standing = standing
        self._heartbeat_s, self._resend_s, self._lost_after_s = heartbeat_s, resend_s, lost_after_s
        self._channel: Channel[_Outgoing] = Channel(window=window, resend_s=resend_s)
        self._requests = itertools.count(1)
        self._register_request = 0
        self._rejected = False
        self._register_at = NEVER
        self._heartbeat_at = NEVER
        self._questions: dict[int, _Question] = {}
        self._opened_before = False

    def stats(self) -> dict[str, int]:
        """Counters by name."""
        channel = self._channel
        return {**self.counters, "repeats": channel.repeats, "gaps": channel.gaps, "resent": channel.resent}

    # --- what the service wants ---

    def register(self, now: float) -> list[Instruction]:
        """Begin a new session: say `Register` until it is answered, but not more often than every `resend_s`."""
        self.phase = Phase.REGISTERING
        self._register_request = next(self._requests)
        self._rejected = False
        self.counters["registrations"] += 1
        return [self._say_register(now)] if now >= self._register_at + self._resend_s else []

    def not_sent(self, envelope: Envelope) -> None:
        """The socket had no room or no connection. What is reliable is repeated anyway; `Register` should not wait."""
        self.counters["unsent"] += 1
        if isinstance(envelope.body, Register):
            self._register_at = NEVER

    def push(self, message: AnyMessage, frames: Frames, now: float) -> list[Instruction]:
        """Send `message`; a reliable one is kept until acknowledged (WindowFull if there are too many of those)."""
        if message.reliable:
            item = _Outgoing(message, frames, next(self._requests))
            sequence = self._channel.push(item, now)
            return [self._say(item, sequence)] if self.phase is Phase.OPEN else []
        if self.phase is Phase.OPEN:
            return [self._say(_Outgoing(message, frames, next(self._requests)))]
        self.counters["unsent"] += 1
        return []

    def ask(self, message: AnyMessage, now: float) -> tuple[int, list[Instruction]]:
        """Ask a transient question until its `Answer` comes or it is withdrawn; returns its number."""
        request = next(self._requests)
        self._questions[request] = _Question(message, now)
        return request, self._say_questions(now)

    def withdraw(self, request: int) -> None:
        """Nobody waits for this answer any more."""
        self._questions.pop(request, None)

    def fence(self, refused: Refused) -> list[Instruction]:
        """Say nothing more: `refused` is final for this process."""
        self.phase = Phase.FENCED
        return [FencedOff(refused)]

    # --- what time brings ---

    def tick(self, now: float) -> list[Instruction]:
        """Repeat what is due. To be called several times in each `resend_s` and `heartbeat_s`."""
        if self.phase is Phase.FENCED:
            return []
        if self.phase is Phase.REGISTERING:
            every_s = self._lost_after_s if self._rejected else self._resend_s
            return [self._say_register(now)] if now >= self._register_at + every_s else []
        said: list[Instruction] = [self._say(item, sequence) for sequence, item in self._channel.due(now)]
        said += self._say_questions(now)
        if now >= self._heartbeat_at + self._heartbeat_s:
            self._heartbeat_at = now
            said.append(self._say(_Outgoing(self._standing.heartbeat(), (), next(self._requests))))
        return said

    # --- what the controller says ---

    def hear(self, envelope: Envelope, frames: Frames, now: float, *, room: bool) -> list[Instruction]:
        """Take a decoded message. `room` says whether the inbox can take one more command."""
        self.heard_at = now
        if self.phase is Phase.FENCED:
            return []
        if envelope.term < self.term:
            self.counters["stale_term"] += 1
            return []
        done: list[Instruction] = []
        if envelope.term > self.term:
            self.term = envelope.term
            if self.phase is Phase.OPEN:
                done += self.register(now)
        body = envelope.body
        match body:
            case Registered():
                done += self._open(body, envelope.reply_to, now)
            case Refused():
                done += self._take_refusal(body, envelope.reply_to, now, room)
            case Ack():
                freed = self._channel.acknowledge(body.sequence, now) if self.phase is Phase.OPEN else 0
                if freed:
                    done.append(Freed(freed))
            case _ if body.reliable:
                done += self._take_command(envelope, frames, room)
            case _ if envelope.reply_to in self._questions:
                del self._questions[envelope.reply_to]
                done.append(Answer(envelope.reply_to, body))
        return done

    def hear_fault(self, fault: WireFault, now: float) -> list[Instruction]:
        """Take what could not be decoded: answer it by name, and step over it if it was a command."""
        self.heard_at = now
        self.counters[fault.fault] += 1
        if self.phase is Phase.FENCED:
            return []
        if fault.fault == "protocol":  # another version has taken the controller's place
            again = self.register(now) if self.phase is Phase.OPEN else []
            return again + self._reject(fault.as_message())
        if self.phase is not Phase.OPEN or not fault.sequence:
            return []
        if self._channel.arrive(fault.sequence) is Arrival.NEXT:
            self._channel.step_over(fault.sequence)
        answer = self._envelope(fault.as_message(), reply_to=fault.request)
        return [Transmit(answer), self._say_ack()]

    def _open(self, registered: Registered, reply_to: int, now: float) -> list[Instruction]:
        if self.phase is not Phase.REGISTERING or reply_to != self._register_request:
            self.counters["duplicate_registered"] += 1
            return []
        self.phase = Phase.OPEN
        self.incarnation = registered.incarnation
        self._heartbeat_at = NEVER
        done: list[Instruction] = [Opened(registered, first=not self._opened_before)]
        self._opened_before = True
        for item in self._channel.reset():
            # A number of its own in this session: refusals of the old one must not be taken for an answer to it.
            done += self.push(item.message, item.frames, now)
        for question in self._questions.values():
            question.say_at = now
        return done + self.tick(now)

    def _take_command(self, envelope: Envelope, frames: Frames, room: bool) -> list[Instruction]:
        if self.phase is not Phase.OPEN:
            self.counters["early"] += 1  # of the session that ended, or of the one whose welcome is still on its way
            return []
        if not room and envelope.sequence > self._channel.received:
            self.counters["pushed_back"] += 1
            return []
        arrival = self._channel.arrive(envelope.sequence)
        if arrival is Arrival.GAP:
            return []
        if arrival is Arrival.DUPLICATE:
            return [self._say_ack()]
        self._channel.mark_durable(envelope.sequence)
        return [Deliver(Delivery(envelope.body, frames)), self._say_ack()]

    def _take_refusal(self, refused: Refused, reply_to: int, now: float, room: bool) -> list[Instruction]:
        self.counters["refused_" + refused.fault] += 1
        if reply_to and reply_to < self._register_request and reply_to not in self._questions:
            return []  # it answers something said before this registration: that session is over anyway
        if refused.fault == "incarnation":
            return self.fence(refused)
        if refused.fault == "key":
            return [KeyRefused(refused)]
        if refused.fault in ("term", "unknown_sender"):
            # Of this very Register: its session began and ended, and the welcome was lost. The number is used up.
            over = reply_to == self._register_request
            return self.register(now) if self.phase is Phase.OPEN or over else []
        if self.phase is Phase.REGISTERING and reply_to == self._register_request:
            return self._reject(refused)
        if reply_to in self._questions:
            del self._questions[reply_to]
            return [Answer(reply_to, refused)]
        if not room:
            self.counters["pushed_back"] += 1
            return []
        return [Deliver(Delivery(refused))]

    def _reject(self, refused: Refused) -> list[Instruction]:
        """Say it once in a registration, then go on asking, but slowly: a person has to mend it."""
        if self._rejected:
            return []
        self._rejected = True
        return [Rejected(refused)]

    # --- what goes out ---

    def _say_register(self, now: float) -> Instruction:
        self._register_at = now
        position, leases = self._standing.held()
        # A lease whose report is still on its way is held too: the report will be sent again in the new session.
        for item in self._channel.unacknowledged():
            if isinstance(item.message, GroupReport | LeaseReturned):
                ref = LeaseRef(group=item.message.group, attempt=item.message.attempt)
                leases[ref.group, ref.attempt] = ref
        me = self._passport
        register = Register(
            role=me.role,
            replica=me.replica,
            rank=me.rank,
            world=me.world,
            nonce=me.nonce,
            pid=me.pid,
            host=me.host,
            holds=position,
            leases=[leases[key] for key in sorted(leases)],
            datasets=list(me.datasets),
        )
        return Transmit(self._envelope(register, request=self._register_request))

    def _say_questions(self, now: float) -> list[Instruction]:
        if self.phase is not Phase.OPEN:
            return []
        said: list[Instruction] = []
        for request, question in self._questions.items():
            if now >= question.say_at:
                question.say_at = now + self._resend_s
                said.append(Transmit(self._envelope(question.message, request=request)))
        return said

    def _say_ack(self) -> Instruction:
        return Transmit(self._envelope(Ack(sequence=self._channel.durable)))

    def _say(self, item: _Outgoing, sequence: int = 0) -> Instruction:
        return Transmit(self._envelope(item.message, sequence=sequence, request=item.request), item.frames)

    def _envelope(self, body: AnyMessage, *, sequence: int = 0, request: int = 0, reply_to: int = 0) -> Envelope:
        return Envelope(
            protocol=PROTOCOL,
            term=self.term,
            sender=self._passport.replica,
            rank=self._passport.rank,
            incarnation=self.incarnation,
            sequence=sequence,
            request=request,
            reply_to=reply_to,
            body=body,
        )
