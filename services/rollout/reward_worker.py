"""One reward worker: a process that judges completions, one at a time, under a memory limit.

Started by `rewards_pool` as `python -m services.rollout.reward_worker PARENT_PID` with pipes on stdin and stdout;
ends when stdin closes or the parent dies. Rewards are foreign code: what they print goes to stderr, what they raise
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
    Working,
    decode_to_worker,
    frame,
)
from shared.config import RecipeError
from shared.config.schema import DataTable, VerifierPart
from shared.data import open_dataset
from shared.data.dataset import Dataset
from shared.rewards.base import RewardError, Sample
from shared.rewards.check import PARTS
from shared.rewards.score import Scorer

MIB = 1024 * 1024
HEADROOM_MB = 32
"""Least memory that must be left for rewards once the data sets are open."""
LONGEST_ERROR = 2000
"""Characters of an error that are passed on: what foreign code raises may hold a whole completion, or more."""
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class Pipes:
    """The pipes to the pool, out of reach of foreign code's `print`, `input`, and of processes that it forks."""

    def __init__(self) -> None:
        self._inbox: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._outbox: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        # a forked process that lives on must not hold the pipe open, or the pool would not see this worker's end
        os.register_at_fork(after_in_child=self._leave)

    def read(self) -> Setup | Task | None:
        """The next message of the pool; None when the pipe is closed."""
        head = self._inbox.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack(head)
        return decode_to_worker(self._inbox.read(length))

    def write(self, message: ToPool) -> None:
        """Send a message to the pool."""
        left = memoryview(frame(message))
        while left:
            left = left[self._outbox.write(left) or 0 :]

    def _leave(self) -> None:
        os.close(self._inbox.fileno())
        os.close(self._outbox.fileno())


class Worker:
    """Judges tasks by the recipe's parts. RecipeError if they cannot be made, DataError if a data set cannot."""

    def __init__(self, setup: Setup, pipes: Pipes) -> None:
        self._pipes = pipes
        self._memory_mb = setup.memory_mb
        self._datasets: dict[str, Dataset] = {
            name: open_dataset(name, DataTable.model_validate(table)) for name, table in setup.datasets.items()
        }
        self._scorer = Scorer(PARTS.validate_python(setup.parts))
        self._verifier = Scorer([VerifierPart()])
        self._part = ""
        self.used_mb = _limit_memory(setup.memory_mb)

    def judge(self, task: Task) -> Verdict:
        """The verdict on one task, whatever its rewards do."""

        def begin(part: str) -> None:
            self._part = part
            self._pipes.write(Working(task.number, part))

        where = f"row {task.row} of data set {task.dataset!r}"
        try:
            sample = Sample(self._datasets[task.dataset], task.row, task.completion, task.tokens)
            scored = (self._verifier if task.held_out else self._scorer).score(sample, begin)
        except MemoryError:
            # what was broken off in the middle may still hold memory: let a fresh worker go on
            cause = (
                f"{where}: reward part {self._part!r} ran into rewards.memory_mb = {self._memory_mb}; "
                "have it use less memory, or raise the limit"
            )
            return Verdict(task.number, 0.0, {}, cause, leaving=True)
        except RewardError as error:
            return Verdict(task.number, 0.0, {}, f"{where}: {error}"[:LONGEST_ERROR])
        except BaseException as error:
            return Verdict(task.number, 0.0, {}, f"{where}: {type(error).__name__}: {error}"[:LONGEST_ERROR])
        return Verdict(task.number, scored.total, scored.parts, "")


def main() -> int:
    """Serve tasks until stdin closes; 0, or 1 after an `Unable` or a task that ran out of memory."""
    _die_with(int(sys.argv[1]))
    pipes = Pipes()
    try:
        setup = pipes.read()
        if not isinstance(setup, Setup):
            raise WireError(f"expected a Setup first, got {type(setup).__name__}")
        worker = Worker(setup, pipes)
    except RecipeError as error:
        pipes.write(Unable(str(error)[:LONGEST_ERROR], recipe=True))
        return 1
    except Exception as error:  # whatever it is, the pool must hear of it
        pipes.write(Unable(f"{type(error).__name__}: {error}"[:LONGEST_ERROR], recipe=False))
        return 1
    pipes.write(Ready(address_space_mb=worker.used_mb))
    while (task := pipes.read()) is not None:
        assert isinstance(task, Task)
        verdict = worker.judge(task)
        pipes.write(verdict)
        if verdict.leaving:
            return 1
    return 0


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however that happens (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)


def _limit_memory(limit_mb: int) -> int:
    """Limit the address space; returns what is in use already, in MiB."""
    with open("/proc/self/statm") as file:
        used_mb = int(file.read().split()[0]) * resource.getpagesize() // MIB
    if used_mb + HEADROOM_MB > limit_mb:
        raise RecipeError(
            f"a reward worker occupies {used_mb} MiB of address space once data sets and rewards are open, but "
            f"rewards.memory_mb is {limit_mb}; set it to at least {used_mb + 4 * HEADROOM_MB}"
        )
    resource.setrlimit(resource.RLIMIT_AS, (limit_mb * MIB, limit_mb * MIB))
    return used_mb


if __name__ == "__main__":
    sys.exit(main())
