"""What the control plane costs: `python -m benchmarks.control_plane` (or `make bench-control-plane`).

Two measurements over real TCP sockets on loopback, with the real controller process:

- throughput: groups of 64 samples x 512 tokens through lease -> report -> spool and journal (fsync) -> assign with
  payload -> commit, without keys and with CURVE, in turns with a bare pyzmq + msgpack loop that takes, appends and
  fsyncs the same bytes;
- fleets: latency, memory and reconnection with 100 and 1,000 connected replicas.

Writes `results/control_plane.json` and `.md`. Every wait ends, every process is gone when this one is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.load.latency import FleetResult, measure_fleet
from benchmarks.load.processes import ROOT
from benchmarks.load.throughput import Rate, bare_rate, controller_rate
from benchmarks.load.work import SAMPLES, TOKENS, Work

RESULTS = ROOT / "benchmarks" / "results"
LOADS = 2
"""Load processes of the throughput measurement."""
REPORTS_PER_S = 100.0
WORK_S = 10.0


def measure_throughput(folder: Path, groups: int, rounds: int) -> dict[str, Any]:
    """Controller, the same with CURVE, and bare loop in turns; a ratio is the median of the rounds' ratios."""
    ways = {"controller": controller_rate, "curve": partial(controller_rate, keys=True), "bare": bare_rate}
    rates: dict[str, list[Rate]] = {name: [] for name in ways}
    for index in range(rounds):
        for name, measure in ways.items():
            rate = measure(folder / f"{name}-{index}", groups, LOADS)
            rates[name].append(rate)
            shutil.rmtree(folder / f"{name}-{index}")  # gigabytes, whose pages would slow the next round down
            print(f"round {index + 1} {name}: {rate.groups_per_s:.0f} groups/s, CPU ms a group {rate.cpu_ms}")
    ratios = _ratios(rates["controller"], rates["bare"])
    curve_ratios = _ratios(rates["curve"], rates["controller"])
    return {
        "groups": groups,
        "load_processes": LOADS,
        "bytes_per_group": Work().size,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "curve_ratio": round(statistics.median(curve_ratios), 3),
        "curve_ratios": [round(ratio, 3) for ratio in curve_ratios],
        **{name: _summary(measured) for name, measured in rates.items()},
    }


def _ratios(mine: list[Rate], others: list[Rate]) -> list[float]:
    return [one.groups_per_s / other.groups_per_s for one, other in zip(mine, others, strict=True)]


def _summary(rates: list[Rate]) -> dict[str, Any]:
    cpu = {name: round(statistics.median(rate.cpu_ms[name] for rate in rates), 3) for name in rates[0].cpu_ms}
    return {
        "groups_per_s": round(statistics.median(rate.groups_per_s for rate in rates), 1),
        "all_groups_per_s": [round(rate.groups_per_s, 1) for rate in rates],
        "cpu_ms_per_group": cpu,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The tables, for `results/` and the performance document."""
    text = f"Machine: {result['machine']}. Load average when it began: {result['load_average']}.\n"
    if "throughput" in result:
        text += "\n" + _throughput_table(result["throughput"])
    if "fleets" in result:
        text += "\n" + _fleet_table([FleetResult(**fleet) for fleet in result["fleets"]])
    return text


def _throughput_table(measured: dict[str, Any]) -> str:
    size = measured["bytes_per_group"] / 1e6
    rows = [
        f"Groups of {SAMPLES} x {TOKENS} tokens ({size:.2f} MB), {measured['load_processes']} load processes, "
        f"{measured['groups']} groups, medians of {len(measured['ratios'])} rounds in turns:",
        "",
        "| | groups/s | MB/s | CPU ms a group, by process |",
        "|---|---|---|---|",
    ]
    for name, label in (("controller", "controller"), ("curve", "controller, with CURVE"), ("bare", "bare")):
        rate = measured[name]["groups_per_s"]
        cpu = ", ".join(f"{who} {ms:.2f}" for who, ms in measured[name]["cpu_ms_per_group"].items())
        rows.append(f"| {label} | {rate:.0f} | {rate * size:.0f} | {cpu} |")
    for what, key in (("Controller beside bare loop", "ratio"), ("CURVE beside none", "curve_ratio")):
        rows += ["", f"{what}: **{measured[key]:.2f}** (rounds: {', '.join(f'{r:.2f}' for r in measured[key + 's'])})."]
    return "\n".join(rows) + "\n"


def _fleet_table(fleets: list[FleetResult]) -> str:
    rows = [
        "| | " + " | ".join(f"{fleet.replicas:,} replicas" for fleet in fleets) + " |",
        "|---" * (len(fleets) + 1) + "|",
    ]
    for label, show in (
        ("report to acknowledgement, p50 / p99 ms", lambda f: _pair(f.report_to_ack_ms)),
        ("report to next lease, p50 / p99 ms", lambda f: _pair(f.report_to_lease_ms)),
        ("`StatusRequest` to `Status`, p50 / p99 ms", lambda f: _pair(f.status_ms)),
        ("reports a second meanwhile", lambda f: f"{f.reports_per_s:.0f}"),
        ("CPUs that the controller uses meanwhile", lambda f: f"{f.controller_cpu:.2f}"),
        ("controller's memory for each replica, kB", lambda f: f"{f.memory_kb:.0f}"),
        ("from nothing to all synced and leased, s", lambda f: f"{f.ready_s:.1f}"),
        ("kill -9 to the next term listening, s", lambda f: f"{f.restart_s:.1f}"),
        ("from then until all have registered again, s", lambda f: f"{f.reconnect_s:.1f}"),
    ):
        rows.append(f"| {label} | " + " | ".join(show(fleet) for fleet in fleets) + " |")
    return "\n".join(rows) + "\n"


def _pair(quantiles: Any) -> str:
    values = quantiles if isinstance(quantiles, dict) else dataclasses.asdict(quantiles)
    return f"{values['p50']:.1f} / {values['p99']:.1f}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure the control plane beside a bare loop and with large fleets.")
    parser.add_argument("--groups", type=int, default=2560, help="groups in each round (multiple of 128)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of controller and bare loop; 0: none")
    parser.add_argument("--fleets", type=int, nargs="*", default=[100, 1000], help="fleet sizes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures are written")
    parser.add_argument("--folder", type=Path, help="where runs are written (default: a temporary folder in runs/)")
    given = parser.parse_args()
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} shared CPU cores ({platform.machine()}), Python {platform.python_version()}",
        "load_average": round(os.getloadavg()[0], 1),
    }
    parent = given.folder or ROOT / "runs"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="control-plane-", dir=parent) as name:
        if given.rounds:
            result["throughput"] = measure_throughput(Path(name), given.groups, given.rounds)
        if given.fleets:
            fleets = [measure_fleet(Path(name) / f"fleet-{n}", n, REPORTS_PER_S, WORK_S) for n in given.fleets]
            result["fleets"] = [dataclasses.asdict(fleet) for fleet in fleets]
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "control_plane.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (given.results / "control_plane.md").write_text(as_markdown(result), encoding="utf-8")
    print("\n" + as_markdown(result))


if __name__ == "__main__":
    main()
