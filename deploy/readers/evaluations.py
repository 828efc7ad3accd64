"""Held-out accuracy as `eval/*.json` records it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Evaluation:
    """One judged version: `correct` of `n` held-out rows, with the 95 % Wilson interval of the share."""

    suite: str
    lineage: int
    version: int
    stage: str
    n: int
    correct: float
    low: float
    high: float
    why: str

    @property
    def key(self) -> tuple[str, int, int]:
        """What was judged."""
        return self.suite, self.lineage, self.version

    @property
    def text(self) -> str:
        """ "43.5 % [38.1, 49.0] (n = 200)"."""
        return f"{100 * self.correct / self.n:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] (n = {self.n})"


def read_evaluations(folder: Path) -> list[Evaluation]:
    """All evaluations of a run, oldest first; a file that is not one (yet) is passed over."""
    found = []
    for path in folder.glob("*.json"):
        try:
            it = json.loads(path.read_text(encoding="utf-8"))
            low, high = it["interval"]
            found.append(
                Evaluation(
                    it["suite"], it["lineage"], it["version"], it["stage"], it["n"], it["correct"], low, high, it["why"]
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda e: (e.lineage, e.version))


def before_and_after(evaluations: Sequence[Evaluation], *, rl: bool) -> list[Evaluation]:
    """What RL began with and the newest verdict; without RL the first and the newest. Fewer where fewer were judged.

    RL begins with a verdict of its own, or with SFT's last one if that judged the same version.
    """
    if not evaluations:
        return []
    fresh = [e for e in evaluations if e.stage == "train" and e.why == "first"]
    taken = [e for e in evaluations if e.stage == "sft"][-1:]
    first = ((fresh or taken) if rl else [])[:1] or [evaluations[0]]
    return first if first[0] == evaluations[-1] else [first[0], evaluations[-1]]
