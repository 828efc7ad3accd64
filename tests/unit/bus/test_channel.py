"""The reliable channel under loss, repetition and reordering, with time passed in."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.bus.channel import MOST_PATIENCE, Arrival, Channel, WindowFull


def channel(window: int = 4, resend_s: float = 1.0) -> Channel:
    return Channel(window=window, resend_s=resend_s)


def test_messages_are_numbered_from_one():
    sender = channel()
    assert [sender.push(item, 0.0) for item in "abc"] == [1, 2, 3]


def test_a_full_window_says_so_until_an_ack_makes_room():
    sender = channel(window=2)
    sender.push("a", 0.0)
    sender.push("b", 0.0)
    assert sender.full
    with pytest.raises(WindowFull):
        sender.push("c", 0.0)
    assert sender.acknowledge(1, 0.0) == 1
    assert sender.push("c", 0.0) == 3


def test_acks_are_cumulative_and_old_or_impossible_ones_change_nothing():
    sender = channel()
    for item in "abc":
        sender.push(item, 0.0)
    assert sender.acknowledge(2, 0.0) == 2
    assert [sender.acknowledge(n, 0.0) for n in (2, 1, 0, -1, 4, 10**9)] == [0] * 6
    assert sender.unacknowledged() == ["c"]


def test_everything_unacknowledged_is_sent_again_after_resend_s():
    sender = channel()
    for item in "abc":
        sender.push(item, 0.0)
    sender.acknowledge(1, 0.5)
    assert sender.due(1.4) == []
    assert sender.due(1.5) == [(2, "b"), (3, "c")]
    assert sender.resent == 2


def test_repeats_come_further_apart_until_something_is_acknowledged():
    sender = channel()
    sender.push("a", 0.0)
    sender.push("b", 0.0)
    times = [tenth / 10 for tenth in range(200) if sender.due(tenth / 10)]
    gaps = [round(b - a, 1) for a, b in itertools.pairwise(times)]
    assert (times[0], gaps) == (1.0, [2.0, *[float(MOST_PATIENCE)] * 4])
    sender.acknowledge(1, 20.0)
    assert sender.due(20.9) == []
    assert sender.due(21.0) == [(2, "b")]


def test_nothing_is_due_and_nobody_waits_when_all_is_acknowledged():
    sender = channel()
    sender.push("a", 3.0)
    assert sender.waiting_since == 3.0
    sender.acknowledge(1, 4.0)
    assert sender.due(1e9) == []
    assert sender.waiting_since is None


def test_duplicates_and_gaps_are_told_apart_and_counted():
    receiver = channel()
    assert [receiver.arrive(n) for n in (1, 1, 3, 2, 2, 3)] == [
        Arrival.NEXT,
        Arrival.DUPLICATE,
        Arrival.GAP,
        Arrival.NEXT,
        Arrival.DUPLICATE,
        Arrival.NEXT,
    ]
    assert (receiver.repeats, receiver.gaps, receiver.received) == (2, 1, 3)


def test_received_is_not_yet_durable():
    receiver = channel()
    receiver.arrive(1)
    receiver.arrive(2)
    assert receiver.durable == 0
    receiver.mark_durable(1)
    assert receiver.durable == 1
    receiver.mark_durable(2)
    receiver.mark_durable(1)
    assert receiver.durable == 2
    with pytest.raises(ValueError, match="only 2 have been received"):
        receiver.mark_durable(3)


def test_a_refused_message_becomes_durable_only_with_what_came_before_it():
    receiver = channel()
    for sequence in (1, 2, 3):
        receiver.arrive(sequence)
    receiver.step_over(2)
    receiver.step_over(3)
    assert receiver.durable == 0
    receiver.mark_durable(1)
    assert receiver.durable == 3


def test_a_new_session_counts_from_one_and_returns_what_was_not_acknowledged():
    both = channel()
    for item in "abc":
        both.push(item, 0.0)
    both.acknowledge(1, 0.0)
    both.arrive(1)
    both.mark_durable(1)
    assert both.reset() == ["b", "c"]
    assert (both.received, both.durable, both.unacknowledged(), both.due(1e9)) == (0, 0, [], [])
    assert both.push("b", 0.0) == 1
    assert both.arrive(1) is Arrival.NEXT


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(0, 40),
    window=st.integers(1, 8),
    loss=st.sampled_from([0.0, 0.2, 0.6]),
    repeats=st.sampled_from([0.0, 0.3]),
    reorder=st.booleans(),
    slow_disk=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_whatever_the_network_does_everything_is_delivered_once_in_order(
    count, window, loss, repeats, reorder, slow_disk, seed
):
    """A seeded network between two channels; acks travel over it too, and may wait for a disk."""
    chance = random.Random(seed)
    sender, receiver = Channel(window=window, resend_s=1.0), Channel(window=window, resend_s=1.0)
    waiting, delivered = list(range(count)), []
    flying: list[tuple[str, int, int]] = []

    def fly(kind: str, sequence: int, item: int = -1) -> None:
        for _ in range(1 + (chance.random() < repeats)):
            if chance.random() >= loss:
                flying.insert(chance.randrange(len(flying) + 1) if reorder else len(flying), (kind, sequence, item))

    now = 0.0
    while waiting or sender.unacknowledged():
        now += 0.25
        assert now < 20_000, "no progress"
        while waiting and not sender.full:
            fly("message", sender.push(waiting[0], now), waiting.pop(0))
        for sequence, item in sender.due(now):
            fly("message", sequence, item)
        landing = chance.randint(0, 12)
        arriving, flying = flying[:landing], flying[landing:]
        for kind, sequence, item in arriving:
            if kind == "ack":
                sender.acknowledge(sequence, now)
                continue
            arrival = receiver.arrive(sequence)
            if arrival is Arrival.NEXT:
                delivered.append(item)
            if arrival is not Arrival.GAP:
                if not slow_disk or chance.random() < 0.5:
                    receiver.mark_durable(receiver.received)
                fly("ack", receiver.durable)
    assert delivered == list(range(count))
