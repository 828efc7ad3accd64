"""A rank's end of the bus: a thread of its own, so that a busy GPU or interpreter never looks dead.

Services call `BusClient` from any thread. The bus thread runs an asyncio loop on uvloop with one DEALER socket, feeds
`ReplicaSession` with what arrives and with time, and carries out its instructions. Invariants: only the bus thread
touches socket and session; whatever ends the bus thread is raised in every call that would wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket as network
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import uvloop
import zmq
import zmq.asyncio

from shared.bus import wire
from shared.bus.address import resolve
from shared.bus.doorstep import Doorstep
from shared.bus.errors import BusClosed, BusError, BusTimeout, Fenced, KeysRefused, Refusal, WireFault
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
from shared.bus.keys import ClientKeys, client_keys, keys_place
from shared.bus.pulse import Pulse
from shared.bus.session import Phase, ReplicaSession
from shared.bus.sockets import configure_dealer, max_bytes, send_now
from shared.bus.standing import Passport, Standing
from shared.bus.wire import Frames
from shared.messages import (
    AnyMessage,
    DatasetIdentity,
    Envelope,
    Goodbye,
    LeaseRef,
    Position,
    Refused,
    Registered,
    Role,
)
from shared.telemetry import get_logger

if TYPE_CHECKING:
    from shared.config.schema import BusTable

logger = get_logger()

MOVED_S = 1.0
"""How often a client whose address is a file looks whether the controller has moved."""
TICKS = 4
"""The bus thread looks at its clocks so many times in the shorter of `heartbeat_s` and `resend_s`."""


class BusClient:
    """One rank's connection to the controller, for the life of the process. All methods are thread-safe.

    Reliable messages are delivered in order, exactly once a session; in a new session (the controller restarted, or
    thought this rank lost) the `Registered` comes through `receive`, and what was not acknowledged is sent again.
    """

    def __init__(
        self,
        address: str,
        *,
        role: Role,
        replica: str,
        rank: int = 0,
        world: int = 1,
        settings: BusTable,
        datasets: Sequence[DatasetIdentity] = (),
        nonce: int | None = None,
        context: zmq.Context | None = None,
    ) -> None:
        """`address` may be a file that tells it (`shared.bus.address`): then the controller may move.

        `nonce` is that of the replica's start, which its ranks share; rank 0, or whoever starts them all, draws it.

        `context` is needed for `inproc://` addresses, which join sockets of one context only. KeysRefused for a key
        that cannot be used.
        """
        if address.startswith("inproc://") and context is None:
            raise ValueError(f"{address!r} wants the zmq.Context that the controller's socket lives in: pass `context`")
        self.address, self.settings = address, settings
        self._who = f"{replica} rank {rank}"
        self._max_bytes = max_bytes(settings)
        nonce = secrets.randbits(63) if nonce is None else nonce
        self.passport = Passport(role, replica, rank, world, nonce, os.getpid(), network.gethostname(), tuple(datasets))
        self._identity = f"{replica}/{rank}/{nonce:x}".encode()
        self._keys_place = keys_place(settings.keys)
        self._keys = client_keys(self._keys_place, replica) if self._keys_place is not None else None
        self._turned_away = ""
        self._renewed = False
        self._standing = Standing()
        self._session = ReplicaSession(
            self.passport,
            self._standing,
            heartbeat_s=settings.heartbeat_s,
            resend_s=settings.resend_s,
            lost_after_s=settings.lost_after_s,
            window=settings.window,
        )
        self._pulse = Pulse.of_environment(settings.heartbeat_s) if rank == 0 else Pulse(None, 0.0)
        self._context = context or zmq.Context()
        self._own_context = context is None
        self._changed = threading.Condition()
        self._inbox: deque[Delivery] = deque()
        self._in_flight = 0
        self._welcome: Registered | None = None
        self._end: BusError | None = None
        self._answers: dict[int, Future[AnyMessage]] = {}
        self._thread: threading.Thread | None = None

    # --- for the service ---

    @property
    def term(self) -> int:
        """The newest term heard of; 0 before the first."""
        return self._session.term

    @property
    def incarnation(self) -> int:
        """What the controller calls this process; 0 before the first `Registered`."""
        return self._session.incarnation

    def start(self, timeout_s: float) -> Registered:
        """Start the bus thread and register. BusTimeout if nobody answers, Refusal or Fenced if refused."""
        if self._thread is not None:
            raise BusClosed(f"{self._who}: a BusClient starts once; make a new one")
        self._loop = uvloop.new_event_loop()
        self._main = self._loop.create_task(self._live())
        self._thread = threading.Thread(target=self._run_loop, name=f"bus {self._who}", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._welcome is not None or self._end is not None, timeout_s)
            welcome, end = self._welcome, self._end
        if welcome is None:
            self.close()
            why = self._turned_away or "got nothing; check that the controller runs and that the address is right"
            raise end or BusTimeout(
                f"{self._who} waited {timeout_s:g} s for the controller at {self.address} to answer Register: "
                f"expected Registered, {why}"
            )
        return welcome

    def hold(self, position: Position | None) -> None:
        """What `Register` says that this process holds."""
        self._standing.hold(position)

    def take_lease(self, ref: LeaseRef) -> None:
        """`Register` will list this lease as held. One whose report is not acknowledged yet is listed anyway."""
        self._standing.take_lease(ref)

    def drop_lease(self, ref: LeaseRef) -> None:
        """`Register` will no longer list this lease."""
        self._standing.drop_lease(ref)

    def progress(self, state: str, count: int) -> None:
        """What heartbeats say: the state in a word, and a counter of work done."""
        self._standing.progress(state, count)

    def send(self, message: AnyMessage, frames: Frames = (), timeout_s: float | None = None) -> None:
        """Send `message` with its payload `frames` (which must not change any more).

        A reliable message is kept and resent until acknowledged; while a whole window (`bus.window`) is unacknowledged
        this blocks, at most `timeout_s` (default `bus.lost_after_s`), then raises BusTimeout. A transient message is
        sent once, if there is a session. WireFault for what the other side would refuse; Fenced.
        """
        wire.check_outgoing(message, frames, self._max_bytes)
        limit_s = self.settings.lost_after_s if timeout_s is None else timeout_s
        with self._changed:
            self.raise_if_ended()
            if message.reliable:
                window = self.settings.window
                if not self._changed.wait_for(lambda: self._in_flight < window or self._end is not None, limit_s):
                    raise BusTimeout(
                        f"{self._who} waited {limit_s:g} s to send {type(message).__name__}: {window} messages "
                        f"(bus.window) are not acknowledged by the controller at {self.address}; check that it runs "
                        "and that its disk keeps up"
                    )
                self.raise_if_ended()
                self._in_flight += 1
            # Inside the lock: two threads' messages leave in the order in which they took their places.
            self._in_bus(lambda now: self._session.push(message, frames, now))

    def request(self, message: AnyMessage, timeout_s: float) -> AnyMessage:
        """Ask a transient question, again and again until it is answered. Refusal, BusTimeout, Fenced."""
        wire.check_outgoing(message, (), self._max_bytes)
        answer: Future[AnyMessage] = Future()
        asked: list[int] = []

        def ask(now: float) -> list[Instruction]:
            number, instructions = self._session.ask(message, now)
            asked.append(number)
            self._answers[number] = answer
            return instructions

        def withdraw(_: float) -> list[Instruction]:
            for number in asked:
                self._answers.pop(number, None)
                self._session.withdraw(number)
            return []

        with self._changed:
            self.raise_if_ended()
            self._in_bus(ask)
        try:
            reply = answer.result(timeout_s)
        except TimeoutError:
            with self._changed:
                self.raise_if_ended()
                self._in_bus(withdraw)
            raise BusTimeout(
                f"{self._who} waited {timeout_s:g} s for the controller at {self.address} to answer "
                f"{type(message).__name__}: no answer came; check that the controller runs and is not overloaded"
            ) from None
        if isinstance(reply, Refused):
            raise Refusal.of(reply)
        return reply

    def receive(self, timeout_s: float) -> Delivery | None:
        """The next message for this rank, or None after `timeout_s`. Raises Fenced, or BusClosed after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._end is not None, timeout_s)
            self.raise_if_ended()
            return self._inbox.popleft() if self._inbox else None

    def raise_if_ended(self) -> None:
        """Raise what every call would: Fenced, or BusClosed. For who waits for something else meanwhile."""
        if self._end is not None:
            raise self._end.with_traceback(None)
        if self._thread is None:
            raise BusClosed(f"the bus of {self._who} is not started; call start() first")

    def stats(self) -> dict[str, int]:
        """Counters by name: repeats, gaps, resent, registrations, stale_term, early, pushed_back, unsent, faults."""
        return self._session.stats() | {"in_flight": self._in_flight, "inbox": len(self._inbox)}

    def close(self, goodbye: str | None = None, timeout_s: float = 5.0) -> None:
        """End the bus thread. With `goodbye`, first say so and wait until all that was sent is acknowledged.

        A controller that never welcomed this rank does not know it and is told nothing.
        """
        deadline = time.monotonic() + timeout_s
        if goodbye is not None and self._welcome is not None and self._end is None:
            try:
                self.send(Goodbye(cause=goodbye), timeout_s=timeout_s)
            except (BusTimeout, Fenced) as error:
                logger.warning("closing without a goodbye", cause=str(error))
            with self._changed:
                remaining_s = deadline - time.monotonic()
                self._changed.wait_for(lambda: self._in_flight == 0 or self._end is not None, remaining_s)
                if self._in_flight:
                    logger.warning("closing with messages unacknowledged", count=self._in_flight)
        self._finish(BusClosed(f"the bus of {self._who} was closed"))
        if self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                self._loop.call_soon_threadsafe(self._main.cancel)
            self._thread.join(max(1.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                raise BusTimeout(f"{self._who} waited for its own bus thread to end; it is stuck: end the process")
        if self._own_context:
            self._context.destroy(linger=0)

    # --- between the threads ---

    def _finish(self, error: BusError) -> None:
        """From now on every waiting call raises `error`; the first cause stands."""
        with self._changed:
            self._end = self._end or error
            self._changed.notify_all()
            answers, self._answers = list(self._answers.values()), {}
        for answer in answers:
            if not answer.done():
                answer.set_exception(error)

    def _in_bus(self, act: Callable[[float], list[Instruction]]) -> None:
        """Have the bus thread do `act(now)` and carry out what comes of it, in the order of these calls."""

        def run() -> None:
            try:
                self._carry_out(act(time.monotonic()))
            except Exception as error:  # a callback's error would otherwise only be printed
                self._fail(error)

        try:
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:  # the loop ended between our look and this call
            raise self._end or BusClosed(f"the bus of {self._who} has ended") from None

    def _fail(self, error: BaseException) -> None:
        logger.error("the bus thread ends with an error", exc_info=error)
        cause = f"{type(error).__name__}: {error}"
        self._finish(BusClosed(f"the bus thread of {self._who} ended with {cause}; see its log"))
        self._main.cancel()

    # --- in the bus thread ---

    def _run_loop(self) -> None:
        try:
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            self._finish(BusClosed(f"the bus of {self._who} was closed"))
        except BaseException as error:
            self._fail(error)
        finally:
            self._loop.close()

    async def _live(self) -> None:
        session, settings = self._session, self.settings
        self._at = resolve(self.address)
        self._connect()
        connected_at = time.monotonic()
        look_at = connected_at + MOVED_S
        try:
            self._carry_out(session.register(connected_at))
            while session.phase is not Phase.FENCED:
                await asyncio.sleep(min(settings.heartbeat_s, settings.resend_s) / TICKS)
                if self._receiving.done():
                    self._receiving.result()
                now = time.monotonic()
                self._look_at_the_doorstep()
                moved = False
                if now >= look_at:
                    look_at = now + MOVED_S
                    moved = self._moved()
                # A silent connection may be one that will never speak again (inproc never reconnects by itself).
                silent = now - max(connected_at, session.heard_at) > settings.lost_after_s
                if moved or self._renewed or silent:
                    self._disconnect()
                    self._connect()
                    connected_at = now
                self._carry_out(session.tick(now))
                if session.phase is Phase.OPEN:
                    self._pulse.heard(session.heard_at)
        finally:
            self._disconnect()
            await asyncio.gather(self._receiving, return_exceptions=True)

    def _moved(self) -> bool:
        """Whether the controller listens elsewhere now."""
        found = resolve(self.address)
        if found in ("", self._at):
            return False
        logger.info("the controller has moved", to=found)
        self._at = found
        return True

    def _connect(self) -> None:
        self._socket = zmq.asyncio.Context(self._context).socket(zmq.DEALER)
        configure_dealer(self._socket, self.settings)
        self._socket.set(zmq.ROUTING_ID, self._identity)
        self._renewed = False
        self._keys = self._newest_keys()
        if self._keys is not None:
            self._keys.configure(self._socket)
        self._doorstep = Doorstep(self._context, self._socket)
        if self._at:
            self._socket.connect(self._at)
        self._receiving = self._loop.create_task(self._receive_forever(self._socket))

    def _disconnect(self) -> None:
        self._receiving.cancel()
        self._doorstep.close()
        self._socket.close(linger=0)

    def _newest_keys(self) -> ClientKeys | None:
        """What the files say now: they may have been renewed. Where they cannot be used, what they said before."""
        if self._keys_place is not None:
            with contextlib.suppress(KeysRefused):
                return client_keys(self._keys_place, self.passport.replica)
        return self._keys

    def _look_at_the_doorstep(self) -> None:
        for failure in self._doorstep.failures():
            why = f"its handshake failed: {failure.text}; compare the keys of both sides ('orrery keys list')"
            if failure.final and why != self._turned_away:  # else it is tried again at once, as when a controller dies
                logger.warning("this rank is not connected", cause=why)
            self._turned_away = why

    async def _receive_forever(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            parts = await socket.recv_multipart(copy=False)
            now = time.monotonic()
            try:
                envelope, frames = wire.decode([part.buffer for part in parts], self._max_bytes)
            except WireFault as fault:
                logger.warning("a message of the controller cannot be taken", cause=str(fault))
                self._carry_out(self._session.hear_fault(fault, now))
            else:
                room = len(self._inbox) < self.settings.window
                self._carry_out(self._session.hear(envelope, frames, now, room=room))

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Transmit(envelope, frames):
                    self._transmit(envelope, frames)
                case Deliver(delivery):
                    if isinstance(delivery.message, Refused):
                        logger.warning("the controller refused a message", cause=str(Refusal.of(delivery.message)))
                    self._deliver(delivery)
                case Freed(count):
                    with self._changed:
                        self._in_flight -= count
                        self._changed.notify_all()
                case Answer(request, message):
                    answer = self._answers.pop(request, None)
                    if answer is not None and not answer.done():
                        answer.set_result(message)
                case Opened(registered, first):
                    logger.info("registered", incarnation=registered.incarnation, term=self.term)
                    self._open(registered, first)
                case Rejected(refused):
                    logger.error("the controller refused to register this rank", cause=str(Refusal.of(refused)))
                    if self._welcome is None:
                        self._finish(Refusal.of(refused))
                    else:
                        self._deliver(Delivery(refused))
                case KeyRefused(refused):
                    self._renewed = self._newest_keys() != self._keys
                    if not self._renewed:
                        self._carry_out(self._session.fence(refused))
                case FencedOff(refused):
                    logger.error(
                        "fenced off: this process may not go on as this replica", cause=str(Refusal.of(refused))
                    )
                    self._finish(Fenced.of(refused))

    def _open(self, registered: Registered, first: bool) -> None:
        if not first:
            self._deliver(Delivery(registered))
            return
        with self._changed:
            self._welcome = registered
            self._changed.notify_all()

    def _deliver(self, delivery: Delivery) -> None:
        with self._changed:
            self._inbox.append(delivery)
            self._changed.notify_all()

    def _transmit(self, envelope: Envelope, frames: Frames) -> None:
        error = send_now(self._socket, wire.encode(envelope, frames, self._max_bytes))
        if isinstance(error, zmq.Again):
            self._session.not_sent(envelope)
        elif error is not None:
            raise error
