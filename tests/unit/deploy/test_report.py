"""What is left of a run for a person: the story read from its folder, hints, samples, page."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from deploy.cli.report import summarise
from deploy.readers.samples import newest, read_samples
from deploy.report.curves import smoothed
from deploy.report.hints import hints, slope
from deploy.report.make import make_report
from deploy.report.story import Stage, Story, read_story, typical
from deploy.report.words import stage_lines
from tests.unit.deploy.runs import line, make_run, write_group, write_lines, write_verdict


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run-1")


def story_of(run: Path, lines: list[dict[str, object]]) -> Story:
    """The run's story with other metrics."""
    (run / "metrics.jsonl").unlink()
    write_lines(run, lines)
    return read_story(run)


def test_a_story_has_stages_verdicts_and_the_accuracy_before_and_after(run: Path) -> None:
    story = read_story(run)
    (stage,) = story.stages
    assert (stage.name, stage.done, stage.batches) == ("train", 40, 40)
    assert [(v.step, v.evaluation.correct) for v in story.verdicts] == [(0, 20), (40, 70)]
    assert [e.correct for e in story.before_after["sums"]] == [20, 70]


def test_a_run_without_anything_in_it_has_a_story_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "whole")
    for path in (folder / "metrics.jsonl", *(folder / "eval").iterdir(), *(folder / "samples").iterdir()):
        path.unlink()
    story = read_story(folder)
    assert (story.stages, story.verdicts, story.samples) == ([], [], [])
    assert "No step was committed" in make_report(folder).page.read_text()


def test_a_step_that_was_trained_again_counts_once_with_its_newest_lineage(run: Path) -> None:
    story = story_of(run, [*[line(s) for s in range(10)], *[line(s, lineage=2, loss=5.0) for s in range(7, 9)]])
    steps, losses = story.stages[0].series("loss")
    assert steps == list(range(9))
    assert losses[7:] == [5.0, 5.0]


def test_pace_and_shares_of_time_come_from_the_lines() -> None:
    stage = Stage("train", [line(step) for step in range(11)], 40)
    assert stage.seconds == pytest.approx(10.5)
    assert stage.samples_per_s == pytest.approx(11 * 16 / 10.5)
    assert stage_lines(stage) == ["11/40 batches in 10 s, 16.8 samples/s", "policy: train 75 %, wait 25 %"]


def test_the_machines_figures_of_a_stage_are_the_mean_pace_and_the_most_memory() -> None:
    figures = [(800.0, 0.3, 1e9), (1000.0, 0.5, 2e9)]
    names = ("machine/tokens_per_s", "machine/mfu", "machine/peak_memory_bytes")
    lines = [line(step, **dict(zip(names, values, strict=True))) for step, values in enumerate(figures)]
    assert stage_lines(Stage("train", lines, 40))[1] == "while it trains: 900 tokens/s, 40 % MFU, 2.0 GB"


def test_a_slope_is_known_with_its_error() -> None:
    rate, error = slope([0.5 * x for x in range(20)])
    assert rate == pytest.approx(0.5) and error == pytest.approx(0.0, abs=1e-9)
    assert slope([1.0, 2.0]) == (0.0, math.inf)


HINTS = {
    "rising": ([line(s) for s in range(40)], "reward was still rising"),
    "falling": ([line(s, reward=1 - 0.01 * s) for s in range(40)], "reward fell"),
    "truncated": ([line(s, reward=0.5, truncated=0.2) for s in range(40)], "raise rollout.max_new_tokens"),
    "too easy": (
        [line(s, reward=0.9, **{"discarded/equal_rewards": 800}) for s in range(40)],
        "83 % of the prompt groups had equal rewards and taught nothing: harder data",
    ),
    "too hard": ([line(s, reward=0.1, **{"discarded/equal_rewards": 800}) for s in range(40)], "easier data"),
    "clipped": ([line(s, reward=0.5, clip_share=0.4) for s in range(40)], "40 % of the tokens were clipped"),
    "mismatch": ([line(s, reward=0.5, mismatch_kl=0.1) for s in range(40)], "engine and trainer disagree"),
    "entropy": ([line(s, reward=0.5, entropy=2.0 if s < 20 else 0.01) for s in range(40)], "entropy fell"),
    "waiting": ([line(s, reward=0.5, **{"time/policy/wait": 5.0}) for s in range(40)], "policy waited 87 %"),
    "idle rollouts": (
        [line(s, reward=0.5, **{"time/rollout/wait": 3.0, "time/rollout/generate": 1.0}) for s in range(40)],
        "train.max_staleness 2 (now 1)",
    ),
    "slow rewards": (
        [line(s, reward=0.5, **{"time/rollout/reward": 3.0, "time/rollout/generate": 1.0}) for s in range(40)],
        "more rewards.workers (now 1)",
    ),
    "early": ([line(s, reward=0.5) for s in range(10)], "ended at batch 10 of 40: 'orrery resume run-1'"),
}


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_follows_from_the_figures(run: Path, name: str) -> None:
    lines, words = HINTS[name]
    assert any(words in hint for hint in hints(story_of(run, lines)))


def test_an_even_run_gets_no_hint_that_its_figures_do_not_carry(run: Path) -> None:
    story = story_of(run, [line(s, reward=0.5 + 0.01 * (-1) ** s) for s in range(40)])
    assert hints(story) == [
        "nothing stands out in the figures: a longer run, another seed, or a harder suite would tell more"
    ]


def test_an_accuracy_within_its_interval_asks_for_more_problems(run: Path) -> None:
    write_verdict(run, 40, 22, "last", "closing")
    assert any(
        "judge more rows ([evaluation.suites.sums] problems, now 100)" in hint for hint in hints(read_story(run))
    )


def test_of_a_group_that_was_sampled_twice_the_newest_attempt_is_shown(run: Path) -> None:
    write_group(run, 3, [0.25], attempt=2)
    write_group(run, 99, [1.0], purpose="eval")
    with (run / "samples" / "rollout-0.jsonl").open("a") as file:
        file.write('{"group": 5, "torn')
    samples = newest(read_samples(run), "train")
    assert [s.completion for s in samples if s.group == 3] == ["answer 3.0 of attempt 2"]
    assert {s.group for s in samples} == set(range(1, 9))
    assert [s.group for s in newest(read_samples(run), "eval")] == [99]


def test_three_samples_stand_for_all(run: Path) -> None:
    picked = typical(read_story(run).samples)
    assert [title for title, _ in picked] == ["best", "middle", "worst"]
    assert [sample.reward for _, sample in picked][::2] == [1.0, 0.0]
    assert typical([]) == []


def test_the_page_needs_nothing_else_and_trusts_no_text(run: Path) -> None:
    write_group(run, 50, [0.9])
    path = run / "samples" / "rollout-0.jsonl"
    path.write_text(path.read_text().replace("<ask>", "<script>alert(1)</script>"))
    made = make_report(run)
    page = made.page.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    outside = re.findall(r"""(?:src|href)=["']?(?!#|data:)([^"'> ]+)""", page)
    assert outside == []
    assert "<svg" in page and "70.0 % [60.0, 80.0] (n = 100)" in page and "config.toml" in page
    assert made.curves is not None and made.curves.read_bytes().startswith(b"\x89PNG")


def test_a_report_is_made_without_curves_where_nothing_can_draw(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    made = make_report(run)
    assert made.curves is None and "pip install" in made.missing
    assert "They need matplotlib" in made.page.read_text()


def test_the_summary_tells_accuracy_time_samples_and_what_to_try(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summarise(run, 0)
    said = capsys.readouterr().out
    order = [
        "before",
        "after",
        "train   40/40",
        "policy: train 75 %",
        "best",
        "worst",
        "next",
        "audit",
        "curves",
        "report",
    ]
    places = [said.index(word) for word in order]
    assert places == sorted(places)


def test_a_run_that_was_stopped_says_how_to_go_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summarise(run, 130)
    assert "interrupted; 'orrery resume run-1' goes on" in capsys.readouterr().out


def test_a_folder_that_cannot_be_read_ends_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summarise(tmp_path / "nothing", 1)
    said = capsys.readouterr()
    assert "no report could be made" in said.err and "Traceback" not in said.err


def test_smoothing_starts_where_the_values_do() -> None:
    assert smoothed([1.0, 1.0]) == [1.0, 1.0]
    assert smoothed([]) == []
