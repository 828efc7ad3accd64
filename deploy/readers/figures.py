"""From metrics lines and verdicts to named numbers: which keys are figures, and at which step a verdict is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deploy.readers.evaluations import Evaluation

NOT_FIGURES = frozenset({"time", "step", "stage", "batches", "batch"})
"""Keys of a metrics line that say where it is, and not what was measured."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A verdict and the optimizer step that its version was made by."""

    evaluation: Evaluation
    step: int
    at: float

    @property
    def values(self) -> dict[str, float]:
        """Accuracy and its interval, by name."""
        it = self.evaluation
        return {
            f"accuracy/{it.suite}": it.correct / it.n,
            f"accuracy_low/{it.suite}": it.low,
            f"accuracy_high/{it.suite}": it.high,
        }


def figures(line: Line) -> dict[str, float]:
    """The numbers of a metrics line, by name; sft and train figures of one name stay apart by the stage's prefix."""
    prefix = f"{line.get('stage', 'run')}/"
    return {
        prefix + name: float(value)
        for name, value in line.items()
        if name not in NOT_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)
        and math.isfinite(value)
    }  # fmt: skip


class StepOfVersion:
    """Which step made a version: lines tell the version that their step started from."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, int], tuple[int, float]] = {}
        self._next: tuple[int, float] = (0, 0.0)

    def take(self, lines: Iterable[Line]) -> None:
        """Further lines, in order."""
        for line in lines:
            self._first.setdefault((line["lineage"], line["version"]), (line["step"], line["time"]))
            self._next = line["step"] + 1, line["time"]

    def of(self, evaluation: Evaluation) -> Verdict:
        """The verdict at its step: that of the first line which started from its version, else the next one."""
        step, at = self._first.get((evaluation.lineage, evaluation.version), self._next)
        return Verdict(evaluation, step, at)


def seconds_by_role(lines: Iterable[Line]) -> dict[str, dict[str, float]]:
    """Role -> kind of work -> seconds, added up over the `time/ROLE/KIND` figures of metrics lines."""
    spent: dict[str, dict[str, float]] = {}
    for line in lines:
        for name, value in line.items():
            words = name.split("/")
            if len(words) == 3 and words[0] == "time" and isinstance(value, int | float):
                of_role = spent.setdefault(words[1], {})
                of_role[words[2]] = of_role.get(words[2], 0.0) + value
    return spent
