"""The two ends together, in process and over TCP, with a controller that dies and comes back."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest
import zmq

from shared.bus import BindRefused, BusClient, BusClosed, BusTimeout, Fenced, Refusal, RouterBus, WireFault, ask, wire
from shared.messages import (
    PROTOCOL,
    Ack,
    ArrayHeader,
    Drain,
    Envelope,
    Goodbye,
    GroupReport,
    Heartbeat,
    LeaseRef,
    Refused,
    Register,
    Registered,
    Shutdown,
    Status,
    StatusRequest,
    StoreGet,
    StoreValue,
)

START_S = 20.0


def test_a_rank_registers_and_both_sides_hear_each_other_in_order(open_desk, open_client, make_report):
    desk, client = open_desk(), open_client()
    registered = client.start(START_S)
    assert (registered.incarnation, client.incarnation, client.term) == (1, 1, 1)

    for group in range(200):
        client.send(make_report(group))
        desk.command("rollout-0", Drain(cause=str(group)))
    heard = [client.receive(START_S).message.cause for _ in range(200)]
    client.close(goodbye="done")

    assert heard == [str(group) for group in range(200)]
    said = [i.envelope.body for i in desk.seen if i.envelope.body.reliable]
    assert [message.group for message in said[:-1]] == list(range(200))
    assert said[-1] == Goodbye(cause="done")


def test_payload_frames_travel_over_tcp_unchanged_and_undecoded(open_desk, open_client, make_report):
    desk = open_desk("tcp://127.0.0.1:*")
    client = open_client(desk.address)
    client.start(START_S)
    small, large = bytes(range(12)), random.Random(0).randbytes(4 << 20)
    headers = (
        ArrayHeader(name="prompt", dtype="int32", shape=[3]),
        ArrayHeader(name="tokens", dtype="uint8", shape=[4 << 20]),
    )
    client.send(make_report(7, headers), (small, memoryview(large)))
    desk.wait(lambda: any(isinstance(i.envelope.body, GroupReport) for i in desk.seen))
    arrived = next(i for i in desk.seen if isinstance(i.envelope.body, GroupReport))
    assert [bytes(frame) for frame in arrived.frames] == [small, large]


def test_questions_are_answered_and_refusals_of_them_raised(open_desk, open_client):
    desk, client = open_desk(), open_client()
    client.start(START_S)
    assert client.request(StoreGet(epoch=3, key="k", timeout_s=1.0), START_S) == StoreValue(3, "k", b"here")

    desk.call(setattr, desk, "_take", lambda incoming: desk.bus.reply(incoming, Refused("epoch", "4", "3", "wait")))
    with pytest.raises(Refusal, match="epoch: expected 4, got 3"):
        client.request(StoreGet(epoch=3, key="k", timeout_s=1.0), START_S)


def test_a_question_that_nobody_answers_says_who_waited_for_what(open_desk, open_client):
    desk, client = open_desk(), open_client()
    client.start(START_S)
    desk.call(setattr, desk, "_take", lambda incoming: None)
    with pytest.raises(BusTimeout, match=r"rollout-0 rank 0 waited 0.1 s for the controller .* to answer StoreGet"):
        client.request(StoreGet(epoch=3, key="k", timeout_s=1.0), 0.1)


def test_heartbeats_carry_the_state_and_a_counter_of_work(open_desk, open_client):
    desk, client = open_desk(), open_client()
    client.progress("generating", 5)
    client.start(START_S)

    def told() -> bool:
        bodies = [i.envelope.body for i in desk.seen if isinstance(i.envelope.body, Heartbeat)]
        return any((b.state, b.progress) == ("generating", 5) and b.seconds["generating"] > 0 for b in bodies)

    desk.wait(told)


def test_starting_without_a_controller_says_where_it_was_looked_for(open_client):
    client = open_client("inproc://nobody")
    with pytest.raises(BusTimeout, match="controller at inproc://nobody to answer Register"):
        client.start(0.1)


def test_a_refused_registration_is_raised_by_start(open_desk, open_client):
    desk, client = open_desk(), open_client()
    desk.refuse_registration = Refused("dataset", "fingerprint a", "fingerprint b", "use the same file")
    with pytest.raises(Refusal, match="dataset: expected fingerprint a, got fingerprint b; use the same file"):
        client.start(START_S)


@pytest.mark.parametrize("bind", ["inproc://controller", "tcp://127.0.0.1:*"])
def test_nothing_is_lost_or_doubled_when_the_controller_restarts(bind, open_desk, open_client, make_report, disk, wait):
    first = open_desk(bind, writes=10)
    client = open_client(first.address)
    client.take_lease(LeaseRef(group=99, attempt=0))
    client.start(START_S)
    for group in range(15):
        client.send(make_report(group))
    first.wait(lambda: first.seen[-1].envelope.sequence == 15)
    wait(client, lambda: client.stats()["in_flight"] == 5)
    first.close()

    for group in range(15, 20):
        client.send(make_report(group))
    second = open_desk(first.address, term=2)
    wait(client, lambda: client.stats()["in_flight"] == 0)

    assert [message.group for message in disk.messages] == list(range(20))
    assert (client.term, client.incarnation) == (2, 1)
    welcome = client.receive(START_S).message
    held = [LeaseRef(group=group, attempt=0) for group in [*range(10, 20), 99]]
    assert isinstance(welcome, Registered)
    assert {(ref.group, ref.attempt) for ref in welcome.leases} == {(ref.group, ref.attempt) for ref in held}
    second.command("rollout-0", Shutdown(cause="done"))
    assert client.receive(START_S).message == Shutdown(cause="done")


def test_a_rank_that_the_controller_gave_up_registers_again(open_desk, open_client, make_report, disk, wait):
    desk, client = open_desk(), open_client()
    client.start(START_S)
    desk.call(desk.bus.close_session, desk.peers["rollout-0"])
    client.send(make_report(1))
    wait(client, lambda: client.stats()["in_flight"] == 0)
    assert [message.group for message in disk.messages] == [1]
    assert isinstance(client.receive(START_S).message, Registered)


def test_a_replaced_process_is_fenced(open_desk, open_client, make_report):
    desk, old, new = open_desk(), open_client(), open_client()
    old.start(START_S)
    replaced = desk.peers["rollout-0"]
    assert new.start(START_S).incarnation == 2
    desk.call(desk.bus.close_session, replaced)
    with pytest.raises(Fenced, match="incarnation"):
        old.receive(START_S)
    with pytest.raises(Fenced):
        old.send(make_report(1))
    new.send(make_report(2))
    desk.wait(lambda: any(i.envelope.body == make_report(2) for i in desk.seen))


def test_a_full_inbox_pushes_back_and_loses_nothing(open_desk, open_client, wait, settings):
    desk = open_desk()
    client = open_client(settings=settings.model_copy(update={"window": 3}))
    client.start(START_S)
    desk.command("rollout-0", *(Drain(cause=str(n)) for n in range(10)))
    wait(client, lambda: client.stats().get("pushed_back", 0) > 0)
    assert client.stats()["inbox"] == 3
    peer = desk.peers["rollout-0"]
    desk.call(lambda: None)
    assert desk.call(desk.bus.unacknowledged, peer) >= 7
    assert [client.receive(START_S).message.cause for _ in range(10)] == [str(n) for n in range(10)]
    assert client.stats()["pushed_back"] > 0


def test_a_full_window_blocks_the_sender_for_a_bounded_time(open_desk, open_client, make_report, settings):
    open_desk(writes=0)
    client = open_client(settings=settings.model_copy(update={"window": 2}))
    client.start(START_S)
    client.send(make_report(0))
    client.send(make_report(1))
    with pytest.raises(BusTimeout, match=r"2 messages \(bus.window\) are not acknowledged"):
        client.send(make_report(2), timeout_s=0.05)


def test_a_peer_that_does_not_keep_up_is_overdue_and_send_never_raises(open_desk, context, settings):
    desk = open_desk()
    peer = b"gone/0/1"
    desk.call(desk.bus.open_session, peer, "gone", 0, 1)
    for _ in range(settings.window):
        desk.call(desk.bus.send, peer, Drain(cause="-"))
    assert desk.call(desk.bus.overdue, 0.0) == []
    assert desk.call(desk.bus.overdue, float("inf")) == [peer]
    for _ in range(settings.window + 1):
        desk.call(desk.bus.send, peer, Drain(cause="-"))
    assert desk.call(desk.bus.overdue, 0.0) == [peer]
    assert desk.bus.counters["unreachable"] >= settings.window


def test_a_message_above_the_size_limit_is_refused_where_it_is_sent(open_desk, open_client, make_report, settings):
    desk = open_desk("tcp://127.0.0.1:*")
    client = open_client(desk.address)
    client.start(START_S)
    frame = bytes((settings.max_message_mb << 20) + 1)
    with pytest.raises(WireFault, match="too_large: expected at most 8388608 bytes"):
        client.send(make_report(0, (ArrayHeader(name="a", dtype="uint8", shape=[len(frame)]),)), (frame,))
    client.send(make_report(1))
    desk.wait(lambda: any(i.envelope.body == make_report(1) for i in desk.seen))


# --- peers that speak otherwise ---------------------------------------------------------------------------------------


class Stranger:
    """A bare DEALER that sends whatever it is told."""

    def __init__(self, context: zmq.Context, address: str, identity: bytes = b"stranger") -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.ROUTING_ID, identity)
        self.socket.set(zmq.RCVTIMEO, 20_000)
        self.socket.connect(address)

    def say(self, *frames: bytes) -> Envelope:
        self.socket.send_multipart(frames)
        return self.hear()

    def hear(self) -> Envelope:
        return wire.decode(self.socket.recv_multipart(), 1 << 30)[0]


@pytest.fixture
def stranger(open_desk, context):
    desk = open_desk()
    stranger = Stranger(context, desk.address)
    stranger.desk = desk
    yield stranger
    stranger.socket.close()


def envelope(body: object, **fields: object) -> Envelope:
    base = {"protocol": PROTOCOL, "term": 1, "sender": "rollout-0", "rank": 0, "incarnation": 1}
    numbers = {"sequence": 1 if body.reliable else 0, "request": 11, "reply_to": 0}
    return Envelope(**(base | numbers | fields), body=body)


def register() -> Register:
    return Register("rollout", "rollout-0", 0, 1, 5, 1, "host", None, [], [])


def as_frames(sent: Envelope) -> list[bytes]:
    return wire.encode(sent, (), 1 << 30)


@pytest.mark.parametrize(
    ("frames", "fault"),
    [
        ([b""], "malformed"),
        ([b"\xc1"], "malformed"),
        ([b"\x93\x01\x02\x03"], "malformed"),
        ([b"\x91" * 100_000], "malformed"),
        ([b"\x81\xa8protocol\x07"], "protocol"),
        (as_frames(envelope(Goodbye(cause=""), protocol=2)), "protocol"),
        ([*as_frames(envelope(Goodbye(cause=""))), b"extra"], "malformed"),
        ([*as_frames(envelope(Goodbye(cause=""))), bytes(9 << 20)], "too_large"),
        (as_frames(envelope(Goodbye(cause=""))), "unknown_sender"),
        (as_frames(envelope(Goodbye(cause=""), sender="person")), "unknown_sender"),
        (as_frames(envelope(Heartbeat(state="", progress=0))), "unknown_sender"),
        (as_frames(envelope(Heartbeat(state="", progress=0), sender="person")), "unknown_sender"),
        (as_frames(envelope(Goodbye(cause=""), term=9)), "term"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name_and_counted(stranger, frames, fault):
    answer = stranger.say(*frames)
    assert isinstance(answer.body, Refused)
    assert (answer.body.fault, answer.sender, answer.rank) == (fault, "controller", -1)
    assert stranger.desk.bus.counters[fault] == 1


def test_a_refusal_says_which_message_it_answers_even_if_that_did_not_decode(stranger):
    assert stranger.say(*as_frames(envelope(Goodbye(cause=""), protocol=2))).reply_to == 11


def test_fuzzed_frames_never_stop_the_controller(stranger):
    """Seeded mutations of valid messages: each is refused for what `wire` says of it, and the next one is served."""
    seeds = random.Random(20)
    valid = [as_frames(envelope(body))[0] for body in (register(), Goodbye(cause="x" * 50), Heartbeat("busy", 3))]
    refused = 0
    for _ in range(400):
        mutated = bytearray(seeds.choice(valid))
        for _ in range(seeds.randint(1, 8)):
            mutated[seeds.randrange(len(mutated))] = seeds.randrange(256)
        mutated = mutated[: seeds.choice((len(mutated), seeds.randrange(len(mutated))))]
        try:
            wire.decode([bytes(mutated)], 1 << 20)
        except WireFault as fault:
            refused += 1
            answer = stranger.say(bytes(mutated))
            assert isinstance(answer.body, Refused) and answer.body.fault == fault.fault
    assert refused > 300
    assert stranger.say(*as_frames(envelope(StatusRequest(), sender="person"))).body == Status(run={"stage": "train"})


def test_a_malformed_message_inside_a_session_does_not_hold_up_the_next(stranger):
    assert isinstance(stranger.say(*as_frames(envelope(register()))).body, Registered)
    bad = [*as_frames(envelope(Goodbye(cause="bad"))), b"a frame that no header describes"]
    stranger.socket.send_multipart(bad)
    answers = [stranger.hear().body for _ in range(2)]
    assert {type(a).__name__ for a in answers} == {"Ack", "Refused"}
    stranger.socket.send_multipart(as_frames(envelope(Goodbye(cause="good"), sequence=2)))
    assert stranger.hear().body.sequence == 2
    said = [i.envelope.body for i in stranger.desk.seen if i.envelope.body.reliable]
    assert said == [Goodbye(cause="good")]


def test_another_rank_or_incarnation_on_the_same_connection_is_refused(stranger):
    stranger.say(*as_frames(envelope(register())))
    assert stranger.say(*as_frames(envelope(Goodbye(cause=""), rank=1))).body.fault == "identity"
    assert stranger.say(*as_frames(envelope(Goodbye(cause=""), incarnation=2))).body.fault == "incarnation"
    assert stranger.desk.bus.counters["identity"] == stranger.desk.bus.counters["incarnation"] == 1


def test_a_repeated_register_is_welcomed_again_without_a_new_session(stranger):
    first = stranger.say(*as_frames(envelope(register())))
    assert stranger.say(*as_frames(envelope(Goodbye(cause="")))).body.sequence == 1
    assert stranger.say(*as_frames(envelope(register()))).body == first.body
    assert stranger.say(*as_frames(envelope(Goodbye(cause="2"), sequence=2))).body.sequence == 2
    assert sum(isinstance(i.envelope.body, Register) for i in stranger.desk.seen) == 1


def test_a_late_repetition_of_a_register_does_not_reopen_a_session_that_is_over(stranger):
    """The peer would go on with the old session's numbers, and wait for ever."""
    stranger.say(*as_frames(envelope(register())))
    stranger.desk.call(stranger.desk.bus.close_session, b"stranger")
    assert stranger.say(*as_frames(envelope(register()))).body.fault == "unknown_sender"
    assert isinstance(stranger.say(*as_frames(envelope(register(), request=12))).body, Registered)
    stranger.socket.send_multipart(as_frames(envelope(register(), request=11)))
    assert stranger.say(*as_frames(envelope(Goodbye(cause="")))).body.sequence == 1
    assert stranger.desk.bus.counters["stale"] == 1


def test_opening_a_session_again_for_the_same_register_changes_nothing(stranger):
    bus = stranger.desk.bus
    stranger.say(*as_frames(envelope(register())))
    assert stranger.say(*as_frames(envelope(Goodbye(cause="")))).body.sequence == 1
    stranger.desk.call(bus.open_session, b"stranger", "rollout-0", 0, 1)
    assert stranger.say(*as_frames(envelope(Goodbye(cause="2"), sequence=2))).body.sequence == 2
    stranger.desk.call(bus.close_session, b"stranger")
    stranger.desk.call(bus.open_session, b"stranger", "rollout-0", 0, 1)
    assert stranger.say(*as_frames(envelope(Goodbye(cause="3"), sequence=3))).body.fault == "unknown_sender"


@pytest.mark.parametrize(
    "unwanted",
    [
        as_frames(envelope(Ack(sequence=1))),
        as_frames(envelope(Refused("state", "", "", ""))),
        as_frames(envelope(Refused("state", "", "", ""), protocol=2)),
    ],
)
def test_acks_and_refusals_are_never_answered_with_a_refusal(stranger, unwanted):
    stranger.socket.send_multipart(unwanted)
    asked = as_frames(envelope(StatusRequest(), sender="person"))
    assert isinstance(stranger.say(*asked).body, Status)
    assert stranger.desk.bus.counters.total() == 1


def test_a_flood_does_not_starve_the_controllers_other_tasks(context, settings):
    async def flood() -> int:
        bus = RouterBus("inproc://flooded", term=1, settings=settings, context=context)
        flooder = Stranger(context, await bus.start())
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        for _ in range(200):
            flooder.socket.send(b"junk")
        flooder.socket.send_multipart(as_frames(envelope(register())))
        others = asyncio.create_task(take_turns())
        await bus.recv()
        others.cancel()
        flooder.socket.close()
        await bus.close()
        assert bus.counters["malformed"] == 200
        return turns

    assert asyncio.run(flood()) >= 2


def test_a_duplicate_is_acknowledged_again_and_not_handed_up(stranger):
    stranger.say(*as_frames(envelope(register())))
    for _ in range(3):
        assert stranger.say(*as_frames(envelope(Goodbye(cause="")))).body.sequence == 1
    assert sum(isinstance(i.envelope.body, Goodbye) for i in stranger.desk.seen) == 1
    assert stranger.desk.bus.counters["duplicate"] == 2


def test_durable_of_an_earlier_session_acknowledges_nothing_in_this_one(stranger):
    stranger.desk.call(setattr, stranger.desk, "_writes", 0)
    stranger.say(*as_frames(envelope(register())))
    stranger.socket.send_multipart(as_frames(envelope(Goodbye(cause="old"))))
    stranger.desk.wait(lambda: isinstance(stranger.desk.seen[-1].envelope.body, Goodbye))
    old = stranger.desk.seen[-1]
    stranger.say(*as_frames(envelope(register(), request=12)))
    stranger.socket.send_multipart(as_frames(envelope(Goodbye(cause="new"))))
    stranger.desk.wait(lambda: stranger.desk.seen[-1].envelope.body == Goodbye(cause="new"))
    stranger.desk.call(stranger.desk.bus.durable, old.peer, 1, old.session)
    assert stranger.desk.bus.counters["stale_durable"] == 1
    stranger.desk.call(stranger.desk.bus.durable, old.peer, 1, stranger.desk.seen[-1].session)
    assert stranger.hear().body.sequence == 1


# --- persons, addresses, ends -----------------------------------------------------------------------------------------


def test_a_person_asks_without_a_session(open_desk, context):
    desk = open_desk("tcp://127.0.0.1:*")
    assert ask(desk.address, StatusRequest(), START_S) == Status(run={"stage": "train"})
    with pytest.raises(ValueError, match="needs a session"):
        ask(desk.address, Goodbye(cause=""), START_S)
    with pytest.raises(BusTimeout, match="to answer StatusRequest"):
        ask("inproc://nobody", StatusRequest(), 0.05, context=context)


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:*", "tcp://*:5555", "tcp://10.0.0.1:5555", "udp://127.0.0.1:1", "x"])
def test_addresses_that_others_could_reach_are_refused(bind, settings):
    with pytest.raises(BindRefused, match=r"expected a loopback address .* set bus.bind"):
        RouterBus(bind, term=1, settings=settings)


def test_an_address_in_use_says_so(open_desk, settings):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(BindRefused, match="Address already in use"):
            open_desk(f"tcp://127.0.0.1:{other.getsockname()[1]}")


def test_a_closed_client_says_so(open_desk, open_client, make_report, settings):
    open_desk()
    client = open_client()
    with pytest.raises(BusClosed, match="not started"):
        client.send(make_report(0))
    client.start(START_S)
    client.close()
    client.close()
    for use in (lambda: client.send(make_report(0)), lambda: client.receive(1.0)):
        with pytest.raises(BusClosed, match="was closed"):
            use()
    with pytest.raises(ValueError, match="pass `context`"):
        BusClient("inproc://x", role="rollout", replica="r", settings=settings)


def test_an_error_in_the_bus_thread_reaches_the_service(open_desk, open_client):
    open_desk()
    client = open_client()
    client.start(START_S)
    client._session.tick = None  # anything that would be a bug
    with pytest.raises(BusClosed, match="ended with TypeError"):
        client.receive(START_S)
