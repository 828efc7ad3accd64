"""Orders with their frames to every member, answers back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from services.policy.batch import sequences_of
from services.policy.ranks.channel import WAITING, CrewChannel, MemberChannel
from services.policy.ranks.orders import (
    Abort,
    AnyAnswer,
    AnyOrder,
    Commit,
    Done,
    Failed,
    Forget,
    Gather,
    Here,
    Load,
    RanksError,
    Take,
    Told,
    Train,
)
from shared.messages import CommitStep, LoadState, MeshFormed, Position

AT = Position(1, 2, 3)


@pytest.fixture(params=[None, "lo"], ids=["one node", "over TCP"])
def crew(request: pytest.FixtureRequest) -> Iterator[CrewChannel]:
    channel = CrewChannel(request.param)
    yield channel
    channel.close()


def members_of(crew: CrewChannel) -> list[MemberChannel]:
    members = [MemberChannel(crew.meet(rank), rank) for rank in (1, 2)]
    for member in members:
        crew.connect(member.rank, member.address)
    return members


def test_orders_wait_for_a_member_that_takes_them_later_and_come_in_order(crew: CrewChannel) -> None:
    members = members_of(crew)
    orders: list[AnyOrder] = [
        Load(LoadState("peer", AT, "")),
        Commit(CommitStep(3, 1, 1)),
        Abort(3, 1, 1),
        Gather(AT, b"manifest", "/proc/1/fd/3"),
        Forget(),
        Take(b"head", b"manifest", "/proc/1/fd/3"),
    ]
    for number, order in enumerate(orders, 1):
        crew.send(number, order)
    for member in members:
        assert [member.receive() for _ in orders] == [(n, order, []) for n, order in enumerate(orders, 1)]


def test_a_step_arrives_with_its_payload_on_every_rank(crew: CrewChannel, tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), AT)
    members = members_of(crew)
    crew.send(1, Train(step), [memoryview(frame) for frame in frames])
    expected = sequences_of(step, frames)
    for member in members:
        number, order, taken = member.receive()
        assert number == 1 and isinstance(order, Train) and order.step == step
        found = sequences_of(order.step, taken)
        assert [s.tokens.tolist() for s in found] == [s.tokens.tolist() for s in expected]


def test_answers_of_all_ranks_come_through_one_socket(crew: CrewChannel) -> None:
    sent: list[AnyAnswer] = [
        Here(1, "tcp://10.0.0.1:7"),
        Done(1, 7, True),
        Failed(2, 7, "mesh", "it broke"),
        Told(1, MeshFormed(4)),
    ]
    members = members_of(crew)
    for answer in sent:
        members[answer.rank - 1].answer(answer)
    found: list[AnyAnswer | None] = []
    while len(found) < len(sent):
        assert crew.answers.poll(10_000)
        found.append(crew.receive())
    assert sorted(map(repr, found)) == sorted(map(repr, sent))
    assert crew.receive() is None


def test_over_tcp_nobody_is_heard_who_does_not_know_the_key_of_this_crew() -> None:
    crew = CrewChannel("lo")
    (member, _) = members_of(crew)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        for keys in (None, zmq.curve_keypair()):
            stranger = context.socket(zmq.PUSH)
            stranger.linger = 0
            failed = stranger.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            )
            if keys is not None:
                stranger.curve_serverkey = stranger.curve_publickey = keys[0]
                stranger.curve_secretkey = keys[1]
            stranger.connect(crew.meet(1).answers)
            assert failed.poll(10_000), "the handshake was not refused"
            stranger.disable_monitor()
            stranger.close()
        member.answer(Done(1, 7, True))
        assert crew.answers.poll(10_000)
        assert crew.receive() == Done(1, 7, True)
    finally:
        context.destroy(linger=0)
        crew.close()


def test_a_member_that_takes_nothing_is_named(crew: CrewChannel) -> None:
    crew.connect(1, "ipc:///tmp/orrery-nobody" if crew.meet(1).keys.secret == "" else "tcp://127.0.0.1:1")
    for number in range(WAITING):
        crew.send(number, Forget())
    with pytest.raises(RanksError, match=f"rank 1 takes no order Forget: {WAITING} others wait"):
        crew.send(WAITING, Forget())
