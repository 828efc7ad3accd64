"""Who is silent, and when that says nothing because the controller itself was away."""

from __future__ import annotations

from services.controller.liveness import Liveness

RANK = ("rollout-0", 1, 0)
OTHER = ("rollout-0", 1, 1)


def looked(liveness: Liveness, until: float, since: float = 0.0) -> list[str]:
    """Look every second; who was found silent, and when."""
    found = []
    at = since
    while at < until:
        at += 1.0
        found += [f"{rank[0]}/{rank[2]}@{at:.0f}" for rank, _ in liveness.silent(at)]
    return found


def test_a_rank_is_silent_after_the_limit_and_not_before() -> None:
    liveness = Liveness(10.0)
    liveness.hear(RANK, 0.0)
    assert looked(liveness, 10.0) == []
    assert liveness.silent(10.5) == [(RANK, 10.5)]


def test_any_word_begins_the_silence_anew() -> None:
    liveness = Liveness(10.0)
    liveness.hear(RANK, 0.0)
    assert looked(liveness, 9.0) == []
    liveness.hear(RANK, 9.0)
    assert looked(liveness, 19.0, since=9.0) == []


def test_every_rank_counts_for_itself() -> None:
    liveness = Liveness(3.0)
    liveness.hear(RANK, 0.0)
    liveness.hear(OTHER, 0.0)
    looked(liveness, 2.0)
    liveness.hear(RANK, 2.0)
    assert liveness.silent(3.5) == [(OTHER, 3.5)]


def test_a_replica_is_as_silent_as_its_most_silent_rank() -> None:
    liveness = Liveness(10.0)
    liveness.hear(RANK, 0.0)
    liveness.hear(OTHER, 0.0)
    liveness.note(RANK, "generating", 5)
    liveness.note(OTHER, "computing", 0)
    liveness.hear(RANK, 4.0)
    assert liveness.heartbeat("rollout-0", 1, 5.0) == ("generating", 5.0)


def test_rank_0_alone_tells_where_a_replicas_time_goes() -> None:
    liveness = Liveness(10.0)
    liveness.note(RANK, "generating", 5, {"generating": 3.0})
    liveness.note(OTHER, "computing", 0, {"computing": 9.0, "starting": 2.0})
    assert liveness.take_spent() == {"time/rollout/generate": 3.0}


def test_who_is_forgotten_is_not_missed() -> None:
    liveness = Liveness(3.0)
    liveness.hear(RANK, 0.0)
    liveness.note(RANK, "generating", 5)
    liveness.hear(("rollout-0", 2, 0), 0.0)
    liveness.forget("rollout-0", 1)
    looked(liveness, 2.0)
    assert [rank for rank, _ in liveness.silent(3.5)] == [("rollout-0", 2, 0)]
    assert liveness.heartbeat("rollout-0", 1, 3.5) is None


def test_the_controllers_own_pause_is_nobody_elses_silence() -> None:
    liveness = Liveness(10.0)
    liveness.hear(RANK, 0.0)
    assert looked(liveness, 5.0) == []
    assert liveness.silent(100.0) == [], "the process was stopped for 95 s"
    assert looked(liveness, 104.0, since=100.0) == []
    assert looked(liveness, 107.0, since=104.0) == ["rollout-0/0@106", "rollout-0/0@107"]


def test_a_heartbeat_tells_what_a_replica_does() -> None:
    liveness = Liveness(10.0)
    assert liveness.heartbeat("rollout-0", 1, 0.0) is None
    liveness.hear(RANK, 1.0)
    assert liveness.heartbeat("rollout-0", 1, 3.0) == ("", 2.0)
    liveness.note(RANK, "generating", 40)
    assert liveness.heartbeat("rollout-0", 1, 3.0) == ("generating", 2.0)


def test_time_is_told_once_as_a_mean_over_the_replicas_of_a_role() -> None:
    liveness = Liveness(10.0)
    liveness.note(("rollout-0", 1, 0), "generating", 1, {"generating": 2.0, "waiting": 1.0})
    liveness.note(("rollout-1", 1, 0), "generating", 1, {"generating": 4.0})
    liveness.note(("policy-0", 1, 0), "applying", 1, {"training": 1.0, "applying": 0.5})
    first = {"time/policy/train": 1.5, "time/rollout/generate": 3.0, "time/rollout/wait": 0.5}
    assert liveness.take_spent() == first
    liveness.note(("rollout-1", 1, 0), "generating", 1, {"generating": 5.0})
    assert liveness.take_spent() == {"time/policy/train": 0.0, "time/rollout/generate": 0.5, "time/rollout/wait": 0.0}


def test_a_new_incarnation_counts_its_time_from_nothing() -> None:
    liveness = Liveness(10.0)
    liveness.hear(RANK, 0.0)
    liveness.note(RANK, "generating", 1, {"generating": 9.0})
    liveness.take_spent()
    liveness.forget("rollout-0", 1)
    liveness.note(("rollout-0", 2, 0), "generating", 1, {"generating": 1.0})
    assert liveness.take_spent() == {"time/rollout/generate": 1.0}
