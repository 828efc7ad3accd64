"""Goodput: how long a run's steps would have taken at the pace of an undisturbed run, over how long they took.

Each stage has its own pace, and steps that a rollback took back and that were trained again count once. With s steps
in a stage, p undisturbed steps a second in it, and T seconds from the run's first commit to its last one,

    goodput = sum over stages (s / p) / T
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Pace:
    """A stage: `steps` after its first one took `seconds`, and trained `samples` with `tokens` response tokens."""

    steps: int
    seconds: float
    samples: float
    tokens: float

    @property
    def steps_per_s(self) -> float:
        """Steps a second."""
        return self.steps / self.seconds


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def newest(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The line of each step in the newest lineage that has it, by step."""
    steps: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        if line["step"] not in steps or line["lineage"] >= steps[line["step"]]["lineage"]:
            steps[line["step"]] = line
    return [steps[step] for step in sorted(steps)]


def paces(lines: Sequence[Mapping[str, Any]]) -> dict[str, Pace]:
    """The pace of each stage of an undisturbed run, from the commit of its first step to that of its last."""
    found = {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = [line for line in lines if line["stage"] == stage]
        seconds = own[-1]["time"] - own[0]["time"]
        if len(own) < 2 or seconds <= 0:
            raise ValueError(f"stage {stage}: expected at least two steps to tell a pace from, got {len(own)}")
        later = own[1:]
        # samples_per_s is the step's samples over the time since the last commit
        samples = sum(
            line["samples_per_s"] * (line["time"] - before["time"]) for before, line in zip(own, later, strict=False)
        )
        found[stage] = Pace(len(later), seconds, samples, float(sum(line["tokens"] for line in later)))
    return found


def goodput(undisturbed: Mapping[str, Pace], lines: Sequence[Mapping[str, Any]]) -> float:
    """As in the module's docstring. ValueError for a stage that the undisturbed run did not have."""
    steps = newest(lines)
    taken = max(line["time"] for line in steps) - min(line["time"] for line in lines)
    expected = 0.0
    for line in steps[1:]:
        if line["stage"] not in undisturbed:
            raise ValueError(f"stage {line['stage']}: the undisturbed run has no pace for it")
        expected += 1 / undisturbed[line["stage"]].steps_per_s
    return expected / taken
