"""What `orrery up` prints where there is no terminal: a line now and then, the end of each stage, every verdict.

Follows `metrics.jsonl` and `eval/*.json`; never talks to a service, so that showing cannot slow the run.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from deploy.cli import console
from deploy.cli.live.sources import StageView
from deploy.readers.evaluations import Evaluation, read_evaluations
from deploy.readers.lines import LineFollower

_PLAIN_EVERY_S = 5.0


class RunView:
    """The state of a run as far as its files tell; `look` reads what is new."""

    def __init__(self, run_folder: Path) -> None:
        self._metrics = LineFollower(run_folder / "metrics.jsonl")
        self._evaluations = run_folder / "eval"
        self._judged: set[tuple[str, int, int]] = set()

    def look(self) -> tuple[list[StageView], list[Evaluation]]:
        """What was added since the last look: the newest state of each stage that went on, and evaluations."""
        stages: dict[str, StageView] = {}
        for text in self._metrics.new():
            try:
                stage = StageView.of(json.loads(text))
            except (ValueError, KeyError, TypeError):
                continue  # a line that a full disk cut short
            stages[stage.name] = stage
        fresh = [e for e in read_evaluations(self._evaluations) if e.key not in self._judged]
        self._judged.update(e.key for e in fresh)
        return list(stages.values()), fresh


class PlainProgress:
    """Prints a RunView as plain lines; what an earlier supervisor has shown already is not shown again."""

    def __init__(self, run_folder: Path) -> None:
        self._view = RunView(run_folder)
        self._view.look()
        self._current: StageView | None = None
        self._printed: StageView | None = None
        self._last_line = time.monotonic()

    def refresh(self, *, final: bool = False) -> None:
        """Read what is new and print what is due of it; `final` prints where the stage in force has ended."""
        stages, judged = self._view.look()
        for stage in stages:
            if self._current is not None and self._current.name != stage.name:
                self._leave_stage()
            self._current = stage
            if time.monotonic() - self._last_line >= _PLAIN_EVERY_S:
                self._print(stage)
        if final:
            self._leave_stage()
        for evaluation in judged:
            console.out.print(verdict_line(evaluation))

    def _leave_stage(self) -> None:
        """Lines are thinned out, but each stage's last one is shown."""
        if self._current and self._current is not self._printed:
            self._print(self._current)

    def _print(self, stage: StageView) -> None:
        self._printed = stage
        self._last_line = time.monotonic()
        console.out.print(f"  {stage.name:<6} batch {stage.done}/{stage.batches}  {numbers(stage.line)}")


def verdict_line(evaluation: Evaluation) -> str:
    """One verdict for a person, with markup."""
    return (
        f"  held-out accuracy [bold green]{evaluation.text}[/] at version {evaluation.version}, "
        f"{evaluation.why} judgement"
    )


def numbers(line: dict[str, Any]) -> str:
    """The figures of one metrics line that a person watches; a figure that the stage does not have is left out."""
    wanted = (
        ("reward", "reward {:.3f}"),
        ("loss", "loss {:.4f}"),
        ("staleness_max", "staleness {:.0f}"),
        ("samples_per_s", "{:.1f} samples/s"),
    )
    skipped = ("reward", "staleness_max") if line.get("stage") == "sft" else ()
    present = [
        shape.format(line[key])
        for key, shape in wanted
        if isinstance(line.get(key), int | float) and key not in skipped
    ]
    return "  ".join(present)
