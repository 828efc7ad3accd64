"""`python -m benchmarks.chaos --faults 12 --seed 1` (`make chaos`): faults against a real run, and what they cost.

First the recipe runs undisturbed for as long as all faults take. Then it runs once a seed, with as many batches as the
undisturbed run did, and with one fault about every `--every` seconds from its first committed step on. Ends with 0 when
every run did all its steps, with clean books and equal policies. Writes `results/chaos.{json,md}` and a picture a seed;
the runs stay in their folder, from which `--collect` makes the report again.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec

from benchmarks.chaos.inject import Delivered, inject
from benchmarks.chaos.partition import Namespace, why_not
from benchmarks.chaos.recovery import median_apart, recoveries
from benchmarks.chaos.report import SeedReport, as_markdown
from benchmarks.chaos.schedule import KINDS, Kind, make_schedule
from benchmarks.live.goodput import Line, goodput, paces, read_metrics, undisturbed_seconds
from benchmarks.live.picture import Mark, draw
from benchmarks.live.recipe import add_options, describe, fleet_of, folder_of
from benchmarks.live.run import LOOK_S, LiveRun, ServiceProcess, leave_nothing_behind
from benchmarks.live.timeline import read_timeline
from benchmarks.live.verdict import judge
from benchmarks.live.watch import Watch
from benchmarks.machine import ROOT, describe_machine, load_average, write_results
from shared.config import Recipe, load_recipe

FIRST_STEP_S = 300.0
MARGIN = 1.05
"""The undisturbed run takes so many times as long as all faults."""
ENDLESS = 10**6
"""Batches of a run that is stopped by the clock."""
SLOWEST = 5.0
"""A run may take so many times as long as undisturbed before it is given up."""


@dataclass(frozen=True)
class Done:
    """What was done to the run of one seed, kept beside its folder."""

    seed: int
    planned: int
    delivered: list[Delivered]
    processes: list[ServiceProcess]


def main() -> int:
    """Undisturbed run, one run a seed, report."""
    given = _options()
    leave_nothing_behind()
    folder = folder_of(given, "chaos")
    overrides = fleet_of(given)
    recipe = load_recipe(given.recipe, overrides)
    if given.collect is None:
        _run_all(given, recipe, overrides, folder)
    lines = read_metrics(folder / "undisturbed")
    seeds = [_report(folder, path, lines, given.results) for path in sorted(folder.glob("seed-*.json"))]
    result = {
        "machine": describe_machine(),
        "load_average": load_average(),
        "recipe": _name(given.recipe),
        "overrides": overrides,
        "fleet": describe(given.policies, given.rollouts, given.evaluators),
        "every_s": given.every,
        "paces": paces(lines),
        "undisturbed_pause_s": max(after["time"] - before["time"] for before, after in pairwise(lines)),
        "seeds": [asdict(it) | {"medians_apart_s": _medians(it)} for it in seeds],
    }
    write_results(given.results, "chaos", result, as_markdown(result, seeds))
    print(f"the runs are in {folder}")
    return 1 if any(it.faults for it in seeds) else 0


def _run_all(given: argparse.Namespace, recipe: Recipe, overrides: list[str], folder: Path) -> None:
    if recipe.train is None:
        raise SystemExit(f"{given.recipe}: expected a recipe with [train], whose batches make the run long enough")
    kinds, roles = _kinds(given), ["controller", "policy", "rollout", *(["evaluator"] if given.evaluators else [])]
    with _place("cut" in kinds) as namespace:
        with LiveRun(folder / "undisturbed", namespace.inside if namespace else ()) as run:
            batches = _run_undisturbed(run, given, overrides)
        for seed in given.seed:
            schedule = make_schedule(seed, given.faults, given.every, roles, kinds, recipe.bus.lost_after_s)
            print(f"seed {seed}: {len(schedule)} faults on {batches} batches of RL", flush=True)
            with LiveRun(folder / f"seed-{seed}", namespace.inside if namespace else ()) as run:
                run.up(given.recipe, [*overrides, f"train.batches={batches}"])
                with _watched(run, namespace) as seen:
                    run.wait_for_step(FIRST_STEP_S)
                    began = time.monotonic()
                    delivered = inject(run, schedule, given.every, namespace, _teller(began))
                    run.wait(max(SLOWEST * given.every * given.faults, given.limit))
            done = Done(seed, len(schedule), delivered, seen)
            (folder / f"seed-{seed}.json").write_bytes(msgspec.json.encode(done))


def _run_undisturbed(run: LiveRun, given: argparse.Namespace, overrides: list[str]) -> int:
    """Run for as long as the faults take (or the batches that were given); how many batches of RL that was."""
    seconds = MARGIN * given.every * given.faults
    print(f"undisturbed: {f'{given.batches} batches of RL' if given.batches else f'{seconds:.0f} s'}", flush=True)
    run.up(given.recipe, [*overrides, f"train.batches={given.batches or ENDLESS}"])
    if given.batches:
        if code := run.wait(given.limit):
            raise SystemExit(f"the undisturbed run ended with code {code}:\n{run.tail()}")
        return int(given.batches)
    run.wait_for_step(FIRST_STEP_S)
    until = time.monotonic() + seconds
    while time.monotonic() < until and run.code is None:
        time.sleep(LOOK_S)
    run.orrery("down", str(run.folder))
    run.wait(given.limit)
    batches = max((line["batch"] for line in read_metrics(run.folder) if line["stage"] == "train"), default=0)
    if not batches:
        raise SystemExit(f"the undisturbed run came to no batch of RL in {seconds:.0f} s:\n{run.tail()}")
    return int(batches)


def _report(folder: Path, path: Path, undisturbed: Sequence[Line], results: Path) -> SeedReport:
    """Read what one seed's run left; its picture goes to `results`."""
    done = msgspec.json.decode(path.read_bytes(), type=Done)
    run = folder / f"seed-{done.seed}"
    timeline, lines = read_timeline(run), read_metrics(run)
    verdict = judge(run, timeline)
    found = recoveries(done.delivered, timeline, done.processes)
    report = SeedReport(done.seed, done.planned, found, goodput(undisturbed, lines), verdict)
    draw(
        f"{len(found)} faults, seed {done.seed}: goodput {100 * report.goodput:.0f} %",
        timeline,
        done.processes,
        lines,
        [Mark(it.at, it.until, it.process.replica, it.name) for it in done.delivered],
        undisturbed_seconds(undisturbed, lines),
        results / f"chaos-{done.seed}.png",
    )
    return report


def _medians(it: SeedReport) -> dict[str, float | None]:
    return {"kill": median_apart(it.recoveries, ["kill"]), "all": median_apart(it.recoveries)}


@contextlib.contextmanager
def _watched(run: LiveRun, namespace: Namespace | None) -> Iterator[list[ServiceProcess]]:
    """The list is filled with every process of the run when the block ends."""
    seen: list[ServiceProcess] = []
    with Watch(run) as watch:
        if namespace is not None:
            namespace.watch(run)
        yield seen
        seen += watch.seen


@contextlib.contextmanager
def _place(cut: bool) -> Iterator[Namespace | None]:
    if not cut:
        yield None
        return
    with Namespace() as namespace:
        yield namespace


def _kinds(given: argparse.Namespace) -> list[Kind]:
    kinds: list[Kind] = given.kinds
    if "cut" in kinds and (reason := why_not()) is not None:
        raise SystemExit(f"{reason}; or leave cut out of --kinds")
    return kinds


def _teller(began: float) -> Any:
    return lambda text: print(f"  {time.monotonic() - began:7.1f} s  {text}", flush=True)


def _name(recipe: Path) -> str:
    path = recipe.absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else recipe.name


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description="Faults against a real run.")
    add_options(parser, policies=2, rollouts=2, evaluators=1)
    parser.add_argument("--faults", type=int, default=12)
    parser.add_argument("--seed", type=int, nargs="+", default=[1], help="one run a seed")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between faults")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=get_args(Kind), help="cut wants root")
    parser.add_argument("--batches", type=int, default=0, help="batches of RL (default: as many as the faults take)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
