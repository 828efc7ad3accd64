"""Delivers a schedule of faults to a live run, and says to which process each was done, and when."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.chaos.partition import Namespace
from benchmarks.chaos.schedule import Fault
from benchmarks.live.run import LiveRun, ServiceProcess

LOOK_S = 0.05


@dataclass(frozen=True)
class Delivered:
    """A fault that was done to a process; `at` and `until` (of a stop or partition) in seconds since the epoch."""

    fault: Fault
    process: ServiceProcess
    at: float
    until: float

    @property
    def name(self) -> str:
        """For a person: "stop rollout-1 for 7.3 s"."""
        rank = f" rank {self.process.rank}" if self.process.rank else ""
        lasts = f" for {self.until - self.at:.1f} s" if self.until > self.at else ""
        return f"{self.fault.kind} {self.process.replica}{rank}{lasts}"


def choose(fault: Fault, processes: Sequence[ServiceProcess]) -> ServiceProcess | None:
    """The process that the fault meets: any rank of any replica of its role."""
    candidates = sorted(process for process in processes if process.role == fault.role)
    return candidates[int(fault.pick * len(candidates))] if candidates else None


def inject(
    run: LiveRun,
    schedule: Sequence[Fault],
    every_s: float,
    namespace: Namespace | None,
    tell: Callable[[str], None],
) -> list[Delivered]:
    """Do all of it, the first fault now. Stops early when the run ends; a role without processes is waited for."""
    began = time.monotonic()
    delivered = []
    for fault in schedule:
        if not _sleep_until(run, began + fault.at_s):
            break
        process = _await_process(run, fault, every_s / 2)
        if process is None:
            tell(f"{fault.kind}: no process of the {fault.role} to do it to")
            continue
        done = _deliver(fault, process, namespace)
        if done is None:
            continue
        delivered.append(done)
        tell(done.name)
    return delivered


def _sleep_until(run: LiveRun, when: float) -> bool:
    """False when the run ends before."""
    while (left := when - time.monotonic()) > 0:
        if run.code is not None:
            return False
        time.sleep(min(left, LOOK_S))
    return run.code is None


def _await_process(run: LiveRun, fault: Fault, timeout_s: float) -> ServiceProcess | None:
    deadline = time.monotonic() + timeout_s
    while (process := choose(fault, run.processes())) is None:
        if time.monotonic() > deadline or run.code is not None:
            return None
        time.sleep(LOOK_S)
    return process


def _deliver(fault: Fault, process: ServiceProcess, namespace: Namespace | None) -> Delivered | None:
    """None when the process ended by itself just before."""
    at = time.time()
    try:
        if fault.kind == "kill":
            os.kill(process.pid, signal.SIGKILL)
        elif fault.kind == "term":
            os.kill(process.pid, signal.SIGTERM)
        elif fault.kind == "stop":
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(fault.seconds)
            # whoever was restarted meanwhile has another process id; the stopped one may be gone
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
        else:
            assert namespace is not None
            with namespace.cut(process.replica):
                time.sleep(fault.seconds)
    except ProcessLookupError:
        return None
    return Delivered(fault, process, at, time.time() if fault.seconds else at)
