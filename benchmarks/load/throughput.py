"""Groups per second: the whole way of a group through the real controller, and the bare loop with the same bytes."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load.policy import COMMITS
from benchmarks.load.processes import Children, children, wait_for_address
from deploy.keys import make_keys
from services.controller.audit import audit_run

RECIPE = "benchmarks/control_plane.toml"
BATCH = 128
"""Groups in a batch, as in the published Cosmos-Reason1 recipe (128 prompts)."""
AHEAD = 32
"""Groups leased ahead to each load process: the recipe's slots, twice, in groups of 64 samples."""
WARM_UP = 0.2
"""Share of the groups that pass before the clock starts."""
LIMIT_S = 120.0
LOOK_S = 0.02

CpuSeries = dict[str, list[tuple[float, float]]]
"""Of each process: when, and the CPU seconds that it had used by then."""


@dataclass(frozen=True)
class Rate:
    """One run: groups per second after the warm-up, and CPU milliseconds per group of each process, by name."""

    groups_per_s: float
    cpu_ms: dict[str, float]


def controller_rate(folder: Path, groups: int, loads: int, keys: bool = False) -> Rate:
    """Lease, report, spool, journal, assign with payload, vote, commit, apply; checkpoints, weight syncs.

    With `keys` every connection speaks CURVE.
    """
    run = folder / "run"
    settings = [f"train.batches={groups // BATCH}", f"train.batch_size={BATCH}", f"rollout.slots={AHEAD * 64 // 2}"]
    if keys:
        make_keys(folder / "keys")
        settings.append(f"bus.keys={folder / 'keys'}")
    common = ["--recipe", RECIPE, "--run-folder", str(run)]
    for setting in settings:
        common += ["--set", setting]
    run.mkdir(parents=True)
    with children(folder / "controller.log") as processes:
        controller = processes.start("controller", "services.controller", *common)
        address = wait_for_address(run, controller, LIMIT_S)
        common += ["--controller", address]
        for index in range(loads):
            processes.start(f"rollout {index}", "benchmarks.load.rollout", *common, "--replica", f"rollout-{index}")
        processes.start("policy", "benchmarks.load.policy", *common, "--replica", "policy-0")
        cpu = _watch(processes)
    audit = audit_run(run)
    if not audit.clean or audit.outcome != "complete":
        raise RuntimeError("the run did not end well:\n" + "\n".join([*audit.lines(), *audit.faults]))
    return _rate(run / COMMITS, groups, cpu)


def bare_rate(folder: Path, groups: int, loads: int) -> Rate:
    """Lease, report, append, fsync, acknowledge."""
    folder.mkdir(parents=True)
    with children(folder / "bare.log") as processes:
        sizes = ["--groups", str(groups), "--ahead", str(AHEAD)]
        server = processes.start("server", "benchmarks.load.bare", "serve", "--folder", str(folder), *sizes, piped=True)
        address = server.line()
        for index in range(loads):
            processes.start(f"load {index}", "benchmarks.load.bare", "load", "--address", address)
        cpu = _watch(processes)
    return _rate(folder / COMMITS, groups, cpu)


def _watch(processes: Children) -> CpuSeries:
    """Wait for all to end, and note meanwhile what each has used of a CPU."""
    series: CpuSeries = {child.name: [] for child in processes.all}
    until = time.monotonic() + LIMIT_S
    while running := [child for child in processes.all if child.running()]:
        if time.monotonic() > until:
            raise TimeoutError(f"{', '.join(child.name for child in running)} did not end within {LIMIT_S:g} s")
        for child in running:
            with contextlib.suppress(OSError, IndexError):  # it has just ended
                series[child.name].append((time.monotonic(), child.cpu_s()))
        time.sleep(LOOK_S)
    return series


def _rate(path: Path, groups: int, cpu: CpuSeries) -> Rate:
    """From the first commit after the warm-up to the last one."""
    commits = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    done, start, counted = 0, None, 0
    for at, count in commits:
        if start is not None:
            counted += count
        done += count
        if start is None and done >= WARM_UP * groups:
            start = at
    assert start is not None
    end = commits[-1][0]
    used = {}
    for name, series in cpu.items():
        inside = [seconds for at, seconds in series if start <= at <= end]
        used[name] = round(1e3 * (inside[-1] - inside[0]) / counted, 3) if inside else 0.0
    return Rate(counted / (end - start), used)
