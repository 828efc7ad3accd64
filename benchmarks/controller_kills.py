"""`python -m benchmarks.controller_kills --kills 20` (`make controller-kills`): one run, its controller killed often.

The recipe runs undisturbed, then with its controller killed (SIGKILL) `--kills` times, evenly over its length. A kill
waits until the term before it has committed a step. Both runs must do the same steps and consume the same number of
prompt groups that were drawn for training, with clean books; nobody else may be started again. Prints the median
outage: from the kill until the next term answers, and until the next committed step. Writes
`results/controller_kills.{json,md}` and a picture.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.live.goodput import goodput, read_metrics, undisturbed_seconds
from benchmarks.live.picture import Mark, draw
from benchmarks.live.recipe import add_options, describe, fleet_of, folder_of
from benchmarks.live.run import LiveRun, ServiceProcess, leave_nothing_behind
from benchmarks.live.timeline import Timeline, read_timeline
from benchmarks.live.verdict import Verdict, judge
from benchmarks.live.watch import Watch
from benchmarks.machine import describe_machine, load_average, write_results

CONTROLLER = "controller"
LOOK_S = 0.05


@dataclass(frozen=True)
class Outage:
    """Seconds from one kill: until the next process starts, until its term begins, until all are back, until a commit.

    `python_s` is the part from the start of the process until its term began.
    """

    at: float
    start_s: float
    term_s: float
    python_s: float
    back_s: float | None
    commit_s: float | None


@dataclass(frozen=True)
class Done:
    """What was done to the run, kept beside its folder."""

    kills: list[float]
    processes: list[ServiceProcess]


def main() -> int:
    """Undisturbed run, killed run, report."""
    given = _options()
    leave_nothing_behind()
    folder = folder_of(given, "controller-kills")
    overrides = fleet_of(given)
    kept = folder / "killed.json"
    if given.collect is None:
        with LiveRun(folder / "undisturbed") as run:
            if code := run.up(given.recipe, overrides).wait(given.limit):
                raise SystemExit(f"the undisturbed run ended with code {code}:\n{run.tail()}")
        lines = read_metrics(folder / "undisturbed")
        pause = (lines[-1]["time"] - lines[0]["time"]) / (given.kills + 1)
        print(f"a kill every {pause:.1f} s", flush=True)
        with LiveRun(folder / "killed") as run:
            run.up(given.recipe, overrides)
            with Watch(run) as watch:
                run.wait_for_step(given.limit)
                kills = kill_controllers(run, given.kills, pause)
                run.wait(given.limit)
                kept.write_bytes(msgspec.json.encode(Done(kills, watch.seen)))
    done = msgspec.json.decode(kept.read_bytes(), type=Done)
    result, table = report(folder, done, given)
    write_results(given.results, "controller_kills", result, table)
    print(f"the runs are in {folder}")
    return 1 if result["faults"] else 0


def kill_controllers(run: LiveRun, kills: int, pause_s: float) -> list[float]:
    """Kill it so many times; when, in seconds since the epoch. Stops early when the run ends."""
    done: list[float] = []
    while len(done) < kills:
        committed = run.committed()
        until = time.monotonic() + pause_s
        while time.monotonic() < until or run.committed() == committed:
            if run.code is not None:
                return done
            time.sleep(LOOK_S)
        controllers = [process for process in run.processes() if process.role == CONTROLLER]
        if controllers:
            os.kill(controllers[0].pid, signal.SIGKILL)
            done.append(time.time())
    return done


def outages(kills: list[float], timeline: Timeline, processes: list[ServiceProcess]) -> list[Outage]:
    """One for each kill that another term followed."""
    found = []
    starts = [process.started for process in processes if process.role == CONTROLLER]
    for at, end in zip(kills, [*kills[1:], float("inf")], strict=True):
        started = next((start for start in starts if at < start <= end), None)
        term = next((began for began, _ in timeline.terms if at < began <= end), None)
        if started is None or term is None:
            continue
        known = {life.replica for life in timeline.lives if life.joined <= at and (life.gone is None or life.gone > at)}
        back = {name: when for when, name in reversed(timeline.registered) if term <= when <= end}
        commits = timeline.of("committed", at, end)
        found.append(
            Outage(
                at=at,
                start_s=started - at,
                term_s=term - at,
                python_s=term - started,
                back_s=max(back[name] for name in known) - at if known <= back.keys() else None,
                commit_s=commits[0].at - at if commits else None,
            )
        )
    return found


def report(folder: Path, done: Done, given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compare the two runs."""
    runs = {name: read_timeline(folder / name) for name in ("undisturbed", "killed")}
    verdicts = {name: judge(folder / name, timeline) for name, timeline in runs.items()}
    lines = read_metrics(folder / "killed")
    undisturbed = read_metrics(folder / "undisturbed")
    found = outages(done.kills, runs["killed"], done.processes)
    faults = [f"{name}: {fault}" for name, verdict in verdicts.items() for fault in verdict.faults]
    faults += differences(verdicts["undisturbed"], verdicts["killed"])
    if len(done.kills) < given.kills or len(found) < len(done.kills):
        faults.append(f"{len(done.kills)} of {given.kills} kills were done, {len(found)} were followed by a term")
    result = {
        "machine": describe_machine(),
        "load_average": load_average(),
        "fleet": describe(given.policies, given.rollouts, given.evaluators),
        "overrides": fleet_of(given),
        "kills": len(done.kills),
        "goodput": goodput(undisturbed, lines),
        "medians": {name: _median(found, name) for name in ("term_s", "python_s", "back_s", "commit_s")},
        "started_again": started_again(done.processes),
        "faults": faults,
        "verdicts": {name: asdict(verdict) for name, verdict in verdicts.items()},
        "outages": [asdict(outage) for outage in found],
    }
    draw(
        f"controller killed {len(done.kills)} times",
        runs["killed"],
        done.processes,
        lines,
        [Mark(at, at, CONTROLLER, "") for at in done.kills],
        undisturbed_seconds(undisturbed, lines),
        given.results / "controller_kills.png",
    )
    return result, as_markdown(result)


def differences(before: Verdict, after: Verdict) -> list[str]:
    """What the killed run did otherwise."""
    faults = []
    if before.steps != after.steps:
        faults.append(f"steps differ: {before.steps} undisturbed, {after.steps} with kills")
    if before.trained != after.trained:
        faults.append(f"prompt groups consumed by training differ: {before.trained} undisturbed, {after.trained}")
    return faults


def started_again(processes: list[ServiceProcess]) -> list[str]:
    """Replicas, the controller apart, that had more than one process."""
    names = [process.replica for process in processes if process.role != CONTROLLER]
    return sorted({name for name in names if names.count(name) > 1})


def as_markdown(result: dict[str, Any]) -> str:
    """The table of the results file."""
    medians = result["medians"]
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}. {result['fleet']}; the "
        f"controller killed {result['kills']} times in one run.",
        "",
        "| run | steps | groups trained on | terms | rollbacks | books |",
        "|---|---|---|---|---|---|",
    ]
    for name, it in result["verdicts"].items():
        books = "clean" if it["audit"][-1] == "audit: clean" else it["audit"][-1]
        steps = ", ".join(f"{stage} {count}" for stage, count in it["steps"].items())
        lines.append(f"| {name} | {steps} | {it['trained']} | {it['terms']} | {it['rollbacks']} | {books} |")
    lines += [
        "",
        f"Median outage: {_seconds(medians['term_s'])} s from the kill until the next term listens, of which "
        f"{_seconds(medians['python_s'])} s are the start of Python; {_seconds(medians['back_s'])} s until every "
        f"replica has registered again; {_seconds(medians['commit_s'])} s until the next committed step. Goodput "
        f"{100 * result['goodput']:.0f} % of the undisturbed run. Other replicas started again: "
        f"{', '.join(result['started_again']) or 'none'}.",
        *(f"FAULT: {fault}" for fault in result["faults"]),
    ]
    return "\n".join(lines) + "\n"


def _median(found: list[Outage], name: str) -> float | None:
    values = [value for outage in found if (value := getattr(outage, name)) is not None]
    return statistics.median(values) if values else None


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.controller_kills", description="A run whose controller dies again and again."
    )
    add_options(parser, policies=1, rollouts=2, evaluators=1)
    parser.add_argument("--kills", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
