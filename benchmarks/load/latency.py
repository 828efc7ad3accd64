"""Command latency, memory per replica and reconnection with many connected replicas, against the real controller."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load.processes import Child, Children, children, wait_for_address
from benchmarks.load.throughput import RECIPE
from shared.bus import ask
from shared.messages import StatusRequest

PER_PROCESS = 250
"""Replicas of one load process."""
SETTINGS = [
    "train.batches=1000",
    "train.batch_size=1000000",  # no batch fills: what is measured are leases, reports and heartbeats
    "train.samples=2",
    "rollout.slots=2",  # two groups leased to each replica
    "timeouts.lease_s=600",
    "timeouts.mesh_s=60",
]
WAIT_S = 90.0
QUESTIONS = 100


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds."""

    p50: float
    p99: float
    count: int


@dataclass(frozen=True)
class FleetResult:
    """One fleet size. `memory_kb` is what the controller grew by for each replica; times are seconds.

    `ready_s` passed from the start of the load processes until every replica held the weights and its leases.
    """

    replicas: int
    reports_per_s: float
    report_to_ack_ms: Quantiles
    report_to_lease_ms: Quantiles
    status_ms: Quantiles
    controller_cpu: float
    memory_kb: float
    ready_s: float
    restart_s: float
    reconnect_s: float


def measure_fleet(folder: Path, replicas: int, rate: float, seconds: float) -> FleetResult:
    """Connect `replicas`, make `rate` reports in a second for `seconds`, kill -9 the controller and start it again."""
    run = folder / "run"
    run.mkdir(parents=True)
    common = ["--recipe", RECIPE]
    for setting in SETTINGS:
        common += ["--set", setting]
    with children(folder / "log") as processes:
        controller = processes.start("controller", "services.controller", *common, "--run-folder", str(run))
        address = wait_for_address(run, controller, WAIT_S)
        empty_kb = controller.resident_kb()
        began = time.monotonic()
        loads = _start_fleet(processes, common, address, replicas)
        _wait(lambda: _opened(loads, 1)[0] == replicas, f"{replicas} replicas to register", controller)
        where = ["--run-folder", str(run), "--controller", address, "--replica", "policy-0"]
        processes.start("policy", "benchmarks.load.policy", *common, *where)
        _wait(lambda: _leased(loads) == 2 * replicas, f"{replicas} replicas to be leased groups", controller)
        ready_s = time.monotonic() - began
        time.sleep(2.0)  # heartbeats only
        memory_kb = (controller.resident_kb() - empty_kb) / replicas
        used, at = controller.cpu_s(), time.monotonic()
        acked, leased = _work(loads, rate, seconds)
        cpu = (controller.cpu_s() - used) / (time.monotonic() - at)
        status = _ask_status(address)
        killed = time.monotonic()
        controller.kill()
        again = processes.start(
            "controller", "services.controller", *common, "--run-folder", str(run), "--bind", address
        )
        wait_for_address(run, again, WAIT_S, term=2)
        listens = time.monotonic()
        _wait(lambda: _opened(loads, 2)[0] == replicas, f"{replicas} replicas to register again", again)
        return FleetResult(
            replicas=replicas,
            reports_per_s=rate,
            report_to_ack_ms=_quantiles(acked),
            report_to_lease_ms=_quantiles(leased),
            status_ms=_quantiles(status),
            controller_cpu=round(cpu, 3),
            memory_kb=round(memory_kb, 1),
            ready_s=round(ready_s, 2),
            restart_s=round(listens - killed, 2),
            reconnect_s=round(_opened(loads, 2)[1] - listens, 2),
        )


def _start_fleet(processes: Children, common: list[str], address: str, replicas: int) -> list[Child]:
    loads = []
    for first in range(0, replicas, PER_PROCESS):
        count = ["--first", str(first), "--count", str(min(PER_PROCESS, replicas - first))]
        where = ["--controller", address]
        loads.append(processes.start(f"load {first}", "benchmarks.load.fleet", *common, *where, *count, piped=True))
    return loads


def _opened(loads: list[Child], term: int) -> tuple[int, float]:
    answers = [load.ask({"do": "opened", "term": term}) for load in loads]
    return sum(answer["count"] for answer in answers), max(answer["last"] for answer in answers)


def _leased(loads: list[Child]) -> int:
    return sum(load.ask({"do": "leased"})["count"] for load in loads)


def _work(loads: list[Child], rate: float, seconds: float) -> tuple[list[float], list[float]]:
    for load in loads:
        load.tell({"do": "work", "rate": rate / len(loads), "seconds": seconds})
    answers = [load.answer() for load in loads]
    return ([s for answer in answers for s in answer["acked"]], [s for answer in answers for s in answer["leased"]])


def _ask_status(address: str) -> list[float]:
    times = []
    for _ in range(QUESTIONS):
        start = time.monotonic()
        ask(address, StatusRequest(), WAIT_S)
        times.append(time.monotonic() - start)
    return times


def _wait(holds: Callable[[], bool], what: str, controller: Child) -> None:
    until = time.monotonic() + WAIT_S
    while not holds():
        controller.check()
        if time.monotonic() > until:
            raise TimeoutError(f"waited {WAIT_S:g} s for {what}")
        time.sleep(0.1)


def _quantiles(seconds: list[float]) -> Quantiles:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return Quantiles(round(1e3 * cuts[49], 2), round(1e3 * cuts[98], 2), len(seconds))
