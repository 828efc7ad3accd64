"""The bus with keys, over TCP: who gets in, what is bound to a key, and what a key on the list cannot do either."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zmq

from deploy.keys import add_key, make_keys, remove_key, renew_key
from shared.bus import BindRefused, BusTimeout, Fenced, KeysRefused, RouterBus, TurnedAway, ask, wire
from shared.bus.doorstep import Doorstep
from shared.bus.keys import ALLOWED, ClientKeys, client_keys, read_pair
from shared.config.schema import BusTable
from shared.engines.ranks import invitation
from shared.messages import (
    PROTOCOL,
    ArrayHeader,
    Drain,
    Envelope,
    Goodbye,
    GroupReport,
    Heartbeat,
    Refused,
    Register,
    Registered,
    Role,
    Status,
    StatusRequest,
    StopRun,
)

WAIT_S = 20.0
WAIT_MS = 20_000
TCP = "tcp://127.0.0.1:*"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def keyed() -> bool:
    """A test may say False."""
    return True


@pytest.fixture
def settings(folder: Path, keyed: bool) -> BusTable:
    """Those of the small controller and its clients."""
    keys = str(folder) if keyed else None
    return BusTable(heartbeat_s=0.05, resend_s=0.05, lost_after_s=0.5, window=64, max_message_mb=8, keys=keys)


class Raw:
    """A socket that says what it likes, with a key or without."""

    def __init__(self, context: zmq.Context, address: str, keys: ClientKeys | None, routing_id: bytes) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RCVTIMEO, WAIT_MS)
        self.socket.set(zmq.ROUTING_ID, routing_id)
        if keys is not None:
            keys.configure(self.socket)
        self.doorstep = Doorstep(context, self.socket)
        self.socket.connect(address)

    def say(self, *frames: bytes) -> Envelope:
        self.socket.send_multipart(frames)
        return wire.decode(self.socket.recv_multipart(), 1 << 30)[0]

    def try_to_say(self, *frames: bytes) -> None:
        """Once the handshake has failed there is nobody left to say it to, and a plain `send` would wait for ever."""
        with suppress(zmq.Again):
            self.socket.send_multipart(frames, zmq.DONTWAIT)

    def close(self) -> None:
        self.doorstep.close()
        self.socket.close(linger=0)


@pytest.fixture
def raw(context: zmq.Context) -> Iterator[Callable[..., Raw]]:
    made: list[Raw] = []

    def make(address: str, keys: ClientKeys | None, routing_id: bytes) -> Raw:
        made.append(Raw(context, address, keys, routing_id))
        return made[-1]

    yield make
    for each in made:
        each.close()


def frames(body: object, sender: str = "rollout-1", **fields: object) -> list[bytes]:
    base = {"protocol": PROTOCOL, "term": 1, "sender": sender, "rank": 0, "incarnation": 1}
    numbers = {"sequence": 1 if body.reliable else 0, "request": 11, "reply_to": 0}
    return wire.encode(Envelope(**(base | numbers | fields), body=body), (), 1 << 30)


def register(replica: str, role: Role) -> Register:
    return Register(role, replica, 0, 1, 5, 1, "host", None, [], [])


def wait_for_count(desk: object, name: str, count: int) -> None:
    """Until the controller has counted so many; each look is a turn of its loop."""
    for _ in range(100_000):
        if desk.call(lambda: desk.bus.counters[name]) >= count:
            return
    raise AssertionError(f"{name} never came to {count}: {desk.bus.counters}")


def stranger_keys(folder: Path, sender: str, elsewhere: Path) -> ClientKeys:
    """A good key of that name that this controller never made, with the controller's true public key."""
    make_keys(elsewhere)
    keys, known = client_keys(elsewhere, sender), client_keys(folder, sender)
    return ClientKeys(keys.name, keys.public, keys.secret, known.controller)


# --- who gets in ------------------------------------------------------------------------------------------------------


def test_with_keys_a_rank_works_as_without(open_desk, open_client, make_report):
    desk = open_desk(TCP)
    client = open_client(desk.address)
    assert client.start(WAIT_S).incarnation == 1
    large = random.Random(0).randbytes(4 << 20)
    client.send(make_report(7, (ArrayHeader("tokens", "uint8", [4 << 20]),)), (large,))
    desk.command("rollout-0", Drain(cause="x"))
    assert client.receive(WAIT_S).message == Drain(cause="x")
    desk.wait(lambda: any(isinstance(i.envelope.body, GroupReport) for i in desk.seen))
    arrived = next(i for i in desk.seen if isinstance(i.envelope.body, GroupReport))
    assert bytes(arrived.frames[0]) == large
    assert desk.bus.counters["identity"] == desk.bus.counters["key"] == 0


def test_a_person_with_a_key_is_answered(open_desk, folder):
    desk = open_desk(TCP)
    assert ask(desk.address, StatusRequest(), WAIT_S, keys=folder) == Status(run={"stage": "train"})
    add_key(folder, "person-alice")
    alice = folder / "person-alice.key"
    assert ask(desk.address, StatusRequest(), WAIT_S, keys=alice) == Status(run={"stage": "train"})


def test_without_a_key_nobody_gets_through_the_handshake(open_desk, raw):
    desk = open_desk(TCP)
    nobody = raw(desk.address, None, b"rollout-1/0/5")
    nobody.try_to_say(*frames(register("rollout-1", "rollout")))
    assert nobody.doorstep.events.poll(WAIT_MS), "the handshake neither failed nor ended"
    wait_for_count(desk, "handshake", 1)
    assert nobody.socket.poll(0) == 0
    assert desk.seen == []
    with pytest.raises((TurnedAway, BusTimeout)):
        ask(desk.address, StatusRequest(), 0.5)
    assert desk.seen == []


def test_a_key_that_is_not_on_the_list_is_turned_away_by_name(open_desk, open_client, raw, folder, tmp_path, settings):
    desk = open_desk(TCP)
    keys = stranger_keys(folder, "rollout-1", tmp_path / "other")
    unknown = raw(desk.address, keys, b"rollout-1/0/5")
    unknown.try_to_say(*frames(register("rollout-1", "rollout")))
    assert unknown.doorstep.events.poll(WAIT_MS)
    assert [failure.of_key for failure in unknown.doorstep.failures()] == [True]
    assert desk.call(lambda: desk.bus.counters["key"]) == 1

    person = tmp_path / "other" / "person.key"
    person.write_text(person.read_text().replace(read_pair(person)["controller"], keys.controller.decode()))
    with pytest.raises(TurnedAway, match="did not let this connection in: its key is not on the controller's list"):
        ask(desk.address, StatusRequest(), WAIT_S, keys=person)
    rollout = tmp_path / "other" / "rollout.key"
    rollout.write_text(rollout.read_text().replace(read_pair(rollout)["controller"], keys.controller.decode()))
    client = open_client(desk.address, settings=settings.model_copy(update={"keys": str(tmp_path / "other")}))
    with pytest.raises(BusTimeout, match="its handshake failed: its key is not on the controller's list"):
        client.start(1.0)
    assert desk.seen == []


def test_a_client_talks_to_no_other_controller_than_the_one_its_file_names(open_desk, raw, folder, tmp_path):
    desk = open_desk(TCP)
    make_keys(tmp_path / "other")
    keys, other = client_keys(folder, "rollout-1"), client_keys(tmp_path / "other", "rollout-1")
    misled = raw(desk.address, ClientKeys("rollout", keys.public, keys.secret, other.controller), b"rollout-1/0/5")
    misled.try_to_say(*frames(register("rollout-1", "rollout")))
    assert misled.doorstep.events.poll(WAIT_MS)
    wait_for_count(desk, "handshake", 1)
    assert desk.seen == []


def test_keys_on_one_side_alone_are_named(folder, settings):
    bus = RouterBus(TCP, term=1, settings=settings.model_copy(update={"keys": None}))

    async def listen() -> None:
        address = await bus.start()
        with pytest.raises(TurnedAway, match="one side has keys, the other has none"):
            await asyncio.to_thread(ask, address, StatusRequest(), WAIT_S, keys=folder)
        await bus.close()

    asyncio.run(listen())


# --- what is bound to a key -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "routing_id", "sender", "body", "claimed"),
    [
        ("rollout-1", b"policy-0/0/5", "policy-0", register("policy-0", "policy"), "policy-0"),
        ("rollout-1", b"rollout-2/0/5", "rollout-2", register("rollout-2", "rollout"), "rollout-2"),
        ("rollout-1", b"rollout-1/0/5", "policy-0", register("policy-0", "policy"), "policy-0"),
        ("rollout-1", b"rollout-1/0/5", "rollout-1", register("policy-0", "policy"), "policy-0"),
        ("rollout-1", b"rollout-1/0/5", "rollout-1", register("rollout-1", "policy"), "rollout-1 as policy"),
        ("rollout-1", b"rollout-1/0/5", "policy-0", Goodbye(cause=""), "policy-0"),
        ("rollout-1", b"rollout-1/0/5", "person", StopRun("mine now"), "person"),
        ("rollout-1", b"person/5", "person", StopRun("mine now"), "person"),
        ("rollout-1", b"\x00\x01\x02\x03\x04", "rollout-1", register("rollout-1", "rollout"), "\x00\x01\x02\x03\x04"),
        ("rollout", b"policy-0/0/5", "policy-0", register("policy-0", "policy"), "policy-0"),
        ("rollout", b"rollout-7/0/5", "rollout-8", register("rollout-8", "rollout"), "rollout-8"),
        ("person", b"rollout-1/0/5", "rollout-1", register("rollout-1", "rollout"), "rollout-1"),
        ("person", b"person/5", "person", register("rollout-1", "rollout"), "rollout-1"),
    ],
)
def test_a_key_speaks_for_its_name_alone(open_desk, raw, folder, own, routing_id, sender, body, claimed):
    if own == "rollout-1":
        add_key(folder, own)
    desk = open_desk(TCP)
    impostor = raw(
        desk.address, client_keys(folder / f"{own}.key", own if own != "rollout" else "rollout-0"), routing_id
    )
    answer = impostor.say(*frames(body, sender)).body
    assert isinstance(answer, Refused)
    assert (answer.fault, answer.got) == ("identity", claimed)
    assert desk.bus.counters["identity"] == 1
    assert desk.seen == []


def test_a_key_of_a_role_serves_any_replica_of_it(open_desk, raw, folder):
    desk = open_desk(TCP)
    for number in (0, 31):
        name = f"rollout-{number}"
        member = raw(desk.address, client_keys(folder, name), f"{name}/0/5".encode())
        assert isinstance(member.say(*frames(register(name, "rollout"), name)).body, Registered)


def test_bytes_of_an_impostor_cannot_be_stepped_over_in_somebody_elses_session(open_desk, raw, folder):
    """A routing id is only what the other side says: a malformed message under it must not move that session on."""
    desk = open_desk(TCP)
    member = raw(desk.address, client_keys(folder, "policy-0"), b"policy-0/0/5")
    member.say(*frames(register("policy-0", "policy"), "policy-0"))
    impostor = raw(desk.address, client_keys(folder, "rollout-1"), b"policy-0/0/5")
    impostor.socket.send_multipart([*frames(Goodbye(cause=""), "policy-0"), b"a frame that no header describes"])
    wait_for_count(desk, "identity", 1)
    assert desk.bus.counters["malformed"] == 0
    assert desk.call(lambda: desk.bus._sessions[b"policy-0/0/5"].channel.received) == 0


def test_a_key_that_cannot_speak_for_the_replica_is_refused_before_connecting(open_client, folder, settings):
    alone = settings.model_copy(update={"keys": str(folder / "policy.key")})
    with pytest.raises(KeysRefused, match="expected a key of rollout-1 or rollout, got that of policy"):
        open_client("tcp://127.0.0.1:1", "rollout-1", settings=alone)


def test_workers_are_told_where_the_keys_lie_and_no_secret(open_client, folder):
    client = open_client("tcp://127.0.0.1:1", "rollout-1")
    told = invitation(client, 1.0)
    assert json.loads(told)["bus"]["keys"] == str(folder)
    assert client_keys(folder, "rollout-1").secret not in told


# --- replays: a key does not make an old message a new one ------------------------------------------------------------


@pytest.mark.parametrize("keyed", [False, True])
def test_replayed_and_foreign_messages_are_refused_with_keys_and_without(open_desk, raw, folder, keyed):
    desk = open_desk(TCP)
    member = raw(desk.address, client_keys(folder, "rollout-1") if keyed else None, b"rollout-1/0/5")
    assert isinstance(member.say(*frames(register("rollout-1", "rollout"))).body, Registered)
    first = frames(Goodbye(cause="once"))
    assert member.say(*first).body.sequence == 1
    counters = desk.bus.counters

    assert member.say(*first).body.sequence == 1, "a recorded message: acknowledged again, not handed up again"
    assert counters["duplicate"] == 1
    assert member.say(*frames(Goodbye(cause=""), term=0, sequence=2)).body.fault == "term"
    assert member.say(*frames(Goodbye(cause=""), term=9, sequence=2)).body.fault == "term"
    assert member.say(*frames(Goodbye(cause=""), incarnation=0, sequence=2)).body.fault == "incarnation"
    assert member.say(*frames(Goodbye(cause=""), rank=1, sequence=2)).body.fault == "identity"
    assert member.say(*frames(Heartbeat("", 0), "rollout-2")).body.fault == "identity"
    assert (counters["term"], counters["incarnation"], counters["identity"]) == (2, 1, 2)
    desk.call(desk.bus.close_session, b"rollout-1/0/5")
    assert member.say(*first).body.fault == "unknown_sender"
    assert member.say(*frames(register("rollout-1", "rollout"))).body.fault == "unknown_sender", "a recorded Register"
    assert sum(isinstance(i.envelope.body, Goodbye) for i in desk.seen) == 1


# --- keys that come and go --------------------------------------------------------------------------------------------


def test_a_key_that_is_taken_off_the_list_is_cut_at_once(open_desk, open_client, folder):
    desk = open_desk(TCP)
    client, other = open_client(desk.address), open_client(desk.address, "rollout-1")
    add_key(folder, "rollout-2")
    client.start(WAIT_S)
    other.start(WAIT_S)
    remove_key(folder, "rollout")
    for gone in (client, other):
        with pytest.raises(Fenced, match="key: expected a key on the controller's list, got one that was taken off it"):
            gone.receive(WAIT_S)
    assert desk.bus.counters["key"] >= 2
    stays = open_client(desk.address, "rollout-2")
    assert stays.start(WAIT_S).incarnation == 1


def test_a_renewed_key_is_taken_up_without_a_new_start_and_the_old_one_refused(
    open_desk, open_client, raw, folder, make_report, wait
):
    desk = open_desk(TCP)
    client, old = open_client(desk.address), client_keys(folder, "rollout-0")
    client.start(WAIT_S)
    renew_key(folder, "rollout")
    wait_for_count(desk, "key", 1)
    for group in range(5):
        client.send(make_report(group))
    wait(client, lambda: client.stats()["in_flight"] == 0)
    assert (client.incarnation, client.stats()["registrations"]) == (1, 1)
    said = [i.envelope.body.group for i in desk.seen if isinstance(i.envelope.body, GroupReport)]
    assert said == list(range(5))
    leaked = raw(desk.address, old, b"rollout-3/0/5")
    assert leaked.doorstep.events.poll(WAIT_MS)
    assert [failure.of_key for failure in leaked.doorstep.failures()] == [True]


def test_clients_find_a_controller_that_came_back_with_another_key(open_desk, open_client, folder, make_report, wait):
    first = open_desk(TCP)
    client = open_client(first.address)
    client.start(WAIT_S)
    first.close()
    renew_key(folder, "controller")
    second = open_desk(first.address, term=2)
    client.send(make_report(1))
    wait(client, lambda: client.stats()["in_flight"] == 0)
    assert client.term == second.bus.term == 2


def test_a_key_that_is_made_while_the_controller_runs_is_taken(open_desk, open_client, folder):
    desk = open_desk(TCP)
    add_key(folder, "rollout-5")
    assert open_client(desk.address, "rollout-5").start(WAIT_S).incarnation == 1


def test_a_list_that_cannot_be_used_leaves_the_one_before_in_force(open_desk, open_client, folder):
    desk = open_desk(TCP)
    (folder / ALLOWED).write_text("nonsense")
    desk.call(desk.bus._gate.look)
    assert open_client(desk.address).start(WAIT_S).incarnation == 1
    (folder / ALLOWED).chmod(0o666)
    desk.call(desk.bus._gate.look)
    assert open_client(desk.address, "rollout-1").start(WAIT_S).incarnation == 1


# --- addresses --------------------------------------------------------------------------------------------------------


def test_an_address_off_loopback_wants_keys(settings, open_desk, open_client):
    with pytest.raises(BindRefused, match=r"or keys, because anyone .*orrery keys make.* bus.keys or ORRERY_KEYS"):
        RouterBus("tcp://0.0.0.0:*", term=1, settings=settings.model_copy(update={"keys": None}))
    desk = open_desk("tcp://0.0.0.0:*")
    client = open_client(desk.address.replace("0.0.0.0", "127.0.0.1"))
    assert client.start(WAIT_S).incarnation == 1


def test_with_keys_that_cannot_be_used_nothing_is_bound(settings, folder):
    (folder / "controller.key").chmod(0o644)
    with pytest.raises(KeysRefused, match="expected mode 0600, got 0644"):
        RouterBus(TCP, term=1, settings=settings)


def test_an_address_where_curve_is_not_spoken_is_refused_with_keys(settings):
    with pytest.raises(BindRefused, match="CURVE needs tcp:// or ipc://"):
        RouterBus("inproc://x", term=1, settings=settings)
