"""The live view: sparklines, and the panels as pure pictures of what is known."""

from __future__ import annotations

import io
import math
import threading
from pathlib import Path

import pytest
from rich.console import Console

from deploy.cli import console
from deploy.cli.live import display
from deploy.cli.live.panels import view
from deploy.cli.live.sources import Picture, Sources
from deploy.cli.live.sparklines import sparkline
from deploy.cli.progress import PlainProgress
from deploy.readers.figures import seconds_by_role
from deploy.report.words import duration
from tests.unit.deploy.runs import line, make_run, write_lines


def text_of(picture: Picture, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(view(picture, "a hint"))
    return console.file.getvalue()  # type: ignore[attr-defined]


def replica(name: str, **named: object) -> dict[str, object]:
    base: dict[str, object] = {"name": name, "role": name.partition("-")[0], "state": "ready", "incarnation": 1}
    base |= {"ranks": 1, "missing": []}
    return base | {"version": 3, "leases": 2, "doing": "generating", "heard_s": 0.4, "seconds": {}} | named


def status(**named: object) -> dict[str, object]:
    base: dict[str, object] = {"stage": "train", "batch": 10, "batches": 40, "term": 1, "stopping": "", "outcome": ""}
    return base | {"replicas": [replica("rollout-0")]} | named


def test_a_sparkline_spans_from_the_least_to_the_most() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0], 8) == "█▁"


def test_a_long_series_is_averaged_into_the_width() -> None:
    assert sparkline([0.0] * 50 + [1.0] * 50, 10) == "▁▁▁▁▁█████"
    assert len(sparkline([float(i) for i in range(1003)], 32)) == 32


@pytest.mark.parametrize(("values", "low", "shown"), [([2, 2], None, "▄▄"), ([0, 0], 0.0, "▁▁"), ([], None, "")])
def test_flat_and_empty_series_have_a_look_too(values: list[float], low: float | None, shown: str) -> None:
    assert sparkline(values, 5, low=low) == shown


def test_what_is_not_finite_is_left_out_of_a_sparkline() -> None:
    assert sparkline([0, math.nan, 1, math.inf], 8) == "▁█"


def test_a_replica_of_several_ranks_says_how_many_are_there() -> None:
    whole = replica("rollout-0", ranks=3)
    starting = replica("rollout-1", ranks=3, missing=[1, 2], state="joining")
    shown = text_of(Picture("run", status=status(replicas=[whole, starting])))
    assert "rollout-0 (3 ranks)" in shown
    assert "rollout-1 (1 of 3 ranks)" in shown


def test_the_view_says_how_fast_the_policy_trains_and_in_how_much_memory() -> None:
    picture = Picture("run", status=status())
    picture.lines.append(line(0, **{"machine/tokens_per_s": 8742.4, "machine/peak_memory_bytes": 1.54e9}))
    assert "policy 8742 tokens/s, 1.5 GB" in text_of(picture, 160)
    picture.lines.append(line(1, **{"machine/tokens_per_s": 9000.0, "machine/mfu": 0.413}))
    assert "policy 9000 tokens/s, 41 % MFU" in text_of(picture, 160)


def test_before_the_first_step_the_view_says_who_loads() -> None:
    picture = Picture("run", status=status(batch=None, replicas=[replica("policy-0", state="loading", version=None)]))
    assert "policy-0 loading the model" in text_of(picture)


def test_the_view_shows_progress_figures_times_and_replicas() -> None:
    picture = Picture("quickstart", status=status(replicas=[replica("rollout-0", incarnation=3)]))
    picture.lines.extend(line(step) for step in range(10))
    shown = text_of(picture)
    for words in ("quickstart", "a hint", "10/40 batches", "30 s left", "reward", "0.090", "16 samples/s"):
        assert words in shown
    assert "train 75 %" in shown and "wait 25 %" in shown
    (row,) = [text for text in shown.splitlines() if "rollout-0" in text]
    assert row.strip("│ ").split() == ["rollout-0", "ready", "generating", "3", "2", "0.4", "s", "2"]


def test_a_stage_of_worked_answers_shows_no_reward() -> None:
    picture = Picture("run")
    picture.lines.extend(line(step, stage="sft", reward=0.0) for step in range(3))
    shown = text_of(picture)
    assert "reward" not in shown and "loss" in shown


def test_figures_of_an_earlier_stage_are_not_mixed_in() -> None:
    picture = Picture("run")
    picture.lines.extend([line(0, stage="sft", loss=9.0), line(1, loss=0.5)])
    assert picture.series("loss") == [0.5]


def test_a_run_that_stops_says_so() -> None:
    picture = Picture("run", status=status(stopping="asked by a person"))
    picture.lines.append(line(9))
    assert "stopping after the batch in hand" in text_of(picture)


def test_the_time_left_follows_the_pace_of_the_last_batches() -> None:
    picture = Picture("run")
    assert picture.seconds_left() is None
    picture.lines.extend(line(step, time=10.0 * step) for step in range(4))
    assert picture.seconds_left() == pytest.approx(36 * 10.0)


def test_sources_read_a_run_folder_and_do_without_a_controller(tmp_path: Path) -> None:
    sources = Sources(make_run(tmp_path / "run"))
    sources.look()
    assert len(sources.picture.lines) == 40
    assert [e.correct for e in sources.picture.evaluations] == [20, 70]
    assert not sources.ask()
    write_lines(tmp_path / "run", [line(40)])
    sources.look()
    assert len(sources.picture.lines) == 41
    assert "accuracy sums" in text_of(sources.picture) and "70.0 %" in text_of(sources.picture)


def test_seconds_are_added_up_by_role_and_kind() -> None:
    lines = [{"time/policy/train": 1.0, "time/rollout/wait": 2.0, "time": 5.0}, {"time/policy/train": 0.5}]
    assert seconds_by_role(lines) == {"policy": {"train": 1.5}, "rollout": {"wait": 2.0}}


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations_are_said_as_a_person_would(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_controller_that_does_not_answer_is_shown_as_silent() -> None:
    shown = text_of(Picture("run", status=status(term=2), silent_s=7.3))
    (row,) = [text for text in shown.splitlines() if "controller" in text]
    assert row.strip("│ ").split() == ["controller", "silent", "term", "2", "7.3", "s", "1"]


def test_a_view_that_cannot_be_drawn_gives_way_to_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    terminal = Console(file=said, force_terminal=True, width=120, color_system=None, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "out", terminal)
    monkeypatch.setattr(display, "view", lambda *_: 1 / 0)
    monkeypatch.setattr(display, "LOOK_S", 0.01)
    failed = threading.Event()
    monkeypatch.setattr(display, "PlainProgress", lambda folder: failed.set() or PlainProgress(folder))
    with display.Display(tmp_path) as shown:
        shown.tell("before")
        assert failed.wait(20)
        shown.tell("after")
    places = [said.getvalue().index(words) for words in ("before", "failed (ZeroDivisionError", "after")]
    assert places == sorted(places)
