"""A run over time as a picture: its pace, and below it a lane for each process, with marks where something was done.

A lane is grey while a process starts (Python, imports), light while a replica loads or waits for weights, full while
it works, and empty while there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.live.run import ServiceProcess
from benchmarks.live.timeline import Timeline

STARTING, JOINED, WORKING = "#b0b0b0", "#f3c98b", "#4c9f70"
BIN_S = 5.0
ORDER = ("controller", "policy", "rollout", "evaluator")


@dataclass(frozen=True)
class Mark:
    """Something that was done `at` a time to a replica ("": to the run), until then (equal to `at`: at once)."""

    at: float
    until: float
    replica: str
    label: str


@dataclass(frozen=True)
class Span:
    """A stretch of a lane, from `start` to `end`, in one colour."""

    replica: str
    start: float
    end: float
    colour: str


def spans(timeline: Timeline, processes: Sequence[ServiceProcess], end: float) -> list[Span]:
    """The stretches of every lane. A process that never registered is one that starts until the next one does."""
    found = []
    for index, process in enumerate(processes):
        following = [
            p.started for p in processes[index + 1 :] if (p.replica, p.rank) == (process.replica, process.rank)
        ]
        until = min([*following, end])
        if process.replica == "controller":
            began = next((at for at, _ in timeline.terms if process.started <= at <= until), until)
            found += [
                Span(process.replica, process.started, began, STARTING),
                Span(process.replica, began, until, WORKING),
            ]
            continue
        lives = [life for life in timeline.lives if life.replica == process.replica]
        own = [life for life in lives if process.started <= life.joined <= until]
        joined = own[0].joined if own else until
        found.append(Span(process.replica, process.started, joined, STARTING))
        for life in own:
            gone = min(until if life.gone is None else life.gone, until)
            working = gone if life.working is None else min(life.working, gone)
            found += [Span(life.replica, life.joined, working, JOINED), Span(life.replica, working, gone, WORKING)]
    return [span for span in found if span.end > span.start]


def pace(lines: Sequence[Mapping[str, Any]], worth: Sequence[float], began: float) -> tuple[list[float], list[float]]:
    """(seconds since `began`, what the steps in it were worth, a second) in stretches of BIN_S."""
    sums: dict[int, float] = {}
    for line, each in zip(lines, worth, strict=True):
        place = int((line["time"] - began) / BIN_S)
        sums[place] = sums.get(place, 0.0) + each
    last = max(sums, default=0)
    return [(i + 0.5) * BIN_S for i in range(last + 1)], [sums.get(i, 0.0) / BIN_S for i in range(last + 1)]


def draw(
    title: str,
    timeline: Timeline,
    processes: Sequence[ServiceProcess],
    lines: Sequence[Mapping[str, Any]],
    marks: Sequence[Mark],
    undisturbed: Sequence[float] | None,
    path: Path,
) -> None:
    """Write the picture to `path`. `undisturbed`: the seconds that the step of each line took an undisturbed run.

    With them the pace is told as a share of that run's, without in steps a second.
    """
    matplotlib.use("Agg")
    began = min(process.started for process in processes)
    names = sorted({p.replica for p in processes}, key=lambda name: (ORDER.index(name.split("-")[0]), name))
    figure = Figure(figsize=(12, 3.0 + 0.32 * len(names)), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 0.4 + 0.32 * len(names)])
    above.set_title(title, fontsize=10)
    times, values = pace(lines, undisturbed or [1.0] * len(lines), began)
    above.plot(times, values, linewidth=1.2, color="C0")
    above.set_ylabel("pace (1: undisturbed)" if undisturbed else "steps a second", fontsize=9)
    if undisturbed:
        above.axhline(1.0, color="C1", linewidth=1.0)
    above.set_ylim(0, 1.4 * max([*values, 1e-9]))  # the labels of the marks stand above the curve
    for span in spans(timeline, processes, timeline.ended):
        below.barh(
            names.index(span.replica), span.end - span.start, left=span.start - began, color=span.colour, height=0.7
        )
    for mark in marks:
        for axis in (above, below):
            axis.axvline(mark.at - began, color="#c0392b", linewidth=0.7, alpha=0.6)
        if mark.replica in names:
            lane = names.index(mark.replica)
            if mark.until > mark.at:
                below.barh(lane, mark.until - mark.at, left=mark.at - began, height=0.35, color="#c0392b", alpha=0.55)
            below.plot(mark.at - began, lane, marker="x", color="#c0392b", markersize=7)
        above.annotate(
            mark.label, (mark.at - began, 1.0), xycoords=("data", "axes fraction"), fontsize=7, rotation=90,
            ha="right", va="top",
        )  # fmt: skip
    for colour, label in ((STARTING, "process starts"), (JOINED, "registered, loads"), (WORKING, "works")):
        below.barh(0, 0, color=colour, label=label)
    below.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1.0, -0.12), ncols=3, frameon=False)
    below.set_yticks(range(len(names)), names, fontsize=8)
    below.invert_yaxis()
    below.set_xlabel("seconds since the first process was started", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
