"""What `orrery up` shows while a run goes on: batches, rewards and held-out accuracy as the run folder tells them.

Follows `metrics.jsonl` and `eval/*.json`; never talks to a service, so that showing cannot slow the run. In a terminal
it is one bar a stage; elsewhere a plain line now and then.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from deploy.cli import console
from deploy.cli.evaluations import Evaluation, read_evaluations
from deploy.cli.follow import LineFollower

_PLAIN_EVERY_S = 5.0


@dataclass(frozen=True)
class StageView:
    """The stage in force: `done` of its `batches` are trained; `line` is its last one of metrics.jsonl."""

    name: str
    batches: int
    done: int
    line: dict[str, Any]


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
                line = json.loads(text)
                stage = StageView(str(line["stage"]), int(line["batches"]), int(line["batch"]), line)
            except (ValueError, KeyError, TypeError):
                continue  # a line that a full disk cut short
            stages[stage.name] = stage
        fresh = [e for e in read_evaluations(self._evaluations) if e.key not in self._judged]
        self._judged.update(e.key for e in fresh)
        return list(stages.values()), fresh


class ProgressDisplay:
    """Shows a RunView. Use as `with ProgressDisplay(folder) as display: display.refresh()` several times a second."""

    def __init__(self, run_folder: Path) -> None:
        self._view = RunView(run_folder)
        self._view.look()  # what an earlier supervisor has shown already
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._current: StageView | None = None
        self._printed: StageView | None = None
        self._last_plain = time.monotonic()
        if console.out.is_terminal:
            self._bars = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                console=console.out,
            )

    def __enter__(self) -> ProgressDisplay:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh(final=True)
        if self._bars:
            self._bars.stop()

    def refresh(self, *, final: bool = False) -> None:
        """Read what is new and show it."""
        stages, judged = self._view.look()
        for stage in stages:
            if self._current is None or self._current.name != stage.name:
                self._leave_stage()
            self._current = stage
            self._show_stage(stage)
        if final:
            self._leave_stage()
        for evaluation in judged:
            console.out.print(
                f"  held-out accuracy [bold green]{evaluation.text}[/] at version {evaluation.version}, "
                f"{evaluation.why} judgement"
            )

    def _leave_stage(self) -> None:
        """A plain display thins its lines out, but says where each stage ended."""
        if self._current and not self._bars and self._current is not self._printed:
            self._print(self._current)

    def _show_stage(self, stage: StageView) -> None:
        if self._bars:
            if stage.name not in self._tasks:
                self._tasks[stage.name] = self._bars.add_task(stage.name, total=stage.batches, numbers="")
            self._bars.update(self._tasks[stage.name], completed=stage.done, numbers=numbers(stage.line))
        elif time.monotonic() - self._last_plain >= _PLAIN_EVERY_S:
            self._print(stage)

    def _print(self, stage: StageView) -> None:
        self._printed = stage
        self._last_plain = time.monotonic()
        console.out.print(f"  {stage.name:<6} batch {stage.done}/{stage.batches}  {numbers(stage.line)}")


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
