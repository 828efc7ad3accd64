"""The chaos benchmark: its schedule, what it reads from a journal, and the arithmetic of its report."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from benchmarks.chaos.inject import Delivered, choose
from benchmarks.chaos.recovery import Recovery, median_apart, recoveries
from benchmarks.chaos.schedule import KINDS, LONGEST, Fault, make_schedule
from benchmarks.live.run import ServiceProcess
from tests.unit.benchmarks.journal import Story

ROLES = ("controller", "policy", "rollout", "evaluator")


def schedule(seed: int = 1, faults: int = 12, lost_after_s: float = 10.0) -> list[Fault]:
    return make_schedule(seed, faults, 60.0, ROLES, KINDS, lost_after_s)


def process(replica: str, pid: int, started: float, rank: int = 0) -> ServiceProcess:
    return ServiceProcess(replica.split("-")[0], replica, rank, pid, started)


def delivered(kind: str, replica: str, at: float, until: float | None = None) -> Delivered:
    fault = Fault(0.0, kind, replica.split("-")[0], 0.0, 0.0)  # type: ignore[arg-type]
    return Delivered(fault, process(replica, 1, 0.0), at, at if until is None else until)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_schedule_and_another_seed_another() -> None:
    assert schedule(seed=1) == schedule(seed=1)
    assert schedule(seed=1) != schedule(seed=2)


def test_twelve_faults_meet_every_kind_on_every_role_once() -> None:
    for seed in range(20):
        assert set(Counter((fault.kind, fault.role) for fault in schedule(seed)).values()) == {1}


def test_a_longer_schedule_deals_the_whole_deck_before_any_card_comes_a_third_time() -> None:
    counts = Counter((fault.kind, fault.role) for fault in schedule(faults=30))
    assert sorted(counts.values()) == [2] * 6 + [3] * 6


def test_faults_come_about_evenly_and_never_before_the_one_before_is_over() -> None:
    for seed in range(20):
        faults = schedule(seed, faults=24, lost_after_s=100.0)
        assert faults[0].at_s == 0.0
        for before, after in pairwise(faults):
            assert 45.0 <= after.at_s - before.at_s <= 75.0
            assert before.at_s + before.seconds < after.at_s


def test_only_stops_and_partitions_last_and_some_outlast_the_patience_of_the_controller() -> None:
    faults = [fault for seed in range(20) for fault in schedule(seed)]
    assert all(fault.seconds == 0.0 for fault in faults if fault.kind in ("kill", "term"))
    stops = [fault.seconds for fault in faults if fault.kind == "stop"]
    assert min(stops) < 10.0 < max(stops) <= 10.0 * LONGEST


def test_a_fault_meets_any_rank_of_any_replica_of_its_role() -> None:
    there = [process("policy-0", 1, 0.0), process("rollout-0", 2, 0.0), process("rollout-1", 3, 0.0)]
    there.append(process("rollout-1", 4, 0.0, rank=1))
    met = [choose(Fault(0.0, "kill", "rollout", pick, 0.0), there) for pick in (0.0, 0.5, 0.99)]
    assert [it.pid for it in met if it is not None] == [2, 3, 4]
    assert choose(Fault(0.0, "kill", "evaluator", 0.5, 0.0), there) is None


# --- what a fault cost ------------------------------------------------------------------------------------------------


def one(done: Delivered, story: Story, *processes: ServiceProcess) -> Recovery:
    (found,) = recoveries([done], story.timeline(), list(processes))
    return found


def test_a_killed_rollout_costs_training_nothing_that_its_restart_took() -> None:
    story = Story().joined(1.0, "rollout-0", 1).leased(2.0, "rollout-0", 1).committed(9.0, 5)
    story.gone(10.1, "rollout-0", 1).committed(11.0, 6).joined(14.0, "rollout-0", 2)
    story.mesh(14.5, 14.7, 3, "policy-0", "rollout-0").leased(15.0, "rollout-0", 2).committed(16.0, 7)
    found = one(delivered("kill", "rollout-0", 10.0), story, process("rollout-0", 2, 10.5))
    assert found.detect_s == pytest.approx(0.1)
    assert found.restart_s == pytest.approx(3.5)
    assert found.remesh_s == pytest.approx(0.2)
    assert found.redo_s is None
    assert found.commit_s == found.apart_s == pytest.approx(1.0)
    assert found.back_s == pytest.approx(5.0)


def test_a_restart_that_training_waited_for_is_told_apart() -> None:
    story = Story().joined(1.0, "policy-0", 1).assigned(2.0, "policy-0").committed(9.0, 5)
    story.aborted(10.1, 6).gone(10.1, "policy-0", 1).joined(14.0, "policy-0", 2).committed(16.0, 6)
    found = one(delivered("kill", "policy-0", 10.0), story, process("policy-0", 2, 10.5))
    assert found.commit_s == pytest.approx(6.0)
    assert found.apart_s == pytest.approx(2.5)
    assert found.redo_s == pytest.approx(5.9)
    assert not found.rolled_back


def test_a_rollback_is_redone_when_the_step_that_was_reached_is_reached_again() -> None:
    story = Story().joined(1.0, "policy-0", 1).committed(8.0, 4).committed(9.0, 5)
    story.gone(10.1, "policy-0", 1).joined(14.0, "policy-0", 2).rolled_back(14.0)
    story.committed(15.0, 4, lineage=2).committed(16.0, 5, lineage=2)
    found = one(delivered("kill", "policy-0", 10.0), story, process("policy-0", 2, 10.5))
    assert found.rolled_back
    assert found.redo_s == pytest.approx(2.0)


def test_a_killed_controller_is_noticed_when_its_next_process_starts() -> None:
    story = Story().term(1.0, 1).committed(9.0, 5).term(12.0, 2).committed(13.0, 6)
    found = one(delivered("kill", "controller", 10.0), story, process("controller", 2, 10.25))
    assert (found.detect_s, found.restart_s) == (pytest.approx(0.25), pytest.approx(1.75))
    assert (found.commit_s, found.apart_s) == (pytest.approx(3.0), pytest.approx(1.25))


def test_a_stop_that_nobody_gave_up_over_has_no_detection() -> None:
    story = Story().joined(1.0, "policy-0", 1).committed(9.0, 5).committed(14.0, 6)
    found = one(delivered("stop", "policy-0", 10.0, until=13.0), story)
    assert (found.name, found.detect_s, found.restart_s) == ("stop policy-0 for 3.0 s", None, None)
    assert found.commit_s == pytest.approx(4.0)


def test_a_fault_is_not_blamed_for_what_the_next_one_did() -> None:
    story = Story().joined(1.0, "rollout-0", 1).committed(9.0, 5).committed(12.0, 6).gone(20.1, "rollout-0", 1)
    story.aborted(20.2, 7)
    first, second = recoveries(
        [delivered("stop", "rollout-0", 10.0, until=11.0), delivered("kill", "rollout-0", 20.0)], story.timeline(), []
    )
    assert (first.detect_s, first.redo_s) == (None, None)
    assert second.detect_s == pytest.approx(0.1)
    assert second.commit_s is None


def test_the_longest_pause_is_told_though_a_step_was_committed_just_after_the_fault() -> None:
    story = Story().committed(10.01, 6).committed(17.0, 7).committed(18.0, 8)
    found = one(delivered("stop", "controller", 10.0, until=16.0), story)
    assert found.commit_s == pytest.approx(0.01)
    assert found.pause_s == pytest.approx(6.99)


def test_replicas_that_leave_when_the_run_is_over_were_not_lost_to_the_last_fault() -> None:
    story = Story().joined(1.0, "rollout-0", 1).committed(12.0, 6).finished(12.0).gone(12.1, "rollout-0", 1)
    assert one(delivered("stop", "rollout-0", 10.0, until=11.0), story).detect_s is None


def test_the_median_leaves_out_faults_that_no_commit_followed() -> None:
    story = Story().committed(12.0, 6).committed(23.0, 7)
    faults = [delivered("kill", "rollout-0", at) for at in (10.0, 20.0, 30.0)]
    assert median_apart(recoveries(faults, story.timeline(), [])) == pytest.approx(2.5)
    assert median_apart([]) is None
