"""A rank's side of the protocol, message by message, with neither socket nor clock."""

from __future__ import annotations

import pytest

from shared.bus.errors import WireFault
from shared.bus.instructions import Answer, Deliver, FencedOff, Freed, Opened, Rejected, Transmit
from shared.bus.session import Phase, ReplicaSession
from shared.bus.standing import Passport, Standing
from shared.messages import (
    PROTOCOL,
    Accepted,
    Ack,
    Drain,
    Envelope,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    LeaseRef,
    LeaseReturned,
    Position,
    Refused,
    Register,
    Registered,
    StoreGet,
    StoreValue,
)


class Rank:
    """A session and the controller's words for it."""

    def __init__(self) -> None:
        self.standing = Standing(lambda: 0.0)
        passport = Passport("rollout", "rollout-0", 0, 1, 77, 1, "host")
        self.session = ReplicaSession(
            passport, self.standing, heartbeat_s=1.0, resend_s=1.0, lost_after_s=10.0, window=4
        )
        self.registration = self.said(self.session.register(0.0))[0]

    @staticmethod
    def said(instructions: list) -> list[Envelope]:
        return [i.envelope for i in instructions if isinstance(i, Transmit)]

    def hear(self, body, *, term=1, sequence=0, reply_to=0, now=0.0, room=True):
        envelope = Envelope(
            protocol=PROTOCOL,
            term=term,
            sender="controller",
            rank=-1,
            incarnation=0,
            sequence=sequence,
            request=0,
            reply_to=reply_to,
            body=body,
        )
        return self.session.hear(envelope, (), now, room=room)

    def welcome(self, *, term=1, now=0.0, request=None):
        request = self.registration.request if request is None else request
        return self.hear(Registered(incarnation=3, leases=[]), term=term, reply_to=request, now=now)


@pytest.fixture
def rank() -> Rank:
    return Rank()


def refused(fault: str) -> Refused:
    return Refused(fault=fault, expected="e", got="g", advice="a")


def returned(group: int) -> LeaseReturned:
    return LeaseReturned(group=group, attempt=0, lineage=0, cause="handed_back", detail="")


def only(kind: type, instructions: list) -> list:
    return [i for i in instructions if isinstance(i, kind)]


def test_register_is_repeated_with_the_same_number_until_it_is_answered(rank):
    assert isinstance(rank.registration.body, Register)
    assert rank.session.tick(0.9) == []
    (again,) = rank.said(rank.session.tick(1.0))
    assert (again.body, again.request) == (rank.registration.body, rank.registration.request)
    assert only(Opened, rank.welcome(now=1.5)) == [Opened(Registered(3, []), first=True)]
    assert all(not isinstance(e.body, Register) for e in rank.said(rank.session.tick(100.0)))


def test_register_tells_what_the_process_holds_and_leases_whose_report_is_unacknowledged(rank):
    rank.welcome()
    rank.standing.hold(Position(1, 2, 3))
    rank.standing.take_lease(LeaseRef(8, 0))
    rank.standing.take_lease(LeaseRef(9, 1))
    rank.standing.drop_lease(LeaseRef(9, 1))
    rank.session.push(returned(5), (), 0.0)
    (register,) = [e.body for e in rank.said(rank.session.register(1.0))]
    assert (register.holds, register.leases) == (Position(1, 2, 3), [LeaseRef(5, 0), LeaseRef(8, 0)])


def test_a_welcome_that_answers_an_earlier_registration_is_ignored(rank):
    rank.welcome()
    rank.session.register(5.0)
    assert rank.welcome() == []
    assert rank.session.phase is Phase.REGISTERING


def test_nothing_but_register_leaves_before_the_welcome_and_everything_after_it(rank):
    assert rank.session.push(returned(1), (), 0.0) == []
    number, said = rank.session.ask(StoreGet(1, "k", 1.0), 0.0)
    assert said == []
    assert rank.hear(Drain(cause=""), sequence=1) == []
    bodies = [type(e.body) for e in rank.said(rank.welcome())]
    assert bodies == [LeaseReturned, StoreGet, Heartbeat]
    assert rank.hear(StoreValue(1, "k", b"v"), reply_to=number) == [Answer(number, StoreValue(1, "k", b"v"))]
    assert rank.hear(StoreValue(1, "k", b"v"), reply_to=number) == []


def test_commands_are_delivered_once_in_order_and_acknowledged(rank):
    rank.welcome()
    outcomes = [rank.hear(Drain(cause=str(n)), sequence=n) for n in (1, 3, 1, 2)]
    assert [[d.delivery.message.cause for d in only(Deliver, o)] for o in outcomes] == [["1"], [], [], ["2"]]
    acks = [[e.body for e in rank.said(o)] for o in outcomes]
    assert acks == [[Ack(sequence=1)], [], [Ack(sequence=1)], [Ack(sequence=2)]]


def test_a_command_without_room_in_the_inbox_is_neither_delivered_nor_acknowledged(rank):
    rank.welcome()
    assert rank.hear(Drain(cause=""), sequence=1, room=False) == []
    assert only(Deliver, rank.hear(Drain(cause=""), sequence=1))
    assert rank.said(rank.hear(Drain(cause=""), sequence=1, room=False))[0].body == Ack(sequence=1)


def test_a_newer_term_begins_a_new_session_with_all_that_was_not_acknowledged(rank):
    rank.welcome()
    for group in range(4):
        rank.session.push(returned(group), (), 0.0)
    assert rank.hear(Ack(sequence=2)) == [Freed(2)]
    (register,) = rank.said(rank.hear(HeartbeatReply(), term=2, now=5.0))
    assert (type(register.body), register.term) == (Register, 2)
    rank.session.push(returned(4), (), 5.0)
    done = rank.welcome(term=2, request=register.request, now=6.0)
    assert only(Opened, done) == [Opened(Registered(3, []), first=False)]
    again = [e for e in rank.said(done) if isinstance(e.body, LeaseReturned)]
    assert [(e.sequence, e.body.group, e.term, e.incarnation) for e in again] == [
        (1, 2, 2, 3),
        (2, 3, 2, 3),
        (3, 4, 2, 3),
    ]


def test_what_an_older_term_says_is_dropped_and_counted(rank):
    rank.welcome(term=5)
    assert rank.hear(Drain(cause=""), term=4, sequence=1) == []
    assert rank.hear(refused("incarnation"), term=4) == []
    assert rank.session.stats()["stale_term"] == 2


@pytest.mark.parametrize("fault", ["term", "unknown_sender"])
def test_a_controller_that_does_not_know_this_session_is_registered_with_again_once(rank, fault):
    rank.welcome()
    messages = [rank.said(rank.session.push(returned(g), (), 0.0))[0] for g in range(3)]
    (register,) = rank.said(rank.hear(refused(fault), reply_to=messages[0].request, now=1.0))
    assert isinstance(register.body, Register)
    assert rank.hear(refused(fault), reply_to=messages[1].request, now=1.0) == []
    rank.welcome(request=register.request)
    assert rank.hear(refused(fault), reply_to=messages[2].request, now=1.0) == []
    assert rank.session.phase is Phase.OPEN


def test_a_registration_whose_session_is_over_before_the_welcome_came_begins_anew_with_its_own_number(rank):
    first = rank.registration.request
    rank.hear(refused("unknown_sender"), reply_to=first, now=0.1)
    again = rank.said(rank.session.tick(1.0))
    assert [type(e.body) for e in again] == [Register]
    assert again[0].request > first
    assert rank.session.phase is Phase.REGISTERING
    rank.welcome(request=again[0].request)
    assert rank.session.phase is Phase.OPEN


def test_a_fenced_process_says_nothing_more(rank):
    rank.welcome()
    (sent,) = rank.said(rank.session.push(returned(0), (), 0.0))
    assert rank.hear(refused("incarnation"), reply_to=sent.request) == [FencedOff(refused("incarnation"))]
    assert rank.session.tick(1e9) == []
    assert rank.session.push(Goodbye(cause=""), (), 0.0) == []
    assert rank.hear(Drain(cause=""), sequence=1, term=9) == []


def test_a_refusal_of_a_reliable_message_is_delivered(rank):
    rank.welcome()
    (sent,) = rank.said(rank.session.push(returned(0), (), 0.0))
    (deliver,) = rank.hear(refused("attempt"), reply_to=sent.request)
    assert deliver.delivery.message == refused("attempt")
    assert rank.hear(Ack(sequence=1)) == [Freed(1)]


def test_a_refused_registration_is_told_once_and_tried_again_slowly(rank):
    request = rank.registration.request
    assert rank.hear(refused("dataset"), reply_to=request) == [Rejected(refused("dataset"))]
    assert rank.hear(refused("dataset"), reply_to=request) == []
    assert rank.session.tick(9.9) == []
    assert len(rank.said(rank.session.tick(10.0))) == 1
    assert only(Opened, rank.welcome())


def test_a_controller_of_another_version_rejects_this_rank(rank):
    fault = WireFault("protocol", "protocol version 1", "version 2", "run the same version")
    assert rank.session.hear_fault(fault, 0.0) == [Rejected(fault.as_message())]
    assert rank.session.hear_fault(fault, 0.0) == []


def test_a_controller_that_comes_back_with_another_version_rejects_this_rank(rank):
    rank.welcome()
    fault = WireFault("protocol", "protocol version 1", "version 2", "run the same version")
    register, rejected = rank.session.hear_fault(fault, 5.0)
    assert (type(register.envelope.body), rejected) == (Register, Rejected(fault.as_message()))


def test_a_register_that_could_not_be_sent_is_said_again_at_the_next_tick(rank):
    rank.session.not_sent(rank.registration)
    assert [type(e.body) for e in rank.said(rank.session.tick(0.1))] == [Register]
    assert rank.session.tick(0.2) == []


def test_registrations_keep_a_distance_even_if_the_controller_refuses_every_session(rank):
    rank.welcome()
    assert rank.hear(refused("unknown_sender"), now=0.5) == []
    assert rank.session.phase is Phase.REGISTERING
    assert [type(e.body) for e in rank.said(rank.session.tick(1.0))] == [Register]


def test_a_malformed_command_is_refused_and_stepped_over(rank):
    rank.welcome()
    fault = WireFault("malformed", "e", "g", "a", sequence=1, request=4, body_type="drain")
    refusal, ack = rank.said(rank.session.hear_fault(fault, 0.0))
    assert (refusal.body, refusal.reply_to, ack.body) == (fault.as_message(), 4, Ack(sequence=1))
    assert only(Deliver, rank.hear(Drain(cause=""), sequence=2))


def test_a_malformed_transient_message_is_only_counted(rank):
    rank.welcome()
    assert rank.session.hear_fault(WireFault("malformed", "e", "g", "a", body_type="refused"), 0.0) == []
    assert rank.session.stats()["malformed"] == 1


def test_time_brings_heartbeats_resends_and_repeated_questions(rank):
    rank.welcome()
    rank.standing.progress("generating", 12)
    rank.session.push(returned(0), (), 0.0)
    rank.session.ask(StoreGet(1, "k", 9.0), 0.0)
    assert rank.session.tick(0.9) == []
    assert [e.body for e in rank.said(rank.session.tick(1.0))] == [
        returned(0),
        StoreGet(1, "k", 9.0),
        Heartbeat("generating", 12),
    ]


def test_a_question_is_asked_at_once_in_a_new_session(rank):
    rank.welcome()
    rank.session.ask(StoreGet(1, "k", 9.0), 0.9)
    (register,) = rank.said(rank.hear(HeartbeatReply(), term=2, now=1.0))
    bodies = [e.body for e in rank.said(rank.welcome(term=2, request=register.request, now=1.1))]
    assert StoreGet(1, "k", 9.0) in bodies


def test_a_withdrawn_question_is_not_repeated(rank):
    rank.welcome()
    number, _ = rank.session.ask(StoreGet(1, "k", 9.0), 0.0)
    rank.session.withdraw(number)
    assert [type(e.body) for e in rank.said(rank.session.tick(5.0))] == [Heartbeat]
    assert rank.hear(Accepted(detail=""), reply_to=number) == []
