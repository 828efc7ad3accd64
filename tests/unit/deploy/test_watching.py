"""What `orrery up` and `orrery logs` read from a run folder that is being written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.cli import logs as logs_command
from deploy.cli.progress import RunView, numbers
from deploy.readers.evaluations import before_and_after, read_evaluations
from deploy.readers.lines import LineFollower


def evaluation(folder: Path, lineage: int, version: int, stage: str, why: str, correct: int) -> None:
    folder.mkdir(exist_ok=True)
    verdict = {"suite": "held", "lineage": lineage, "version": version, "stage": stage, "n": 100, "why": why}
    verdict |= {"correct": correct, "accuracy": correct / 100, "interval": [0.1, 0.2]}
    (folder / f"{lineage}-{version}.json").write_text(json.dumps(verdict))


def test_a_line_is_read_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = LineFollower(path)
    assert list(lines.new()) == []
    path.write_text("one\ntw")
    assert list(lines.new()) == ["one"]
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert list(lines.new()) == ["two", "three"]
    assert list(lines.new()) == []


def test_a_torn_line_that_its_writer_cuts_off_is_never_seen(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("one\n{to")
    lines = LineFollower(path)
    assert list(lines.new()) == ["one"]
    path.write_text("one\ntwo\n")
    assert list(lines.new()) == ["two"]


def test_a_follower_from_the_end_leaves_out_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("old\n")
    lines = LineFollower(path, at_end=True)
    with path.open("a") as file:
        file.write("new\n")
    assert list(lines.new()) == ["new"]


def test_progress_counts_the_batches_of_each_stage(tmp_path: Path) -> None:
    view = RunView(tmp_path)
    assert view.look() == ([], [])
    steps = [("sft", 1, 30), ("sft", 2, 30), ("train", 1, 10)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for stage, batch, batches in steps:
            file.write(json.dumps({"stage": stage, "batch": batch, "batches": batches}) + "\n")
        file.write("{torn\n")
    stages, _ = view.look()
    assert [(stage.name, stage.done, stage.batches) for stage in stages] == [("sft", 2, 30), ("train", 1, 10)]
    assert view.look() == ([], [])


def test_each_evaluation_is_shown_once(tmp_path: Path) -> None:
    view = RunView(tmp_path)
    evaluation(tmp_path / "eval", 0, 0, "sft", "first", 3)
    assert [e.version for e in view.look()[1]] == [0]
    evaluation(tmp_path / "eval", 0, 5, "sft", "rule", 30)
    (tmp_path / "eval" / "half.json").write_text('{"suite":')
    assert [e.version for e in view.look()[1]] == [5]


def test_before_is_where_rl_began_and_after_is_the_last_version(tmp_path: Path) -> None:
    evaluation(tmp_path, 0, 0, "sft", "first", 2)
    evaluation(tmp_path, 0, 40, "train", "first", 38)
    evaluation(tmp_path, 0, 100, "train", "periodic", 55)
    evaluation(tmp_path, 1, 90, "closing", "last", 60)
    found = before_and_after(read_evaluations(tmp_path), rl=True)
    assert [e.correct for e in found] == [38, 60]
    assert found[1].text == "60.0 % [10.0, 20.0] (n = 100)"
    assert [e.correct for e in before_and_after(read_evaluations(tmp_path), rl=False)] == [2, 60]


def test_rl_that_begins_with_the_version_that_ended_sft_takes_over_its_verdict(tmp_path: Path) -> None:
    evaluation(tmp_path, 0, 20, "sft", "rule", 12)
    evaluation(tmp_path, 0, 30, "sft", "rule", 36)
    evaluation(tmp_path, 0, 50, "train", "periodic", 50)
    assert [e.correct for e in before_and_after(read_evaluations(tmp_path), rl=True)] == [36, 50]


def test_before_and_after_need_two_verdicts(tmp_path: Path) -> None:
    assert before_and_after(read_evaluations(tmp_path), rl=True) == []
    evaluation(tmp_path, 0, 20, "sft", "rule", 12)
    assert [e.correct for e in before_and_after(read_evaluations(tmp_path), rl=True)] == [12]


def test_supervised_steps_show_no_reward() -> None:
    line = {"stage": "sft", "reward": 0.0, "loss": 1.5, "staleness_max": 0, "samples_per_s": 10.0}
    assert numbers(line) == "loss 1.5000  10.0 samples/s"
    assert numbers(line | {"stage": "train", "loss": None}) == "reward 0.000  staleness 0  10.0 samples/s"


def test_logs_of_all_services_are_one_story_in_the_order_of_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = tmp_path / "run", tmp_path / "run" / "logs"
    folder.mkdir(parents=True)
    (run / "config.toml").touch()
    for replica, seconds in (("controller", (1, 3)), ("rollout-0", (2, 4))):
        lines = [
            {"time": f"2026-01-01T00:00:0{s}.000000Z", "level": "info", "event": f"event {s} [x]", "replica": replica}
            for s in seconds
        ]
        (folder / f"{replica}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{cut\n")
    logs_command.logs(str(run))
    shown = capsys.readouterr().out
    assert [int(word) for word in shown.split() if word in "1234"] == [1, 2, 3, 4]
    assert shown.count("[x]") == 4
    logs_command.logs(str(run), service="rollout")
    assert "controller" not in capsys.readouterr().out
