"""An engine that comes with a loop and processes of its own (vLLM, SGLang), behind the interface of all engines.

    caller's thread: submit, advance, pause, update, ...        engine's thread: asyncio loop with one task a sample
         queue of samples --up to `slots` at a time--> _generate(sample) --result--> queue --advance--> Finished

All bookkeeping is on the caller's thread; the loop only runs what a backend's coroutines do. Samples wait here, not in
the backend, until a slot is free, so that each starts with the weights of that moment: its `epoch` (the number of
updates so far) goes to the backend, which keeps prefixes of different epochs apart. Invariant: results of samples that
were aborted, or began again, are dropped by identity.

Who waits for a backend stops waiting when a process of it has ended, and when the replica was lost meanwhile: a worker
that is silent, not dead, is seen by the controller alone.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Coroutine, Hashable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from shared.bus import BusClient, BusError
from shared.config.schema import InFlight
from shared.engines.base import (
    Engine,
    EngineDied,
    EngineError,
    EngineStats,
    Finished,
    Request,
    check_update,
    room_for,
    weights_diverged,
)
from shared.engines.endpoint import Application, Endpoint
from shared.engines.sampling import as_int64, stream_keys
from shared.messages import Sampling
from shared.weights import StagedWeights, TensorSpec

WAIT_S = 0.005
"""Longest that `advance` waits for a sample to finish."""
LOOK_S = 0.1
"""How often a caller who waits for the engine looks whether it still lives."""

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Sample:
    """One sample to generate, as a backend sees it.

    `name` is unique among all samples of this engine; `stream` (63 bits) seeds its draws; `epoch` numbers the weights.
    """

    name: str
    key: Hashable
    index: int
    prompt: Sequence[int]
    sampling: Sampling
    limit: int
    stream: int
    epoch: int = 0
    future: Future[None] | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """What a backend made of a sample: token ids, their log-probabilities and versions, whether it ran into a stop."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    stopped: bool


@dataclass(slots=True)
class Report:
    """What a backend counts: tokens generated so far, and what EngineStats says of its KV cache."""

    tokens: int = 0
    kv_use: float = 0.0
    prefix_hits: float = 0.0


class HostedEngine(Engine):
    """What all such engines share. A backend is started by `_start`, on the engine's thread, within `start_s`.

    `stops` are stop token ids; every other call into the backend has to end within `call_s`. With `serve`, the engine
    answers people, too, on that port of loopback. With `client`, that of the replica's rank 0, the workers join the
    replica on the bus while they start.
    """

    name = "engine"

    def __init__(
        self,
        manifest: Sequence[TensorSpec],
        *,
        context: int,
        slots: int,
        stops: Iterable[int],
        start_s: float,
        call_s: float,
        serve: int | None = None,
        client: BusClient | None = None,
    ) -> None:
        self.version = -1
        self.context = context
        self.manifest = manifest
        self._slots = slots
        self._stops = sorted(set(stops))
        self._call_s = call_s
        self._client = client
        self._waiting: deque[Sample] = deque()
        self._running: dict[tuple[Hashable, int], Sample] = {}
        self._left: dict[Hashable, int] = {}
        self._results: queue.SimpleQueue[tuple[Sample, Made | Exception]] = queue.SimpleQueue()
        self._names = itertools.count()
        self._epoch = 0
        self._paused = False
        self._closed = False
        self._busy = 0.0
        self._busy_since: float | None = None
        self._endpoint = Endpoint(serve, lambda: self._epoch) if serve is not None else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=self.name, daemon=True)
        self._thread.start()
        try:
            self._call(self._begin(), start_s, "start")
        except BaseException:
            self.close()
            raise

    # --- what a backend provides, run on the engine's thread ---------------------------------------------------------

    @abstractmethod
    async def _start(self) -> None:
        """Load the model, with any weights, and be ready to generate. EngineError for what cannot work here.

        Workers join the replica before this returns, if there is one (`shared.engines.ranks.invitation`).
        """

    @abstractmethod
    async def _application(self) -> Application:
        """The engine's own OpenAI-compatible server, once it has started."""

    @abstractmethod
    async def _generate(self, sample: Sample) -> Made:
        """Generate one sample; cancelled when nobody wants it any more."""

    @abstractmethod
    async def _pause(self) -> None:
        """Stop between two tokens and keep what is in flight."""

    @abstractmethod
    async def _load(self, weights: StagedWeights, version: int, recompute: bool) -> None:
        """Put the weights in place; with `recompute`, running sequences get keys and values of the new ones."""

    @abstractmethod
    async def _resume(self) -> None:
        """Go on."""

    @abstractmethod
    async def _stop(self) -> None:
        """End all processes; also after a start that failed half way."""

    @abstractmethod
    def _death(self) -> str | None:
        """How a process of the engine ended by itself, if one did; called from any thread, cheap."""

    @abstractmethod
    def _report(self) -> Report:
        """What the backend counts; called from any thread, cheap."""

    # --- the interface of all engines -------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        limit = min(request.sampling.max_new_tokens, room_for(request, self.context, self._left))
        seeds = torch.full((request.samples,), as_int64(request.seed))
        streams = stream_keys(seeds, torch.arange(request.samples)).tolist()
        self._left[request.key] = request.samples
        for index, stream in enumerate(streams):
            name = f"{next(self._names)}"
            kept = stream & ((1 << 63) - 1)
            self._waiting.append(
                Sample(name, request.key, index, request.prompt, request.sampling, limit, kept, self._epoch)
            )
        self._admit()

    def abort(self, key: Hashable) -> None:
        if self._left.pop(key, None) is None:
            return
        self._waiting = deque(sample for sample in self._waiting if sample.key != key)
        for place in [place for place in self._running if place[0] == key]:
            self._drop(self._running.pop(place))
        self._admit()

    def advance(self) -> list[Finished]:
        self._raise_if_dead()
        if self._paused or not self._running:
            return []
        finished: list[Finished] = []
        first = True
        while True:
            try:
                sample, made = self._results.get(timeout=WAIT_S) if first else self._results.get_nowait()
            except queue.Empty:
                break
            first = False
            if self._running.get((sample.key, sample.index)) is sample:
                finished.append(self._finish(sample, made))
        self._admit()
        return finished

    def pause(self) -> None:
        self._call(self._pause(), self._call_s, "pause")
        self._paused = True

    def update(self, weights: StagedWeights, version: int, in_flight: InFlight = "keep") -> None:
        check_update(self._paused, self.manifest, weights)
        if in_flight == "abort":
            self._begin_anew()
        self._call(self._load(weights, version, in_flight == "recompute"), self._call_s, "take new weights")
        self.version = version
        self._epoch += 1

    def resume(self) -> None:
        self._call(self._resume(), self._call_s, "resume")
        self._paused = False
        self._admit()

    def stats(self) -> EngineStats:
        busy = self._busy + (time.perf_counter() - self._busy_since if self._busy_since is not None else 0.0)
        own = self._report()
        return EngineStats(len(self._running), len(self._waiting), own.tokens, busy, own.kv_use, own.prefix_hits)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        for sample in self._running.values():
            self._drop(sample)
        self._running.clear()
        self._left.clear()
        wait([asyncio.run_coroutine_threadsafe(self._end(), self._loop)], timeout=self._call_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(self._call_s)

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while not self._paused and self._waiting and len(self._running) < self._slots:
            sample = self._waiting.popleft()
            sample.epoch = self._epoch
            self._running[sample.key, sample.index] = sample
            sample.future = asyncio.run_coroutine_threadsafe(self._run(sample), self._loop)
        if self._running and self._busy_since is None:
            self._busy_since = time.perf_counter()
        elif not self._running and self._busy_since is not None:
            self._busy += time.perf_counter() - self._busy_since
            self._busy_since = None

    def _begin_anew(self) -> None:
        """Throw away what running samples have so far, and queue them again, before those that wait."""
        again = []
        for sample in self._running.values():
            self._drop(sample)
            name = f"{next(self._names)}"
            again.append(
                Sample(name, sample.key, sample.index, sample.prompt, sample.sampling, sample.limit, sample.stream)
            )
        self._running.clear()
        self._waiting.extendleft(reversed(again))

    def _finish(self, sample: Sample, made: Made | Exception) -> Finished:
        del self._running[sample.key, sample.index]
        if isinstance(made, Exception):
            raise self._failed(f"answer a prompt of {len(sample.prompt)} tokens", made) from made
        logprobs = np.asarray(made.logprobs, dtype=np.float32)
        if not np.isfinite(logprobs).all():
            raise weights_diverged(self.version)
        self._left[sample.key] -= 1
        if self._left[sample.key] == 0:
            del self._left[sample.key]
        return Finished(
            key=sample.key,
            sample=sample.index,
            tokens=np.asarray(made.tokens, dtype=np.int32),
            logprobs=logprobs,
            versions=np.asarray(made.versions, dtype=np.int32),
            truncated=not made.stopped,
        )

    def _drop(self, sample: Sample) -> None:
        if sample.future is not None:
            sample.future.cancel()

    # --- the engine's thread ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    async def _begin(self) -> None:
        await self._start()
        if self._endpoint is not None:
            await self._endpoint.start(await self._application())

    async def _end(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.stop()
        await self._stop()

    async def _run(self, sample: Sample) -> None:
        try:
            made: Made | Exception = await self._generate(sample)
        except Exception as error:  # any failure belongs to the thread that asked
            made = error
        self._results.put((sample, made))

    def _call(self, work: Coroutine[Any, Any, T], limit_s: float, what: str) -> T:
        """Run a backend's coroutine to its end from the caller's thread."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        until = time.monotonic() + limit_s
        try:
            while not future.done() and time.monotonic() < until and self._death() is None:
                wait([future], timeout=LOOK_S)
                if self._client is not None:
                    self._client.raise_if_ended()
        except BusError:
            future.cancel()
            raise
        if not future.done():
            future.cancel()
            self._raise_if_dead()
            raise EngineDied(f"{self.name} did not {what} within {limit_s:g} s")
        try:
            return future.result()
        except EngineError:
            raise
        except Exception as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: Exception) -> Exception:
        """What to raise for a backend's error: a fresh process may do better, unless the backend says what is wrong."""
        if isinstance(error, EngineError):
            return error
        return EngineDied(f"{self.name} could not {what}: {self._death() or f'{type(error).__name__}: {error}'}")

    def _raise_if_dead(self) -> None:
        death = self._death()
        if death is not None and not self._closed:
            raise EngineDied(f"{self.name} died: {death}")
