"""An engine that comes with a loop and processes of its own (vLLM, SGLang), behind the interface of all engines.

    caller's thread: submit, advance, pause, update, ...        engine's thread: asyncio loop with one task a sample
         queue of samples --up to `slots` at a time--> _generate(sample) --result--> queue --advance--> Finished

All bookkeeping is on the caller's thread; the loop only runs what a backend's coroutines do. Samples wait here, not in
the backend, until a slot is free, so that each starts with the weights of that moment: its `epoch` (the number of
updates so far) goes to the backend, which keeps prefixes of different epochs apart. A sample that was begun elsewhere
is to the backend one with a longer prompt and a lower limit. Invariant: results of samples that were aborted, or began
again, are dropped by identity.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from shared.bus import BusClient
from shared.config.schema import InFlight
from shared.engines.base import (
    Begun,
    Engine,
    EngineStats,
    Finished,
    Request,
    check_update,
    finished_as_begun,
    pixels_of,
    room_for,
    weights_diverged,
)
from shared.engines.endpoint import Application, Endpoint
from shared.engines.sampling import as_int64, stream_keys
from shared.engines.thread import EngineThread
from shared.messages import Sampling
from shared.models.images import ImageReader, Pixels
from shared.weights import StagedWeights, TensorSpec

WAIT_S = 0.005
"""Longest that `advance` waits for a sample to finish."""
ABORT_S = 0.05
"""How often a sample that shall end is told so again: the backend may not have heard of it yet."""
PAUSED_S = 0.2
"""Longest wait for what a paused backend has made of such a sample: it may not get to it before it goes on."""


@dataclass(slots=True, eq=False)
class Sample:
    """One sample to generate, as a backend sees it.

    `name` is unique among all samples of this engine, and none begins with another; `stream` (63 bits) seeds its draws;
    `pixels` are of its images; `epoch` numbers the weights. `prompt` ends with the tokens of `begun`, which the result
    lacks.
    """

    name: str
    key: Hashable
    index: int
    prompt: Sequence[int]
    sampling: Sampling
    limit: int
    stream: int
    pixels: Pixels | None = None
    epoch: int = 0
    begun: Begun | None = None
    future: Future[Made | Exception] | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """What a backend made of a sample: token ids, their log-probabilities and versions, whether it ran into a stop.

    Of one that was aborted, the tokens so far.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    stopped: bool


@dataclass(slots=True)
class _Asked:
    """A request in flight, the pixels of its images, and how many of its samples are still to be returned."""

    request: Request
    limit: int
    streams: list[int]
    left: int
    pixels: Pixels | None


@dataclass(slots=True)
class Report:
    """What a backend counts: tokens generated so far, and what EngineStats says of its KV cache."""

    tokens: int = 0
    kv_use: float = 0.0
    prefix_hits: float = 0.0


class HostedEngine(Engine):
    """What all such engines share. A backend is started by `_start`, on the engine's thread, within `start_s`.

    `stops` are stop token ids; every other call into the backend has to end within `call_s`. With `serve`, the engine
    answers people, too, on that port of loopback. A vision-language model wants what reads its `images`. With `client`,
    that of the replica's rank 0, the workers join the replica on the bus while they start.
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
        images: ImageReader | None = None,
        serve: int | None = None,
        client: BusClient | None = None,
    ) -> None:
        self.version = -1
        self.context = context
        self.manifest = manifest
        self._slots = slots
        self._stops = sorted(set(stops))
        self._call_s = call_s
        self._images = images
        self._client = client
        self._waiting: deque[Sample] = deque()
        self._running: dict[tuple[Hashable, int], Sample] = {}
        self._asked: dict[Hashable, _Asked] = {}
        self._whole: list[Finished] = []  # came finished
        self._results: queue.SimpleQueue[tuple[Sample, Made | Exception]] = queue.SimpleQueue()
        self._names = itertools.count()
        self._epoch = 0
        self._paused = False
        self._closed = False
        self._busy = 0.0
        self._busy_since: float | None = None
        self._endpoint = Endpoint(serve, lambda: self._epoch) if serve is not None else None
        self._thread = EngineThread(self.name, self._death, client)
        try:
            self._thread.call(self._begin(), start_s, "start")
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
        """Generate one sample, or what there is of it when `_abort` is called; cancelled when nobody wants it."""

    @abstractmethod
    async def _abort(self, sample: Sample) -> None:
        """Have a running sample end where it is. It may have ended, or not have begun; called again until it ends."""

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
        limit = min(request.sampling.max_new_tokens, room_for(request, self.context, self._asked))
        pixels = pixels_of(request, self._images)
        seeds = torch.full((request.samples,), as_int64(request.seed))
        streams = stream_keys(seeds, torch.arange(request.samples)).tolist()
        self._asked[request.key] = asked = _Asked(request, limit, streams, request.samples, pixels)
        whole = finished_as_begun(request, limit, self._stops)
        self._whole += whole.values()
        for index in range(request.samples):
            if index not in whole:
                self._waiting.append(self._sample(asked, index, request.begun[index] if request.begun else None))
        self._admit()

    def abort(self, key: Hashable) -> dict[int, Begun]:
        if self._asked.pop(key, None) is None:
            return {}
        begun = {s.sample: Begun(s.tokens, s.logprobs, s.versions) for s in self._whole if s.key == key}
        self._whole = [sample for sample in self._whole if sample.key != key]
        begun |= {s.index: s.begun for s in self._waiting if s.key == key and s.begun is not None}
        self._waiting = deque(sample for sample in self._waiting if sample.key != key)
        running = [self._running.pop(place) for place in list(self._running) if place[0] == key]
        if running:
            self._thread.call(self._end_early(running), self._call_s, "abort a prompt")
        for sample in running:
            made = _so_far(sample)
            if made is not None:
                begun[sample.index] = made
        self._admit()
        return begun

    def advance(self) -> list[Finished]:
        self._thread.raise_if_dead()
        if self._paused:
            return []
        finished = self._take_whole()
        if not self._running:
            return finished
        first = not finished
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
        self._thread.call(self._pause(), self._call_s, "pause")
        self._paused = True

    def update(self, weights: StagedWeights, version: int, in_flight: InFlight = "keep") -> None:
        check_update(self._paused, self.manifest, weights)
        if in_flight == "abort":
            self._begin_anew()
        self._thread.call(self._load(weights, version, in_flight == "recompute"), self._call_s, "take new weights")
        self.version = version
        self._epoch += 1

    def resume(self) -> None:
        self._thread.call(self._resume(), self._call_s, "resume")
        self._paused = False
        self._admit()

    def stats(self) -> EngineStats:
        busy = self._busy + (time.perf_counter() - self._busy_since if self._busy_since is not None else 0.0)
        own = self._report()
        queued = len(self._waiting) + len(self._whole)
        return EngineStats(len(self._running), queued, own.tokens, busy, own.kv_use, own.prefix_hits)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        for sample in self._running.values():
            self._drop(sample)
        self._running.clear()
        self._whole.clear()
        self._asked.clear()
        self._thread.stop(self._end(), self._call_s)

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while not self._paused and self._waiting and len(self._running) < self._slots:
            sample = self._waiting.popleft()
            sample.epoch = self._epoch
            self._running[sample.key, sample.index] = sample
            sample.future = self._thread.start(self._run(sample))
        if self._running and self._busy_since is None:
            self._busy_since = time.perf_counter()
        elif not self._running and self._busy_since is not None:
            self._busy += time.perf_counter() - self._busy_since
            self._busy_since = None

    def _sample(self, asked: _Asked, index: int, begun: Begun | None) -> Sample:
        """A sample to generate, from its prompt or from what was begun.

        Draws that go on have a stream of their own: the sample's would begin with those that made the first tokens.
        """
        request, stream = asked.request, asked.streams[index]
        tokens: list[int] = begun.tokens.tolist() if begun is not None else []
        if tokens:
            stream = int(stream_keys(torch.tensor([stream]), torch.tensor([len(tokens)])))
        return Sample(
            f"{next(self._names)}.",
            request.key,
            index,
            [*request.prompt, *tokens],
            request.sampling,
            asked.limit - len(tokens),
            stream & ((1 << 63) - 1),
            asked.pixels,
            begun=begun,
        )

    def _begin_anew(self) -> None:
        """Throw away what samples have so far; running ones are queued again, before those that wait."""
        for sample in self._running.values():
            self._drop(sample)
        again = [*self._running.values(), *self._waiting]
        self._running.clear()
        self._waiting = deque(self._sample(self._asked[sample.key], sample.index, None) for sample in again)

    def _take_whole(self) -> list[Finished]:
        """The samples that came finished."""
        whole, self._whole = self._whole, []
        for sample in whole:
            self._count_off(sample.key)
        return whole

    def _count_off(self, key: Hashable) -> None:
        asked = self._asked[key]
        asked.left -= 1
        if asked.left == 0:
            del self._asked[key]

    def _finish(self, sample: Sample, made: Made | Exception) -> Finished:
        del self._running[sample.key, sample.index]
        if isinstance(made, Exception):
            raise self._thread.failed(f"answer a prompt of {len(sample.prompt)} tokens", made) from made
        whole = _joined(sample, made)
        if not np.isfinite(whole.logprobs).all():
            raise weights_diverged(self.version)
        self._count_off(sample.key)
        return Finished(sample.key, sample.index, whole.tokens, whole.logprobs, whole.versions, not made.stopped)

    def _drop(self, sample: Sample) -> None:
        if sample.future is not None:
            sample.future.cancel()

    # --- the engine's thread ----------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        await self._start()
        if self._endpoint is not None:
            await self._endpoint.start(await self._application())

    async def _end(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.stop()
        await self._stop()

    async def _run(self, sample: Sample) -> Made | Exception:
        try:
            made: Made | Exception = await self._generate(sample)
        except Exception as error:  # any failure belongs to the thread that asked
            made = error
        self._results.put((sample, made))
        return made

    async def _end_early(self, samples: list[Sample]) -> None:
        """Have running samples end where they are; those that don't are cancelled."""
        until = time.monotonic() + (PAUSED_S if self._paused else self._call_s / 2)
        ends = {asyncio.wrap_future(sample.future): sample for sample in samples if sample.future is not None}
        pending = set(ends)
        while pending and time.monotonic() < until:
            for end in pending:
                await self._abort(ends[end])
            _, pending = await asyncio.wait(pending, timeout=ABORT_S)
        for end in pending:
            end.cancel()


def _joined(sample: Sample, made: Made) -> Begun:
    """What a sample was begun with, and what the backend made of it."""
    tokens = np.asarray(made.tokens, dtype=np.int32)
    logprobs, versions = np.asarray(made.logprobs, dtype=np.float32), np.asarray(made.versions, dtype=np.int32)
    begun = sample.begun
    if begun is None:
        return Begun(tokens, logprobs, versions)
    return Begun(
        np.concatenate([begun.tokens, tokens]),
        np.concatenate([begun.logprobs, logprobs]),
        np.concatenate([begun.versions, versions]),
    )


def _so_far(sample: Sample) -> Begun | None:
    """What a sample that was ended early has; what it was begun with, if the backend does not tell."""
    future = sample.future
    made = future.result() if future is not None and future.done() and not future.cancelled() else None
    if not isinstance(made, Made) or not len(made.tokens) or not np.isfinite(made.logprobs).all():
        return sample.begun
    return _joined(sample, made)
