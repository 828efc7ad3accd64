"""The report of `make chaos`: a table a person can read, beside the figures in JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.chaos.recovery import Recovery, median_apart
from benchmarks.live.verdict import Verdict

COLUMNS = ("detect", "restart", "re-mesh", "redo", "next commit", "restart apart", "longest pause", "back in work")
LEGEND = (
    "All times in seconds from the run's own journal (and the kernel's process table for the start of a process). "
    "*Detect*: until the journal says that the replica is gone (the controller: until its next process was started); "
    '"-": it was back before anybody gave it up. *Restart*: from the start of the new process until it registered: '
    "Python and its imports. *Re-mesh*: forming the first process group that the replica was in again. *Redo*: from "
    "the abort of the step in hand (or the rollback, marked R) until that step was committed. *Next commit*: from the "
    "fault (the beginning of a stop or partition) until the next committed step; *restart apart*: the same without the "
    "restart, where training had to wait for it; the first table has its medians. *Longest pause*: the longest time "
    "without a committed step between this fault and the next one, restarts and all. *Back in work*: until the replica "
    "was given work again."
)


@dataclass(frozen=True)
class SeedReport:
    """One seed: what was asked, what was done, what it cost, and whether the run came through."""

    seed: int
    planned: int
    recoveries: list[Recovery]
    goodput: float
    verdict: Verdict

    @property
    def faults(self) -> list[str]:
        """What speaks against the run, faults that could not be done included."""
        missing = self.planned - len(self.recoveries)
        late = [f"{missing} of {self.planned} faults were not done: the run was over, or nobody was there"] * (
            missing > 0
        )
        return [*self.verdict.faults, *late]


def as_markdown(result: dict[str, Any], seeds: Sequence[SeedReport]) -> str:
    """The whole table."""
    stages = ", ".join(f"{pace:.2f} steps a second in {name}" for name, pace in result["paces"].items())
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}. "
        f"`{result['recipe']}` with {result['fleet']}, a fault about every {result['every_s']:g} s. "
        f"Undisturbed, in the same invocation: {stages}; its longest pause was {result['undisturbed_pause_s']:.2f} s.",
        "",
        "| seed | faults | goodput | from kill to next commit, restart apart | the same, all faults | steps "
        "| rollbacks | policies compared | came through |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for it in seeds:
        verdict = it.verdict
        kills, all_of_them = _seconds(median_apart(it.recoveries, ["kill"])), _seconds(median_apart(it.recoveries))
        compared = (
            f"{verdict.comparisons} times, up to {verdict.compared} at once" if verdict.comparisons else "one only"
        )
        lines.append(
            f"| {it.seed} | {len(it.recoveries)} | {100 * it.goodput:.0f} % | {kills} s | {all_of_them} s | "
            f"{sum(verdict.steps.values())} | {verdict.rollbacks} | {compared} | {'no' if it.faults else 'yes'} |"
        )
    for it in seeds:
        lines += [
            "",
            f"Seed {it.seed}:",
            "",
            "| fault | " + " | ".join(COLUMNS) + " |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        lines += [_row(recovery) for recovery in it.recoveries]
        lines.append(_medians(it.recoveries))
        lines += ["", *(f"FAULT: {fault}" for fault in it.faults), "```", *it.verdict.audit, "```"]
    return "\n".join([*lines, "", LEGEND]) + "\n"


def _row(it: Recovery) -> str:
    redo = _seconds(it.redo_s) + (" R" if it.rolled_back else "")
    times = [it.detect_s, it.restart_s, it.remesh_s, it.commit_s, it.apart_s, it.pause_s, it.back_s]
    detect, restart, remesh, commit, apart, pause, back = map(_seconds, times)
    return f"| {it.name} | " + " | ".join((detect, restart, remesh, redo, commit, apart, pause, back)) + " |"


def _medians(found: Sequence[Recovery]) -> str:
    names = ("detect_s", "restart_s", "remesh_s", "redo_s", "commit_s", "apart_s", "pause_s", "back_s")
    cells = []
    for name in names:
        values = [value for it in found if (value := getattr(it, name)) is not None]
        cells.append(_seconds(statistics.median(values) if values else None))
    return "| **median** | " + " | ".join(cells) + " |"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
