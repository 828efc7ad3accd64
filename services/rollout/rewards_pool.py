"""A pool of reward workers: judges completions beside the generation loop, and survives what verifiers do.

Used by the rollout service's loop, which submits and collects without ever blocking. One thread of the pool owns the
workers: it feeds each of them one task at a time and watches pipes and deadlines. Invariant: every submitted task
comes back exactly once, as a score or as an error; a worker that overruns its time, dies or writes garbage is killed
with all of its own children and replaced, and costs nobody but the task it had in hand.
"""

from __future__ import annotations

import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.rollout.reward_wire import Ready, Setup, Task, Unable, Verdict, WireError, frame, split_to_pool
from shared.config.schema import DataTable, RewardPart
from shared.rewards.score import Score
from shared.telemetry import get_logger

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER_COMMAND = (sys.executable, "-m", "services.rollout.reward_worker")
FAILED_STARTS = 3
"""Workers in a row that never got ready: then the pool gives up, since the next would fail alike."""
_READ = 65536
_SINGLE_THREADED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class RewardsPoolError(Exception):
    """No worker can be started; the text is the last worker's reason."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of a task: its `score`, or the reason why it has none."""

    tag: Any
    score: Score | None
    error: str


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    """Monotonic time by which it must be ready, or have judged `task`; infinite while it has nothing to do."""
    ready: bool = False
    task: tuple[Any, Task] | None = None
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    cause: str = ""


class RewardsPool:
    """`workers` processes that judge rows of `datasets`, each within `timeout_s` a task and `memory_mb` of memory.

    `start_timeout_s` is how long a worker may take to open its data sets. `command` starts a worker; the process id
    of this process is appended to it.
    """

    def __init__(
        self,
        datasets: Mapping[str, DataTable],
        *,
        workers: int,
        timeout_s: float,
        memory_mb: int,
        start_timeout_s: float,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        tables = {name: table.model_dump() for name, table in datasets.items()}
        self._setup = frame(Setup(datasets=tables, memory_mb=memory_mb))
        self._size = workers
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._command = [*command, str(os.getpid())]
        self._submitted: queue.SimpleQueue[tuple[Any, Task]] = queue.SimpleQueue()
        self._judged: queue.SimpleQueue[Judged] = queue.SimpleQueue()
        self._number = 0
        self._pending = 0
        self._broken = ""
        self._closing = False
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._thread = threading.Thread(target=self._run, name="rewards-pool", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Tasks submitted and not collected yet."""
        return self._pending

    def submit(self, tag: Any, dataset: str, row: int, completion: str, parts: Sequence[RewardPart]) -> None:
        """Have `completion`, an answer to `row` of `dataset`, judged by `parts`; `tag` names it in `collect`."""
        self._number += 1
        pairs: list[tuple[str, float]] = [(part.kind, part.weight) for part in parts]
        self._pending += 1
        self._submitted.put((tag, Task(self._number, dataset, row, completion, pairs)))
        self._wake()

    def collect(self, timeout_s: float = 0.0) -> list[Judged]:
        """What has been judged since the last call; waits up to `timeout_s` for the first if there is none.

        Raises `RewardsPoolError` when the pool has given up.
        """
        results: list[Judged] = []
        try:
            if self._pending and timeout_s > 0:
                results.append(self._judged.get(timeout=timeout_s))
            while True:
                results.append(self._judged.get_nowait())
        except queue.Empty:
            pass
        self._pending -= len(results)
        if self._broken and not results:
            raise RewardsPoolError(self._broken)
        return results

    def close(self) -> None:
        """Kill the workers; tasks in hand are forgotten. May be repeated."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake_writer, b"w")

    def _run(self) -> None:
        keeper = _Keeper(self)
        try:
            keeper.run()
        except Exception as error:
            self._broken = f"the thread that keeps the reward workers failed: {type(error).__name__}: {error}"
            raise
        finally:
            keeper.close()


class _Keeper:
    """The pool's thread: starts, feeds, watches and replaces workers."""

    def __init__(self, pool: RewardsPool) -> None:
        self._pool = pool
        self._tasks: deque[tuple[Any, Task]] = deque()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(pool._wake_reader, selectors.EVENT_READ)
        self._log = get_logger()

    def run(self) -> None:
        """Until the pool is closed, or no worker can be started."""
        pool = self._pool
        while not pool._closing:
            while len(self._workers) < pool._size:
                if self._failed_starts >= FAILED_STARTS:
                    return
                self._start()
            while not pool._submitted.empty():
                self._tasks.append(pool._submitted.get())
            for worker in self._workers:
                if worker.ready and worker.task is None and self._tasks:
                    self._feed(worker, self._tasks.popleft())
            next_deadline = min(worker.deadline for worker in self._workers)
            wait = None if next_deadline == float("inf") else max(0.0, next_deadline - time.monotonic())
            for key, events in self._selector.select(wait):
                if key.fileobj == pool._wake_reader:
                    os.read(pool._wake_reader, _READ)
                elif key.data not in self._workers:
                    continue  # replaced a moment ago, by another event of this round
                elif events & selectors.EVENT_READ:
                    self._read(key.data)
                else:
                    self._write(key.data)
            now = time.monotonic()
            for worker in list(self._workers):
                if worker.deadline <= now:
                    self._replace(worker, self._overrun(worker))

    def close(self) -> None:
        """Leave nothing running."""
        for worker in self._workers:
            self._kill(worker)
        self._selector.close()

    def _start(self) -> None:
        environment = os.environ | _SINGLE_THREADED
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
        process = subprocess.Popen(
            self._pool._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is not for it, and a verifier's own children die with it
        )
        worker = _Worker(process, deadline=time.monotonic() + self._pool._start_timeout_s)
        assert process.stdout is not None and process.stdin is not None
        os.set_blocking(process.stdout.fileno(), False)
        os.set_blocking(process.stdin.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        self._workers.append(worker)
        self._send(worker, self._pool._setup)

    def _feed(self, worker: _Worker, task: tuple[Any, Task]) -> None:
        worker.task = task
        worker.deadline = time.monotonic() + self._pool._timeout_s
        self._send(worker, frame(task[1]))

    def _send(self, worker: _Worker, data: bytes) -> None:
        worker.unsent += data
        stdin = worker.process.stdin
        assert stdin is not None
        if stdin.fileno() not in self._selector.get_map():
            self._selector.register(stdin, selectors.EVENT_WRITE, worker)
        self._write(worker)

    def _write(self, worker: _Worker) -> None:
        stdin = worker.process.stdin
        assert stdin is not None
        try:
            sent = os.write(stdin.fileno(), worker.unsent)
        except BlockingIOError:
            return
        except OSError:  # it has closed its end: the end of its stdout tells the rest
            sent = len(worker.unsent)
        del worker.unsent[:sent]
        if not worker.unsent:
            self._selector.unregister(stdin)

    def _read(self, worker: _Worker) -> None:
        stdout = worker.process.stdout
        assert stdout is not None
        data = os.read(stdout.fileno(), _READ)
        if not data:
            self._replace(worker, worker.cause or f"the reward worker died ({self._last_words(worker)})")
            return
        worker.received += data
        try:
            for message in split_to_pool(worker.received):
                self._take(worker, message)
                if worker not in self._workers:
                    return
        except WireError as error:
            self._replace(worker, f"the reward worker wrote garbage: {error}")

    def _take(self, worker: _Worker, message: Ready | Unable | Verdict) -> None:
        if isinstance(message, Ready) and not worker.ready:
            worker.ready = True
            self._failed_starts = 0
        elif isinstance(message, Unable) and not worker.ready:
            worker.cause = message.cause
            return
        elif isinstance(message, Verdict) and worker.task is not None and message.number == worker.task[1].number:
            scored = None if message.error else Score(message.total, message.parts)
            self._pool._judged.put(Judged(worker.task[0], scored, message.error))
            worker.task = None
            if message.leaving:
                self._replace(worker, message.error)
                return
        else:
            raise WireError(f"a {type(message).__name__} that nothing asked for")
        worker.deadline = float("inf")
        if self._tasks and worker.ready:
            self._feed(worker, self._tasks.popleft())

    def _overrun(self, worker: _Worker) -> str:
        if not worker.ready:
            return f"the reward worker did not open its data sets within {self._pool._start_timeout_s:g} s"
        return f"the verifier took longer than rewards.timeout_s = {self._pool._timeout_s:g} s"

    def _replace(self, worker: _Worker, cause: str) -> None:
        self._kill(worker)
        self._workers.remove(worker)
        if worker.task is not None:
            self._pool._judged.put(Judged(worker.task[0], None, cause))
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= FAILED_STARTS:
                self._pool._broken = f"{FAILED_STARTS} reward workers in a row could not start; the last: {cause}"
        self._log.warning("reward worker replaced", pid=worker.process.pid, why=cause)

    def _kill(self, worker: _Worker) -> None:
        process = worker.process
        assert process.stdout is not None and process.stdin is not None
        for stream in (process.stdout, process.stdin):
            if stream.fileno() in self._selector.get_map():
                self._selector.unregister(stream)
        with suppress(ProcessLookupError):
            # The worker leads a process group of its own, and is not reaped yet: its id cannot be another's.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stdin.close()

    def _last_words(self, worker: _Worker) -> str:
        try:
            code = worker.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
