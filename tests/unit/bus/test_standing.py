"""What a rank says of itself: the time that it spent in each state adds up to the time that passed."""

from __future__ import annotations

from shared.bus.standing import Standing


def test_time_is_counted_for_the_state_that_it_was_spent_in() -> None:
    now = [100.0]
    standing = Standing(lambda: now[0])
    now[0] = 102.0
    standing.progress("generating", 1)
    now[0] = 105.0
    standing.progress("generating", 2)
    now[0] = 105.5
    beat = standing.heartbeat()
    assert (beat.state, beat.progress) == ("generating", 2)
    assert beat.seconds == {"starting": 2.0, "generating": 3.5}


def test_a_state_that_goes_on_is_counted_by_every_heartbeat() -> None:
    now = [0.0]
    standing = Standing(lambda: now[0])
    standing.progress("waiting", 0)
    totals = []
    for second in (1.0, 2.0, 3.0):
        now[0] = second
        totals.append(standing.heartbeat().seconds)
    assert totals == [{"waiting": 1.0}, {"waiting": 2.0}, {"waiting": 3.0}]
