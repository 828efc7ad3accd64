"""A pool of reward workers: judges completions beside the generation loop, and survives what rewards do.

Used by the rollout service's loop, which submits and collects without ever blocking. One thread of the pool owns the
workers: it feeds each of them one task at a time and watches pipes and deadlines. Invariant: every submitted task
comes back exactly once, as a score or as an error; a worker that overruns its time, dies or writes garbage is killed
with all of its own children and replaced, and costs nobody but the task it had in hand. A task that its worker died
under before it began is given to another, once.
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

from services.rollout.reward_wire import (
    Ready,
    Setup,
    Task,
    ToPool,
    Unable,
    Verdict,
    WireError,
    Working,
    frame,
    split_to_pool,
)
from shared.config import RecipeError
from shared.config.schema import DataTable, RewardPart
from shared.nccl.library import without_preload
from shared.rewards.score import Score
from shared.telemetry import get_logger

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER_COMMAND = (sys.executable, "-m", "services.rollout.reward_worker")
FAILED_STARTS = 3
"""Workers in a row that never got ready: then the pool gives up, since the next would fail alike."""
_READ = 65536
_SINGLE_THREADED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class RewardsPoolError(Exception):
    """No worker can be started, or none of their rewards can be used; the text is the last reason."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of a task: its `score`, or the reason why it has none."""

    tag: Any
    score: Score | None
    error: str


@dataclass(slots=True, eq=False)
class _Order:
    """A task as it was submitted; `again` when a worker has died under it already."""

    tag: Any
    task: Task
    again: bool = False

    @property
    def where(self) -> str:
        return f"row {self.task.row} of data set {self.task.dataset!r}"


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    """Monotonic time by which it must be ready, or have judged `order`; infinite while it has nothing to do."""
    ready: bool = False
    order: _Order | None = None
    part: str = ""
    """The part of the reward that it is at; empty until it has begun with `order`."""
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    unable: Unable | None = None


class RewardsPool:
    """`workers` processes that judge rows of `datasets`, each within `timeout_s` a task and `memory_mb` of memory.

    `parts` are the recipe's. `start_timeout_s` is how long a worker may take to open data sets and rewards. `command`
    starts a worker; the process id of this process is appended to it.
    """

    def __init__(
        self,
        datasets: Mapping[str, DataTable],
        parts: Sequence[RewardPart],
        *,
        workers: int,
        timeout_s: float,
        memory_mb: int,
        start_timeout_s: float,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        tables = {name: table.model_dump() for name, table in datasets.items()}
        self._setup = frame(Setup(tables, [part.model_dump() for part in parts], memory_mb))
        self._size = workers
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._command = [*command, str(os.getpid())]
        self._submitted: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._judged: queue.SimpleQueue[Judged] = queue.SimpleQueue()
        self._number = 0
        self._pending = 0
        self._broken: Exception | None = None
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

    def submit(self, tag: Any, dataset: str, row: int, completion: str, *, tokens: int, held_out: bool = False) -> None:
        """Have `completion`, an answer of `tokens` tokens to `row` of `dataset`, judged; `tag` names it in `collect`.

        Held-out ones are worth the verifier's raw score, whatever the recipe trains on.
        """
        self._number += 1
        self._pending += 1
        self._submitted.put(_Order(tag, Task(self._number, dataset, row, completion, tokens, held_out)))
        self._wake()

    def collect(self, timeout_s: float = 0.0) -> list[Judged]:
        """What has been judged since the last call; waits up to `timeout_s` for the first if there is none.

        Raises `RewardsPoolError` when the pool has given up, `RecipeError` when no worker can make the recipe's parts.
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
        if self._broken is not None and not results:
            raise self._broken
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
            cause = f"the thread that keeps the reward workers failed: {type(error).__name__}: {error}"
            self._broken = RewardsPoolError(cause)
            raise
        finally:
            keeper.close()


class _Keeper:
    """The pool's thread: starts, feeds, watches and replaces workers."""

    def __init__(self, pool: RewardsPool) -> None:
        self._pool = pool
        self._orders: deque[_Order] = deque()
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
                if pool._broken is not None:
                    return
                self._start()
            while not pool._submitted.empty():
                self._orders.append(pool._submitted.get())
            for worker in self._workers:
                if worker.ready and worker.order is None and self._orders:
                    self._feed(worker, self._orders.popleft())
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
                    self._replace(worker, self._overrun(worker), overran=True)

    def close(self) -> None:
        """Leave nothing running."""
        for worker in self._workers:
            self._kill(worker)
        self._selector.close()

    def _start(self) -> None:
        environment = without_preload(os.environ) | _SINGLE_THREADED
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
        process = subprocess.Popen(
            self._pool._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is not for it, and a reward's own children die with it
        )
        worker = _Worker(process, deadline=time.monotonic() + self._pool._start_timeout_s)
        assert process.stdout is not None and process.stdin is not None
        os.set_blocking(process.stdout.fileno(), False)
        os.set_blocking(process.stdin.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        self._workers.append(worker)
        self._send(worker, self._pool._setup)

    def _feed(self, worker: _Worker, order: _Order) -> None:
        worker.order, worker.part = order, ""
        worker.deadline = time.monotonic() + self._pool._timeout_s
        self._send(worker, frame(order.task))

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
            self._replace(worker, worker.unable.cause if worker.unable else self._death(worker))
            return
        worker.received += data
        try:
            for message in split_to_pool(worker.received):
                self._take(worker, message)
                if worker not in self._workers:
                    return
        except WireError as error:
            self._replace(worker, f"{self._at(worker)}wrote into its worker's pipe: {error}")

    def _take(self, worker: _Worker, message: ToPool) -> None:
        number = worker.order.task.number if worker.order is not None else None
        if isinstance(message, Ready) and not worker.ready:
            worker.ready = True
            self._failed_starts = 0
        elif isinstance(message, Unable) and not worker.ready:
            worker.unable = message
            return
        elif isinstance(message, Working) and message.number == number:
            worker.part = message.part
            return
        elif isinstance(message, Verdict) and worker.order is not None and message.number == number:
            scored = None if message.error else Score(message.total, message.parts)
            self._pool._judged.put(Judged(worker.order.tag, scored, message.error))
            worker.order = None
            if message.leaving:
                self._replace(worker, message.error)
                return
        else:
            raise WireError(f"a {type(message).__name__} that nothing asked for")
        worker.deadline = float("inf")
        if self._orders and worker.ready:
            self._feed(worker, self._orders.popleft())

    def _at(self, worker: _Worker) -> str:
        """What a worker was doing, as the beginning of a sentence."""
        if worker.order is None:
            return "the reward worker "
        part = f"reward part {worker.part!r} " if worker.part else "the reward worker "
        return f"{worker.order.where}: {part}"

    def _overrun(self, worker: _Worker) -> str:
        if not worker.ready:
            return (
                f"the reward worker did not open data sets and rewards within timeouts.load_s = "
                f"{self._pool._start_timeout_s:g} s"
            )
        return (
            f"{self._at(worker)}took longer than rewards.timeout_s = {self._pool._timeout_s:g} s and was killed; "
            "make it faster, have it give up by itself, or raise the limit"
        )

    def _death(self, worker: _Worker) -> str:
        how = f"{self._at(worker)}ended its process ({self._last_words(worker)})"
        return f"{how}; have it raise an exception instead, and look into this replica's log" if worker.part else how

    def _replace(self, worker: _Worker, cause: str, *, overran: bool = False) -> None:
        self._kill(worker)
        self._workers.remove(worker)
        order = worker.order
        if order is not None and not (worker.part or order.again or overran):
            order.again = True  # nothing of the task's own has run: it is not what killed the worker
            self._orders.appendleft(order)
        elif order is not None:
            self._pool._judged.put(Judged(order.tag, None, cause))
        if worker.unable is not None and worker.unable.recipe:
            self._pool._broken = RecipeError(cause)
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= FAILED_STARTS:
                text = f"{FAILED_STARTS} reward workers in a row could not start; the last: {cause}"
                self._pool._broken = RewardsPoolError(text)
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
