"""A flood of wrong messages against the real controller, with keys and without: each is refused by name and counted.

`ORRERY_FUZZ=100000` sets how many (`make fuzz`). Every message is wrong by the way it is made, not by what the code
under test says of it: bytes that are no msgpack; messages cut short, with a field too few, too many, or of another
type; whole ones of who never registered, of another term, or of a name that the key does not stand for; some within a
session, of another term, incarnation, rank or sender, or sent again. Afterwards an honest rank must be welcomed.
"""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from deploy.keys import make_keys
from shared.bus import BusClient, ask, wire
from shared.bus.keys import VARIABLE, ClientKeys, client_keys
from shared.config import load_recipe
from shared.messages import PROTOCOL, Envelope, Goodbye, Heartbeat, MeshFormed, Refused, Register, Status, StatusRequest
from tests.integration.conftest import NewRun
from tests.integration.run import Run
from tests.integration.test_services_alone import free_address

pytestmark = pytest.mark.integration
COUNT = int(os.environ.get("ORRERY_FUZZ", "3000"))
AT_ONCE = 100
WAIT_MS = 60_000
WAIT_S = 60.0
FAULTS = {"malformed", "protocol", "too_large", "unknown_sender", "term", "incarnation", "identity"}
MEGABYTES = 80
"""How much the controller may grow while it refuses."""


class Fuzzer:
    """A connection that registers as rollout-1, and then says what is wrong."""

    def __init__(self, address: str, keys: ClientKeys | None, seed: int) -> None:
        self._random = random.Random(seed)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.RCVTIMEO, WAIT_MS)
        self._socket.set(zmq.SNDTIMEO, WAIT_MS)
        self._socket.set(zmq.ROUTING_ID, b"rollout-1/0/5")
        if keys is not None:
            keys.configure(self._socket)
        self._socket.connect(address)
        self._requests = 1
        self.answers: Counter[str] = Counter()

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def flood(self, count: int, wrong: Callable[[random.Random], list[bytes]]) -> None:
        """Say so many, no more than `AT_ONCE` ahead of a question that must be answered after them."""
        for start in range(0, count, AT_ONCE):
            for _ in range(min(AT_ONCE, count - start)):
                self._socket.send_multipart(wrong(self._random))
            self._requests += 1
            end = envelope(Goodbye(cause="the end of this batch"), term=10**6, request=self._requests)
            self._socket.send_multipart(end)
            while self._hear() != self._requests:
                pass

    def register(self) -> int:
        """A session; its incarnation."""
        body = Register("rollout", "rollout-1", 0, 1, 5, os.getpid(), "host", None, [], [])
        self._socket.send_multipart(envelope(body, request=1))
        while True:
            answer = wire.decode(self._socket.recv_multipart(), 1 << 30)[0]
            if answer.reply_to == 1:
                break
        self._socket.send_multipart(once(answer.body.incarnation))
        return answer.body.incarnation

    def _hear(self) -> int:
        answer = wire.decode(self._socket.recv_multipart(), 1 << 30)[0]
        if isinstance(answer.body, Refused):
            self.answers[answer.body.fault] += 1
        else:
            self.answers[type(answer.body).__name__] += 1
        return answer.reply_to


def envelope(body: object, **fields: object) -> list[bytes]:
    base = {"protocol": PROTOCOL, "term": 1, "sender": "rollout-1", "rank": 0, "incarnation": 1, "reply_to": 0}
    numbers = {"sequence": 1 if body.reliable else 0, "request": 0}
    return [msgspec.msgpack.encode(Envelope(**(base | numbers | fields), body=body))]


BODIES = (
    Goodbye(cause="x" * 40),
    MeshFormed(epoch=3),
    Heartbeat("busy", 3),
    Register("rollout", "rollout-1", 0, 1, 5, 1, "host", None, [], []),
    StatusRequest(),
)
NO_FIELD = "nobody_knows_it"


def broken(chance: random.Random) -> list[bytes]:
    """No message of the protocol, whoever says it."""
    whole = envelope(chance.choice(BODIES))[0]
    tree = msgspec.msgpack.decode(whole)
    match chance.randrange(8):
        case 0:  # 0xc1 is the one byte that msgpack never uses
            return [b"\xc1" + chance.randbytes(chance.randrange(300))]
        case 1:
            return [whole[: chance.randrange(len(whole))]]
        case 2:
            del tree[chance.choice(list(tree))]
        case 3:
            tree[NO_FIELD + str(chance.randrange(9))] = chance.randbytes(20)
        case 4:
            tree[chance.choice(list(tree))] = [chance.random(), {"a": None}]
        case 5:
            tree["body"] = {"type": "no_such_message", **{str(n): n for n in range(chance.randrange(20))}}
        case 6:
            tree[chance.choice(("sequence", "term", "request", "incarnation"))] = -1 - chance.getrandbits(60)
        case _:
            return [whole, *(chance.randbytes(chance.randrange(50)) for _ in range(chance.randint(1, 5)))]
    return [msgspec.msgpack.encode(tree)]


def strange(chance: random.Random) -> list[bytes]:
    """A message as it should be, of nobody who may say it."""
    body = chance.choice((Goodbye(cause="x"), MeshFormed(epoch=chance.getrandbits(30)), Heartbeat("busy", 1)))
    sender = chance.choice(("rollout-1", "rollout-2", "policy-0", "person", "controller", "\x00" * 9))
    return envelope(body, sender=sender, term=chance.choice((0, 1, 1, 2, 10**9)), incarnation=chance.randrange(4))


def once(incarnation: int) -> list[bytes]:
    """A report that the controller takes one time."""
    return envelope(MeshFormed(epoch=1), incarnation=incarnation)


def foreign(incarnation: int) -> Callable[[random.Random], list[bytes]]:
    """Within a session that stands: of an older or later term, another incarnation, rank or sender, or sent again."""

    def make(chance: random.Random) -> list[bytes]:
        if chance.random() < 0.2:
            return once(incarnation)
        wrong = chance.choice(
            (
                {"term": chance.choice((0, 2, 10**9))},
                {"incarnation": incarnation + chance.choice((-1, 1, 10**6))},
                {"sender": chance.choice(("rollout-2", "policy-0", "controller"))},
                {"rank": chance.randint(1, 99)},
            )
        )
        body = chance.choice((Goodbye(cause="x"), MeshFormed(epoch=1), Heartbeat("busy", 1)))
        return envelope(body, **({"incarnation": incarnation} | wrong))

    return make


@pytest.fixture(params=["without keys", "with keys"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """Where the keys lie, if there are any."""
    monkeypatch.delenv(VARIABLE, raising=False)
    if request.param == "without keys":
        return None
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def address() -> str:
    return free_address()


@pytest.fixture
def run(new_run: NewRun, recipe: Path, address: str, place: Path | None) -> Run:
    """A controller alone."""
    run = new_run()
    keys = ("--set", f'bus.keys="{place}"') if place is not None else ()
    run.launch(
        "services.controller", "--recipe", str(recipe), "--run-folder", str(run.folder), "--bind", address, *keys
    )
    run.wait_for(lambda: (run.folder / "controller.address").exists(), "the controller to listen")
    return run


@pytest.fixture
def fuzzer(run: Run, address: str, place: Path | None) -> Iterator[Fuzzer]:
    made = Fuzzer(address, client_keys(place, "rollout-1") if place is not None else None, seed=7)
    yield made
    made.close()


def test_wrong_messages_are_refused_by_name_and_counted(
    run: Run, address: str, place: Path | None, recipe: Path, fuzzer: Fuzzer
) -> None:
    def counted() -> Counter[str]:
        answer = ask(address, StatusRequest(), WAIT_S, keys=place)
        assert isinstance(answer, Status)
        return Counter({name: n for name, n in answer.run["refused"].items() if name in {*FAULTS, "duplicate"}})

    (controller,) = run.processes()
    memory = controller.memory_info().rss
    fuzzer.flood(COUNT // 2, broken)
    fuzzer.flood(COUNT // 4, strange)
    said = COUNT // 2 + COUNT // 4
    batches = -(-(COUNT // 2) // AT_ONCE) + -(-(COUNT // 4) // AT_ONCE)
    assert counted().total() == said + batches == fuzzer.answers.total(), (counted(), fuzzer.answers)
    assert set(fuzzer.answers) <= FAULTS

    incarnation = fuzzer.register()
    before = fuzzer.answers.total()
    rest = COUNT - said
    fuzzer.flood(rest, foreign(incarnation))
    batches += -(-rest // AT_ONCE)
    assert counted().total() == COUNT + batches, (counted(), fuzzer.answers)
    assert fuzzer.answers.total() - before >= rest
    print(f"{COUNT} messages, refused: {dict(counted())}")

    assert run.processes() == [controller], "the same process all along"
    grown = (psutil.Process(controller.pid).memory_info().rss - memory) / 1e6
    assert grown < MEGABYTES, f"the controller has grown by {grown:.0f} MB"
    settings = load_recipe(recipe, [f'bus.keys="{place}"'] if place is not None else []).bus
    honest = BusClient(address, role="rollout", replica="rollout-0", settings=settings)
    try:
        assert honest.start(WAIT_S).incarnation == 1
    finally:
        honest.close()


def test_garbage_before_the_handshake_harms_nobody(run: Run, address: str, place: Path | None, recipe: Path) -> None:
    """Connections that speak no ZeroMQ, or half of it; nothing of theirs reaches the controller."""
    chance = random.Random(3)
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00"
    for _ in range(max(100, COUNT // 100)):
        mechanism = chance.choice((b"NULL", b"CURVE", b"PLAIN", b"\xff" * 20)).ljust(20, b"\0")
        start = chance.choice((b"", b"GET / HTTP/1.1\r\n\r\n", greeting, greeting + mechanism + bytes(32)))
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
            connection.sendall(start + chance.randbytes(chance.randrange(400)))
    answer = ask(address, StatusRequest(), WAIT_S, keys=place)
    assert isinstance(answer, Status)
    heard = {name: n for name, n in answer.run["refused"].items() if name != "handshake"}
    if place is not None:
        assert heard == {}, "with keys nothing that was not encrypted is a message"
    assert len(run.processes()) == 1
