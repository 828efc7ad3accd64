"""One reward worker: a process that judges completions, one at a time, under a memory limit.

Started by `rewards_pool` as `python -m services.rollout.reward_worker PARENT_PID` with pipes on stdin and stdout;
ends when stdin closes or the parent dies. Verifiers are foreign code: what they print goes to stderr, what they raise
becomes a verdict, and what they break is this process alone. Does not import torch: workers start often, and small.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from typing import BinaryIO

from services.rollout.reward_wire import (
    LENGTH,
    Ready,
    Setup,
    Task,
    ToPool,
    Unable,
    Verdict,
    WireError,
    decode_to_worker,
    frame,
    reward_parts,
)
from shared.config.schema import DataTable
from shared.data import open_dataset
from shared.data.dataset import Dataset
from shared.rewards.score import score

MIB = 1024 * 1024
HEADROOM_MB = 32
"""Least memory that must be left for verifiers once the data sets are open."""
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def main() -> int:
    """Serve tasks until stdin closes; 0, or 1 after an `Unable` or a task that ran out of memory."""
    _die_with(int(sys.argv[1]))
    inbox, outbox = sys.stdin.buffer, _private_stdout()
    try:
        setup = _read(inbox)
        if not isinstance(setup, Setup):
            raise WireError(f"expected a Setup first, got {type(setup).__name__}")
        datasets = {name: open_dataset(name, DataTable.model_validate(table)) for name, table in setup.datasets.items()}
        used_mb = _limit_memory(setup.memory_mb)
    except Exception as error:  # whatever it is, the pool must hear of it
        _write(outbox, Unable(cause=f"{type(error).__name__}: {error}"))
        return 1
    _write(outbox, Ready(address_space_mb=used_mb))
    while (task := _read(inbox)) is not None:
        assert isinstance(task, Task)
        try:
            verdict = judge(datasets, task)
        except MemoryError:
            # What the verifier broke off in the middle may still hold memory: let a fresh worker go on.
            cause = f"the verifier ran into rewards.memory_mb = {setup.memory_mb}"
            _write(outbox, Verdict(task.number, 0.0, {}, cause, leaving=True))
            return 1
        _write(outbox, verdict)
    return 0


def judge(datasets: dict[str, Dataset], task: Task) -> Verdict:
    """The verdict on one task; whatever the parts raise becomes its error, except MemoryError."""
    try:
        scored = score(reward_parts(task.parts), datasets[task.dataset], task.row, task.completion)
    except MemoryError:
        raise
    except BaseException as error:  # foreign code may even raise SystemExit
        return Verdict(task.number, 0.0, {}, f"{type(error).__name__}: {error}")
    return Verdict(task.number, scored.total, scored.parts, "")


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however that happens (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)


def _private_stdout() -> BinaryIO:
    """The pipe to the pool, out of reach of `print`: file descriptor 1 now leads to stderr."""
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return pipe


def _limit_memory(limit_mb: int) -> int:
    """Limit the address space; returns what is in use already, in MiB."""
    with open("/proc/self/statm") as file:
        used_mb = int(file.read().split()[0]) * resource.getpagesize() // MIB
    if used_mb + HEADROOM_MB > limit_mb:
        raise MemoryError(
            f"a reward worker occupies {used_mb} MiB of address space once its data sets are open, but "
            f"rewards.memory_mb is {limit_mb}; set it to at least {used_mb + 4 * HEADROOM_MB}"
        )
    resource.setrlimit(resource.RLIMIT_AS, (limit_mb * MIB, limit_mb * MIB))
    return used_mb


def _read(inbox: BinaryIO) -> Setup | Task | None:
    """The next message of the pool; None when the pipe is closed."""
    head = inbox.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    return decode_to_worker(inbox.read(length))


def _write(outbox: BinaryIO, message: ToPool) -> None:
    outbox.write(frame(message))
    outbox.flush()


if __name__ == "__main__":
    sys.exit(main())
