"""A small controller on the real router, and settings quick enough for tests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import zmq

from shared.bus import BindRefused, BusClient, Incoming, RouterBus
from shared.config.schema import BusTable
from shared.messages import (
    AnyMessage,
    GroupReport,
    Heartbeat,
    HeartbeatReply,
    Refused,
    Register,
    Registered,
    Status,
    StatusRequest,
    StoreGet,
    StoreValue,
)

WAIT_S = 20.0


@dataclass
class Disk:
    """What a controller has written, and what the next one finds."""

    nonces: dict[str, list[int]] = field(default_factory=dict)
    messages: list[AnyMessage] = field(default_factory=list)


class Desk:
    """Welcomes everyone, writes down up to `writes` messages and acknowledges those, and answers questions."""

    def __init__(self, bind: str, settings: BusTable, context: zmq.Context | None, disk: Disk, term: int, writes: int):
        self.bus = RouterBus(bind, term=term, settings=settings, context=context)
        self.seen: list[Incoming] = []
        self.peers: dict[str, bytes] = {}
        self.refuse_registration: Refused | None = None
        self._disk, self._writes = disk, writes
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address = self._start()
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(), self._loop)

    def _start(self) -> str:
        """Bind; the listener of a controller that was just closed may live on in ZeroMQ's thread for a moment."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                return self.call(self.bus.start)
            except BindRefused:
                if self.bus.term == 1 or time.monotonic() > deadline:
                    raise

    def call(self, function: Callable, *arguments: object, **named: object):
        """Run something of the bus in its own loop and return what it returns."""

        async def run():
            result = function(*arguments, **named)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(WAIT_S)

    def command(self, replica: str, *messages: AnyMessage, frames: tuple = ()) -> None:
        for message in messages:
            self.call(self.bus.send, self.peers[replica], message, frames)

    def wait(self, what: Callable[[], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(what, WAIT_S), "the controller never saw it"

    def close(self) -> None:
        self._serving.cancel()
        if self._loop.is_running():
            self.call(self.bus.close)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(WAIT_S)
            self._loop.close()

    async def _serve(self) -> None:
        while True:
            incoming = await self.bus.recv()
            with self._changed:
                self.seen.append(incoming)
                self._take(incoming)
                self._changed.notify_all()

    def _take(self, incoming: Incoming) -> None:
        match incoming.envelope.body:
            case Register() as register:
                self._register(incoming, register)
            case Heartbeat():
                self.bus.reply(incoming, HeartbeatReply())
            case StatusRequest():
                self.bus.reply(incoming, Status(run={"stage": "train"}))
            case StoreGet(epoch=epoch, key=key):
                self.bus.reply(incoming, StoreValue(epoch=epoch, key=key, value=b"here"))
            case message if message.reliable and self._writes > 0:
                self._writes -= 1
                self._disk.messages.append(message)
                self.bus.durable(incoming.peer, incoming.envelope.sequence, incoming.session)

    def _register(self, incoming: Incoming, register: Register) -> None:
        if self.refuse_registration is not None:
            self.bus.reply(incoming, self.refuse_registration)
            return
        nonces = self._disk.nonces.setdefault(register.replica, [])
        if register.nonce not in nonces:
            nonces.append(register.nonce)
        if register.nonce != nonces[-1]:
            refused = Refused(fault="incarnation", expected="the newest", got="an older one", advice="end")
            self.bus.reply(incoming, refused)
            return
        self.peers[register.replica] = incoming.peer
        self.bus.open_session(incoming.peer, register.replica, register.rank, len(nonces))
        self.bus.reply(incoming, Registered(incarnation=len(nonces), leases=register.leases))


def wait_for(client: BusClient, what: Callable[[], object]) -> None:
    """Wait until something is true of a client; it is looked at whenever the client changes."""
    with client._changed:
        assert client._changed.wait_for(what, WAIT_S), f"never came true; stats: {client.stats()}"


def report(group: int, arrays: tuple = ()) -> GroupReport:
    """A group report that differs in its group only."""
    return GroupReport(
        group=group,
        attempt=0,
        lineage=0,
        rewards=[1.0],
        parts={},
        prompt_length=0,
        lengths=[],
        truncated=[],
        oldest=0,
        newest=0,
        seconds=0.5,
        arrays=list(arrays),
    )


@pytest.fixture
def settings() -> BusTable:
    return BusTable(heartbeat_s=0.05, resend_s=0.05, lost_after_s=0.5, window=64, max_message_mb=8)


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def open_desk(settings: BusTable, context: zmq.Context, disk: Disk) -> Iterator[Callable[..., Desk]]:
    """Makes controllers; in process unless told another address."""
    desks: list[Desk] = []

    def make(bind: str = "inproc://controller", term: int = 1, writes: int = 1_000_000) -> Desk:
        desks.append(Desk(bind, settings, context, disk, term, writes))
        return desks[-1]

    yield make
    for desk in desks:
        desk.close()


@pytest.fixture
def open_client(settings: BusTable, context: zmq.Context) -> Iterator[Callable[..., BusClient]]:
    """Makes clients that are closed at the end of the test."""
    clients: list[BusClient] = []

    def make(address: str = "inproc://controller", replica: str = "rollout-0", **named: object) -> BusClient:
        used = {"settings": settings, **named}
        clients.append(BusClient(address, role="rollout", replica=replica, context=context, **used))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def make_report() -> Callable[..., GroupReport]:
    return report


@pytest.fixture
def wait() -> Callable[[BusClient, Callable[[], object]], None]:
    return wait_for
