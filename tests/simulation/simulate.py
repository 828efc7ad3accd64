"""`python -m tests.simulation.simulate --seeds 500 --first 0`: run seeds, shrink and show the first one that fails.

One seed is one life of a run: a recipe, a fleet, and a schedule of faults that ends. Then it must complete in time.
"""

from __future__ import annotations

import argparse
import gc
import logging
import subprocess
import sys
import time
from dataclasses import dataclass, field

import structlog

from tests.simulation.faults import Fault, draw_faults, strike
from tests.simulation.fleet import Fleet
from tests.simulation.plan import plan_of
from tests.simulation.world import Violation, World

PATIENCE_S = 500.0
"""Virtual seconds from the last fault to the run's end."""
MOST_SHRINKING = 120
SHOWN = 150


@dataclass
class Life:
    """What became of a seed."""

    seed: int
    faults: list[Fault]
    violation: str = ""
    virtual_s: float = 0.0
    events: int = 0
    messages: int = 0
    terms: int = 0
    chain: str = ""
    comparable: bool = False
    trace: list[tuple[float, str]] = field(default_factory=list)


def live(seed: int, faults: list[Fault] | None = None, *, tracing: bool = False) -> Life:
    """Live one seed, with its own faults or those given."""
    plan = plan_of(seed)
    schedule = draw_faults(seed, plan) if faults is None else faults
    life = Life(seed, schedule)
    world = World(seed, tracing=tracing)
    fleet: Fleet | None = None
    try:
        fleet = Fleet(world, plan)
        if not schedule:
            fleet.mischief = 0.0
        for fault in schedule:
            world.after(fault.at, lambda fault=fault: strike(fleet, fault))  # type: ignore[misc, arg-type]
        last = max((fault.at + fault.seconds for fault in schedule), default=0.0) + 1.0
        world.after(last, fleet.calm)
        if not world.run(lambda: fleet.complete, last + PATIENCE_S):
            core = fleet.controller.core if fleet.controller is not None else None
            where = core.state.stages.name if core is not None else "no controller"
            raise Violation(f"the run is not complete {PATIENCE_S:g} s after the last fault; it is in stage {where}")
        assert fleet.controller is not None and fleet.controller.core is not None
        committed = fleet.controller.core.state.lineages.committed
        fleet.checks.finished(fleet.controller.core, committed.version)
        life.chain = fleet.checks.last_chain(committed)
        life.comparable = fleet.checks.comparable(schedule)
    except Violation as violation:
        life.violation = str(violation)
    if life.comparable and schedule:
        quiet_life = live(seed, [])
        if quiet_life.chain != life.chain:
            life.violation = f"a deterministic run ends as {life.chain}, without faults as {quiet_life.chain}"
    life.virtual_s, life.events, life.trace = world.now, world.happened, list(world.trace)
    if fleet is not None:
        life.messages, life.terms = fleet.network.sent, fleet.checks.auditor.audit.terms
    return life


def shrink(life: Life) -> Life:
    """The same failure from fewer faults: halves, then quarters ... then single ones are left out while it stays."""
    best, tries = life, 0
    size = max(len(life.faults) // 2, 1)
    while tries < MOST_SHRINKING:
        start, shrunk = 0, False
        while start < len(best.faults) and tries < MOST_SHRINKING:
            tries += 1
            fewer = live(life.seed, best.faults[:start] + best.faults[start + size :])
            if fewer.violation:
                best, shrunk = fewer, True
            else:
                start += size
        if size == 1 and not shrunk:
            break
        size = max(size // 2, 1)
    return live(life.seed, best.faults, tracing=True)


def show(life: Life) -> None:
    """What failed, what it takes to fail, and the last of what happened before."""
    small = shrink(life)
    print(f"seed {life.seed} FAILED: {life.violation}")
    print(f"shrunk from {len(life.faults)} faults to {len(small.faults)}: {small.violation}")
    for at, text in small.trace[-SHOWN:]:
        print(f"{at:9.3f}  {text}")
    for fault in small.faults:
        print(f"  fault {fault}")
    print(f"replay: make simulate SEEDS=1 FIRST={life.seed}")


def quiet() -> None:
    """The product's logs would drown everything."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def run_seeds(first: int, seeds: int, *, every: int, keep_going: bool, brief: bool = False) -> int:
    """Run seeds in this process; how many failed."""
    quiet()
    gc.disable()  # a life is short and ends in one go
    failed, began, virtual, terms = 0, time.monotonic(), 0.0, 0
    for number, seed in enumerate(range(first, first + seeds), 1):
        life = live(seed)
        virtual, terms = virtual + life.virtual_s, terms + life.terms
        if life.violation:
            failed += 1
            if brief:
                print(f"seed {seed} FAILED: {life.violation}", flush=True)
                return failed
            if keep_going:
                print(f"seed {seed} FAILED: {life.violation}", flush=True)
            else:
                show(life)
                return failed
        if number % 20 == 0:
            gc.collect()
        if number % every == 0:
            spent = time.monotonic() - began
            print(
                f"{number} seeds from {first}: {failed} failed, {virtual:.0f} s lived in {spent:.0f} s, {terms} terms",
                flush=True,
            )
    return failed


def main() -> int:
    """The command line; with several jobs, each takes its own share of the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep-going", action="store_true", help="list failing seeds instead of showing the first")
    parser.add_argument("--brief", action="store_true", help="name the first failing seed, and no more")
    parser.add_argument("--trace", action="store_true", help="print the trace of --first")
    options = parser.parse_args()
    if options.trace:
        quiet()
        life = live(options.first, tracing=True)
        for at, text in life.trace:
            print(f"{at:9.3f}  {text}")
        print(life.violation or f"complete in {life.virtual_s:.1f} s, {life.messages} messages, {life.events} events")
        return int(bool(life.violation))
    if options.jobs > 1 and options.seeds > 1:
        return _in_parallel(options.first, options.seeds, options.jobs)
    every = max(options.seeds // 10, 1)
    failed = run_seeds(options.first, options.seeds, every=every, keep_going=options.keep_going, brief=options.brief)
    print(f"{options.seeds} seeds from {options.first}: {failed} failed")
    return int(failed > 0)


def _in_parallel(first: int, seeds: int, jobs: int) -> int:
    share = -(-seeds // jobs)
    running = []
    for begin in range(first, first + seeds, share):
        count = min(share, first + seeds - begin)
        command = [sys.executable, "-m", "tests.simulation.simulate", f"--seeds={count}", f"--first={begin}"]
        running.append(subprocess.Popen(command))
    return max(process.wait() for process in running)


if __name__ == "__main__":
    sys.exit(main())
