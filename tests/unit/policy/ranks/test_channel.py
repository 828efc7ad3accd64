"""Orders with their frames to every member, answers back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
    Load,
    RanksError,
    Take,
    Told,
    Train,
)
from shared.messages import CommitStep, LoadState, MeshFormed, Position

AT = Position(1, 2, 3)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="orrery-") as path:
        yield Path(path)


@pytest.fixture
def crew(folder: Path) -> Iterator[CrewChannel]:
    channel = CrewChannel(folder, [1, 2])
    yield channel
    channel.close()


def test_what_was_sent_before_a_member_came_waits_for_it_in_order(crew: CrewChannel, folder: Path) -> None:
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
    for rank in (1, 2):
        member = MemberChannel(folder, rank)
        assert [member.receive() for _ in orders] == [(n, order, []) for n, order in enumerate(orders, 1)]


def test_a_step_arrives_with_its_payload_on_every_rank(crew: CrewChannel, folder: Path, tools: Any) -> None:
    step, frames = tools.step(tools.recipe(), AT)
    members = [MemberChannel(folder, rank) for rank in (1, 2)]
    crew.send(1, Train(step), [memoryview(frame) for frame in frames])
    expected = sequences_of(step, frames)
    for member in members:
        number, order, taken = member.receive()
        assert number == 1 and isinstance(order, Train) and order.step == step
        found = sequences_of(order.step, taken)
        assert [s.tokens.tolist() for s in found] == [s.tokens.tolist() for s in expected]


def test_answers_of_all_ranks_come_through_one_socket(crew: CrewChannel, folder: Path) -> None:
    sent: list[AnyAnswer] = [Done(1, 7, True), Failed(2, 7, "mesh", "it broke"), Told(1, MeshFormed(4))]
    members = {rank: MemberChannel(folder, rank) for rank in (1, 2)}
    for answer in sent:
        members[answer.rank].answer(answer)
    found: list[AnyAnswer | None] = []
    while len(found) < len(sent):
        assert crew.answers.poll(10_000)
        found.append(crew.receive())
    assert sorted(map(repr, found)) == sorted(map(repr, sent))
    assert crew.receive() is None


def test_a_member_that_takes_nothing_is_named(crew: CrewChannel) -> None:
    for number in range(WAITING):
        crew.send(number, Forget())
    with pytest.raises(RanksError, match=f"rank 1 takes no order Forget: {WAITING} others wait"):
        crew.send(WAITING, Forget())
