"""Goodput: how long a run's steps took an undisturbed run, over how long they took.

The pace changes as a run learns: groups whose answers are all right teach nothing, so that more are drawn for a step.
So each step is held against the one with the same number in the same stage. Steps that a rollback took back and that
were trained again count once. With d(s, i) the undisturbed time of step i of stage s since the commit before it, n(s)
steps in stage s, and T the time from the run's first commit to its last one,

    goodput = sum over stages s, and i < n(s), of d(s, i) / T

where steps beyond the undisturbed run's (a stop rule may end a stage later) count with that stage's mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def newest(lines: Iterable[Line]) -> list[Line]:
    """The line of each step in the newest lineage that has it, by step."""
    steps: dict[int, Line] = {}
    for line in lines:
        if line["step"] not in steps or line["lineage"] >= steps[line["step"]]["lineage"]:
            steps[line["step"]] = line
    return [steps[step] for step in sorted(steps)]


def paces(lines: Sequence[Line]) -> dict[str, float]:
    """Steps a second of each stage of an undisturbed run, from the commit of its first step to that of its last."""
    found = {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = [line["time"] for line in lines if line["stage"] == stage]
        if len(own) < 2 or own[-1] <= own[0]:
            raise ValueError(f"stage {stage}: expected at least two steps to tell a pace from, got {len(own)}")
        found[stage] = (len(own) - 1) / (own[-1] - own[0])
    return found


def undisturbed_seconds(undisturbed: Sequence[Line], lines: Sequence[Line]) -> list[float]:
    """For each line, what its step took the undisturbed run, in seconds; the run's first step counts nothing.

    ValueError for a stage that the undisturbed run did not have.
    """
    known: dict[str, list[float]] = {}
    for before, line in pairwise([undisturbed[0], *undisturbed]):
        known.setdefault(line["stage"], []).append(line["time"] - before["time"])
    if missing := {line["stage"] for line in lines} - known.keys():
        raise ValueError(f"stage {', '.join(sorted(missing))}: the undisturbed run did not come to it")
    first = {stage: min((line["step"] for line in lines if line["stage"] == stage), default=0) for stage in known}
    found = []
    for line in lines:
        own, number = known[line["stage"]], line["step"] - first[line["stage"]]
        found.append(own[number] if number < len(own) else sum(own) / len(own))
    return found


def goodput(undisturbed: Sequence[Line], lines: Sequence[Line]) -> float:
    """As in the module's docstring. ValueError for a stage that the undisturbed run did not have."""
    taken = max(line["time"] for line in lines) - min(line["time"] for line in lines)
    return sum(undisturbed_seconds(undisturbed, newest(lines))) / taken
