"""`python -m benchmarks.elastic` (`make elastic`): a run grows and shrinks while it trains.

Begins with one policy and one rollout, is scaled to three of each by `orrery scale` after a third of its batches and
back to one of each after another third; nobody waits for anything. Draws throughput and membership over time, and
tells the pace with each fleet. Ends with 0 when the run did all its steps, with clean books and equal policies, and
had as many replicas at work as it was scaled to. Writes `results/elastic.{json,md}` and a picture.

On one machine more replicas share the same cores: the picture shows that nothing is lost, not that more is faster.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.live.goodput import newest, read_metrics
from benchmarks.live.picture import Mark, draw
from benchmarks.live.recipe import add_options, fleet_of, folder_of
from benchmarks.live.run import LiveRun, ServiceProcess, leave_nothing_behind
from benchmarks.live.timeline import Life, Timeline, read_timeline
from benchmarks.live.verdict import judge
from benchmarks.live.watch import Watch
from benchmarks.machine import describe_machine, load_average, write_results

LOOK_S = 0.1


@dataclass(frozen=True)
class Scaled:
    """`orrery scale` took effect `at` a time (seconds since the epoch): so many policies and rollouts are wanted."""

    at: float
    policies: int
    rollouts: int


@dataclass(frozen=True)
class Phase:
    """Between two scalings, in seconds and a second; `reached_s`: until so many replicas were at work."""

    policies: int
    rollouts: int
    seconds: float
    steps_per_s: float
    samples_per_s: float
    reached_s: float | None


def main() -> int:
    """One run, report."""
    given = _options()
    leave_nothing_behind()
    folder = folder_of(given, "elastic")
    kept = folder / "run.json"
    if given.collect is None:
        with LiveRun(folder / "run") as run:
            run.up(given.recipe, [*fleet_of(given), f"train.batches={given.batches}"])
            with Watch(run) as watch:
                scale_at_thirds(run, given)
                run.wait(given.limit)
                kept.write_bytes(msgspec.json.encode(watch.seen))
    processes = msgspec.json.decode(kept.read_bytes(), type=list[ServiceProcess])
    result = report(folder / "run", processes, given)
    write_results(given.results, "elastic", result, as_markdown(result))
    print(f"the run is in {folder}")
    return 1 if result["faults"] else 0


def scale_at_thirds(run: LiveRun, given: argparse.Namespace) -> None:
    """Grow after a third of the batches of RL, shrink after two."""
    plan = ((1, given.to_policies, given.to_rollouts), (2, given.policies, given.rollouts))
    for third, policies, rollouts in plan:
        wanted = third * given.batches // 3
        deadline = time.monotonic() + given.limit
        while _trained(run) < wanted:
            run.check_alive(f"batch {wanted}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"batch {wanted} was not reached within {given.limit:g} s:\n{run.tail()}")
            time.sleep(LOOK_S)
        print(run.orrery("scale", f"policy={policies}", f"rollout={rollouts}", "--run", str(run.folder)).strip())


def report(folder: Path, processes: Sequence[ServiceProcess], given: argparse.Namespace) -> dict[str, Any]:
    """Read what the run left; the picture goes to the results."""
    timeline, lines = read_timeline(folder), read_metrics(folder)
    verdict = judge(folder, timeline)
    train = [line for line in newest(lines) if line["stage"] == "train"]
    scaled = [Scaled(train[0]["time"], given.policies, given.rollouts), *scalings(timeline)]
    found = phases(scaled, train, timeline)
    faults = [*verdict.faults]
    if len(found) != 3:
        faults.append(f"expected two scalings in the journal, got {len(found) - 1}")
    for phase in found:
        if phase.reached_s is None:
            faults.append(f"the fleet of {phase.policies} + {phase.rollouts} was never at work")
    most = max((it.policies for it in scaled), default=0)
    if most > 1 and verdict.compared < most:
        faults.append(f"expected {most} policies to be compared at a checkpoint, got at most {verdict.compared}")
    draw(
        "the fleet grows and shrinks while it trains",
        timeline,
        processes,
        lines,
        [Mark(it.at, it.at, "", f"scaled to {it.policies} + {it.rollouts}") for it in scaled[1:]],
        None,
        given.results / "elastic.png",
    )
    return {
        "machine": describe_machine(),
        "load_average": load_average(),
        "overrides": fleet_of(given),
        "batches": given.batches,
        "phases": [asdict(phase) for phase in found],
        "scaled": [asdict(it) for it in scaled],
        "faults": faults,
        "verdict": asdict(verdict),
    }


def scalings(timeline: Timeline) -> list[Scaled]:
    """When the controller took each `orrery scale`, which names both roles."""
    orders = [(at, order["replicas"]) for at, order in timeline.steered if order["type"] == "scale_fleet"]
    return [Scaled(at, replicas["policy"], replicas["rollout"]) for at, replicas in orders]


def phases(scaled: Sequence[Scaled], train: Sequence[Mapping[str, Any]], timeline: Timeline) -> list[Phase]:
    """The pace of RL between scalings. Samples: each line's rate over the time that it was taken over."""
    found = []
    for index, it in enumerate(scaled):
        end = scaled[index + 1].at if index + 1 < len(scaled) else train[-1]["time"]
        within = [i for i, line in enumerate(train) if i and it.at < line["time"] <= end]
        samples = sum(train[i]["samples_per_s"] * (train[i]["time"] - train[i - 1]["time"]) for i in within)
        found.append(
            Phase(
                it.policies,
                it.rollouts,
                end - it.at,
                len(within) / (end - it.at),
                samples / (end - it.at),
                reached(it, end, timeline.lives),
            )
        )
    return found


def reached(scaled: Scaled, end: float, lives: Sequence[Life]) -> float | None:
    """Seconds until exactly so many replicas of both roles were at work; None if that never was."""
    moments = {scaled.at, *(at for life in lives for at in (life.working, life.gone) if at is not None)}
    for at in sorted(moments):
        if scaled.at <= at <= end and members(lives, at) == (scaled.policies, scaled.rollouts):
            return at - scaled.at
    return None


def members(lives: Sequence[Life], at: float) -> tuple[int, int]:
    """How many policies and rollouts are at work at a time."""
    working = [
        life.replica.split("-")[0]
        for life in lives
        if life.working is not None and life.working <= at and (life.gone is None or life.gone > at)
    ]
    return working.count("policy"), working.count("rollout")


def as_markdown(result: dict[str, Any]) -> str:
    """The table of the results file."""
    verdict = result["verdict"]
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}. "
        f"{result['batches']} batches of RL; scaled after each third, while training went on. "
        "All replicas share the machine's cores.",
        "",
        "| policies + rollouts | seconds | steps a second | samples a second | at work after |",
        "|---|---|---|---|---|",
    ]
    for it in result["phases"]:
        after = "never" if it["reached_s"] is None else f"{it['reached_s']:.1f} s"
        lines.append(
            f"| {it['policies']} + {it['rollouts']} | {it['seconds']:.0f} | {it['steps_per_s']:.2f} | "
            f"{it['samples_per_s']:.1f} | {after} |"
        )
    lines += [
        "",
        f"{sum(verdict['steps'].values())} steps, {verdict['trained']} prompt groups trained on, "
        f"{verdict['rollbacks']} rollbacks; policies compared at {verdict['comparisons']} checkpoints, "
        f"up to {verdict['compared']} at once.",
        *(f"FAULT: {fault}" for fault in result["faults"]),
        "```",
        *verdict["audit"],
        "```",
    ]
    return "\n".join(lines) + "\n"


def _trained(run: LiveRun) -> int:
    """Batches of RL so far; 0 while there is no metrics.jsonl."""
    if not run.committed():
        return 0
    return max((line["batch"] for line in read_metrics(run.folder) if line["stage"] == "train"), default=0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic", description="A run that grows and shrinks.")
    add_options(parser, policies=1, rollouts=1, evaluators=0)
    parser.add_argument("--to-policies", type=int, default=3, help="policies that the run grows to")
    parser.add_argument("--to-rollouts", type=int, default=3, help="rollouts that the run grows to")
    parser.add_argument("--batches", type=int, default=240, help="batches of RL")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
