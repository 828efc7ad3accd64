"""What benchmarks make of a live run: goodput, outages of a controller, phases of a fleet, equal policies, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.controller_kills import outages, started_again
from benchmarks.elastic import Scaled, members, phases, reached, scalings
from benchmarks.live.goodput import goodput, newest, paces, undisturbed_seconds
from benchmarks.live.picture import JOINED, STARTING, WORKING, Mark, draw, spans
from benchmarks.live.run import ServiceProcess
from benchmarks.live.verdict import unequal_policies
from tests.unit.benchmarks.journal import Story


def line(time: float, step: int, stage: str = "train", lineage: int = 1) -> dict[str, Any]:
    return {
        "time": time,
        "step": step,
        "stage": stage,
        "lineage": lineage,
        "samples_per_s": 8.0,
        "tokens": 100,
    }


def process(replica: str, pid: int, started: float) -> ServiceProcess:
    return ServiceProcess(replica.split("-")[0], replica, 0, pid, started)


# --- goodput ----------------------------------------------------------------------------------------------------------


def test_an_undisturbed_run_has_goodput_one_against_itself() -> None:
    lines = [line(float(step), step, "sft") for step in range(5)]
    lines += [line(4.0 + 3.0 * (step - 4), step) for step in range(5, 10)]
    assert paces(lines) == {"sft": pytest.approx(1.0), "train": pytest.approx(1 / 3)}
    assert goodput(lines, lines) == pytest.approx(1.0)


def test_a_step_is_held_against_the_one_with_its_number_since_the_pace_changes() -> None:
    slower_and_slower = [line(float(step**2), step) for step in range(10)]
    assert goodput(slower_and_slower, slower_and_slower[:4]) == pytest.approx(1.0)
    twice = [line(2.0 * step**2, step) for step in range(10)]
    assert goodput(slower_and_slower, twice) == pytest.approx(0.5)


def test_steps_beyond_those_of_the_undisturbed_run_count_with_its_mean() -> None:
    undisturbed = [line(float(step), step, "sft") for step in range(4)] + [line(6.0, 4), line(9.0, 5)]
    longer = [line(float(step), step, "sft") for step in range(4)] + [line(3.0 + 3.0 * n, 3 + n) for n in range(1, 5)]
    assert undisturbed_seconds(undisturbed, longer) == pytest.approx([0, 1, 1, 1, 3, 3, 3, 3])
    assert goodput(undisturbed, longer) == pytest.approx(1.0)


def test_a_stage_that_the_undisturbed_run_did_not_come_to_cannot_be_told() -> None:
    with pytest.raises(ValueError, match="stage train"):
        goodput([line(float(step), step, "sft") for step in range(4)], [line(1.0, 0), line(2.0, 1)])


def test_steps_that_are_trained_again_count_once() -> None:
    undisturbed = [line(float(step), step) for step in range(5)]
    before = [line(float(step), step) for step in range(4)]
    after = [line(4.0 + step, step, lineage=2) for step in range(2, 5)]
    lines = [*before, *after]
    assert [(each["step"], each["lineage"]) for each in newest(lines)] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)]
    assert goodput(undisturbed, lines) == pytest.approx(4 / 8)


def test_a_stage_of_one_step_has_no_pace() -> None:
    with pytest.raises(ValueError, match="at least two steps"):
        paces([line(1.0, 0)])


# --- a controller that dies -------------------------------------------------------------------------------------------


def test_an_outage_ends_for_a_replica_when_it_has_registered_again() -> None:
    story = Story().term(0.0, 1).registered(1.0, "policy-0").joined(1.0, "policy-0", 1)
    story.registered(1.0, "rollout-0").joined(1.0, "rollout-0", 1).committed(9.0, 1)
    story.term(11.0, 2).registered(11.2, "policy-0").registered(11.5, "rollout-0").committed(12.0, 2)
    story.term(21.0, 3).registered(21.2, "policy-0")
    processes = [process("controller", 1, 0.0), process("controller", 2, 10.3), process("controller", 3, 20.3)]
    first, second = outages([10.0, 20.0], story.timeline(), processes)
    assert (first.start_s, first.term_s, first.python_s) == tuple(map(pytest.approx, (0.3, 1.0, 0.7)))
    assert (first.back_s, first.commit_s) == (pytest.approx(1.5), pytest.approx(2.0))
    assert (second.back_s, second.commit_s) == (None, None)


def test_a_controllers_new_processes_are_expected_another_replicas_are_not() -> None:
    names = ["controller", "policy-0", "controller", "rollout-0", "rollout-0"]
    assert started_again([process(name, pid, 0.0) for pid, name in enumerate(names)]) == ["rollout-0"]


# --- a fleet that grows -----------------------------------------------------------------------------------------------


def grown() -> Story:
    story = Story().joined(0.0, "policy-0", 1).assigned(1.0, "policy-0")
    story.joined(0.0, "rollout-0", 1).leased(1.0, "rollout-0", 1)
    story.joined(12.0, "policy-1", 1).assigned(14.0, "policy-1")
    story.joined(11.0, "rollout-1", 1).leased(13.0, "rollout-1", 1)
    return story.gone(21.0, "rollout-1", 1).gone(22.0, "policy-1", 1)


def test_a_replica_is_a_member_from_its_first_work_until_it_is_gone() -> None:
    lives = grown().timeline().lives
    assert [members(lives, at) for at in (0.5, 5.0, 13.5, 14.5, 21.5, 23.0)] == [
        (0, 0), (1, 1), (1, 2), (2, 2), (2, 1), (1, 1),
    ]  # fmt: skip


def test_a_fleet_is_reached_when_exactly_so_many_work() -> None:
    lives = grown().timeline().lives
    assert reached(Scaled(10.0, 2, 2), 20.0, lives) == pytest.approx(4.0)
    assert reached(Scaled(20.0, 1, 1), 30.0, lives) == pytest.approx(2.0)
    assert reached(Scaled(10.0, 3, 3), 30.0, lives) is None


def test_scalings_are_told_as_the_controller_took_them() -> None:
    story = Story().scaled(10.0, policy=3, rollout=2).scaled(20.0, policy=1, rollout=1)
    assert scalings(story.timeline()) == [Scaled(10.0, 3, 2), Scaled(20.0, 1, 1)]


def test_each_phase_has_the_pace_between_its_scalings() -> None:
    train = [line(float(step), step) for step in range(31)]
    found = phases([Scaled(0.0, 1, 1), Scaled(10.0, 2, 2), Scaled(20.0, 1, 1)], train, grown().timeline())
    assert [phase.steps_per_s for phase in found] == pytest.approx([1.0, 1.0, 1.0])
    assert [phase.samples_per_s for phase in found] == pytest.approx([8.0, 8.0, 8.0])


# --- equal policies, pictures -----------------------------------------------------------------------------------------


def test_policies_that_a_checkpoint_found_different_are_named() -> None:
    story = Story().compared(1.0, 10, {"policy-0": "a", "policy-1": "a"})
    assert unequal_policies(story.timeline(), 2, 10) == []
    story.compared(2.0, 20, {"policy-0": "a", "policy-1": "b"}, "policy-1")
    assert unequal_policies(story.timeline(), 2, 20) == [
        "at step 20 these policies were not equal to the others: policy-1"
    ]


def test_all_policies_must_have_been_compared_after_the_last_step() -> None:
    story = Story().compared(1.0, 10, {"policy-0": "a", "policy-1": "a"})
    (fault,) = unequal_policies(story.timeline(), 2, 20)
    assert fault == "expected 2 policies to be compared after the last step, got 1"
    assert unequal_policies(Story().timeline(), 1, 20) == []


def test_a_lane_tells_starting_loading_and_working_apart() -> None:
    story = Story().term(1.0, 1).joined(2.0, "rollout-0", 1).leased(5.0, "rollout-0", 1).gone(8.0, "rollout-0", 1)
    found = spans(story.timeline(), [process("controller", 1, 0.0), process("rollout-0", 2, 1.0)], 10.0)
    assert [(span.replica, span.start, span.end, span.colour) for span in found] == [
        ("controller", 0.0, 1.0, STARTING),
        ("controller", 1.0, 10.0, WORKING),
        ("rollout-0", 1.0, 2.0, STARTING),
        ("rollout-0", 2.0, 5.0, JOINED),
        ("rollout-0", 5.0, 8.0, WORKING),
    ]


def test_a_picture_is_written(tmp_path: Path) -> None:
    story = Story().term(1.0, 1).joined(2.0, "rollout-0", 1).committed(3.0, 0).committed(9.0, 1)
    processes = [process("controller", 1, 0.0), process("rollout-0", 2, 1.0)]
    lines = [line(3.0, 0), line(9.0, 1)]
    marks = [Mark(4.0, 6.0, "rollout-0", "stop"), Mark(7.0, 7.0, "", "scaled")]
    draw("a run", story.timeline(), processes, lines, marks, [0.0, 6.0], tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
