"""The transformers engine: continuous batching of a plain Hugging Face causal LM, the default on a CPU.

A fixed number of slots; each running sequence has one. A prompt is prefilled once for all of its samples that fit, its
keys and values are copied to their slots, and from then on every `advance` decodes one token of all running sequences
in one batch. A sequence that ends leaves at once and the next one in the queue takes its place. (transformers' own
continuous batching knows neither seeds per request nor weight versions, and packs a batch into one row, whose masked
attention grows with the square of the batch on a CPU.)

Weights are swapped between two steps; sequences in flight keep the keys and values of their older weights. Invariant:
what is generated depends on the order of submissions and updates alone, so equal submissions give equal bits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from shared.engines.base import Engine, EngineError, EngineStats, Finished, PromptTooLong, Request
from shared.engines.rows import Arrival, Rows
from shared.engines.sampling import as_int64, stream_keys
from shared.engines.slots import SlotCache
from shared.weights import load_into, manifest_of

PREFILL_TOKENS = 4096
"""Padded prompt tokens in one prefill forward; bounds its memory. A single longer prompt goes alone."""


@dataclass(slots=True)
class _Waiting:
    """A request with samples that have no slot yet: those from `next_sample` on."""

    request: Request
    limit: int
    streams: list[int]
    next_sample: int = 0


class TransformersEngine(Engine):
    """Generates with `model` on its own device, up to `slots` sequences side by side; `stops` are stop token ids."""

    def __init__(self, model: PreTrainedModel, *, slots: int, stops: Iterable[int], version: int = -1) -> None:
        self.context = int(model.config.max_position_embeddings)
        _refuse_sliding_window(model)
        self._model = model.eval()
        self._slots = slots
        self._stops = torch.tensor(sorted(set(stops)), dtype=torch.int64)
        self._cache = SlotCache(slots, self.context)
        self._rows = Rows(slots)
        self._waiting: deque[_Waiting] = deque()
        self._keys: dict[Hashable, int] = {}  # samples still to come
        self._columns = torch.arange(self.context)
        self._paused = False
        self._tokens = 0
        self._busy = 0.0
        self.version = version
        self.manifest = manifest_of(model)

    def submit(self, request: Request) -> None:
        if request.key in self._keys:
            raise EngineError(f"request {request.key!r} is in flight already; abort it, or choose another key")
        if not request.prompt or request.samples < 1:
            raise EngineError(
                f"request {request.key!r} wants a prompt of at least one token and at least one sample; "
                f"it has {len(request.prompt)} tokens and {request.samples} samples"
            )
        room = self.context - len(request.prompt)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(request.prompt)} tokens, but the model's context of {self.context} tokens must "
                "hold it and at least one new token; shorten the prompt or take a model with a longer context"
            )
        seeds = torch.full((request.samples,), as_int64(request.seed))
        streams = stream_keys(seeds, torch.arange(request.samples)).tolist()
        self._waiting.append(_Waiting(request, min(request.sampling.max_new_tokens, room), streams))
        self._keys[request.key] = request.samples

    @torch.inference_mode()  # the cache was made in inference mode and may be written in it alone
    def abort(self, key: Hashable) -> None:
        if self._keys.pop(key, None) is None:
            return
        self._waiting = deque(w for w in self._waiting if w.request.key != key)
        self._release([row for row, (owner, _) in enumerate(self._rows.owners) if owner == key])

    @torch.inference_mode()
    def advance(self) -> list[Finished]:
        if self._paused or not (self._waiting or self._rows.count):
            return []
        started = time.perf_counter()
        finished = self._admit()
        if self._rows.count:
            finished += self._decode()
        self._busy += time.perf_counter() - started
        return finished

    def pause(self) -> None:
        self._paused = True

    def update(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        if not self._paused:
            raise EngineError("weights are replaced between two tokens: call pause() before update()")
        load_into(self._model, tensors)
        self.version = version

    def resume(self) -> None:
        self._paused = False

    def stats(self) -> EngineStats:
        queued = sum(w.request.samples - w.next_sample for w in self._waiting)
        return EngineStats(running=self._rows.count, queued=queued, tokens=self._tokens, busy_seconds=self._busy)

    def close(self) -> None:
        self._waiting.clear()
        self._keys.clear()
        self._cache = SlotCache(0, self.context)
        self._rows = Rows(0)
        self._paused = True

    def _admit(self) -> list[Finished]:
        """Give free slots to waiting samples and draw their first tokens, until slots or samples run out."""
        finished: list[Finished] = []
        # A prefill of one sample costs nearly as much as that of several: wait until a few slots are free.
        while self._waiting:
            free = self._slots - self._rows.count
            first = self._waiting[0]
            wanted = min(first.request.samples - first.next_sample, max(1, self._slots // 8))
            if free < wanted:
                break
            finished += self._prefill(self._next_prompts(free))
        return finished

    def _next_prompts(self, free: int) -> list[tuple[_Waiting, range]]:
        """Waiting samples for `free` slots, by prompt, within the padded size of one prefill."""
        chosen: list[tuple[_Waiting, range]] = []
        longest = 0
        while self._waiting and free:
            waiting = self._waiting[0]
            longest = max(longest, len(waiting.request.prompt))
            if chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            stop = min(waiting.request.samples, waiting.next_sample + free)
            chosen.append((waiting, range(waiting.next_sample, stop)))
            free -= stop - waiting.next_sample
            waiting.next_sample = stop
            if stop == waiting.request.samples:
                self._waiting.popleft()
        return chosen

    def _prefill(self, prompts: list[tuple[_Waiting, range]]) -> list[Finished]:
        """Run the prompts once each, copy them into the rows of their samples, draw the first tokens."""
        lengths = torch.tensor([len(waiting.request.prompt) for waiting, _ in prompts])
        padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for index, (waiting, _) in enumerate(prompts):
            padded[index, : lengths[index]] = torch.as_tensor(waiting.request.prompt)
        # Padding is on the right, where causal attention of the prompt itself never looks: no mask is needed.
        cache = DynamicCache()
        ends, end_of = torch.unique(lengths - 1, return_inverse=True)
        output = self._model(padded, past_key_values=cache, use_cache=True, logits_to_keep=ends)
        last_logits = output.logits[torch.arange(len(prompts)), end_of]
        rows = self._rows.add([_arrival(waiting, sample) for waiting, samples in prompts for sample in samples])
        sources = torch.repeat_interleave(torch.tensor([len(samples) for _, samples in prompts]))
        self._cache.place(cache, sources, rows)
        return self._take(rows, last_logits[sources])

    def _decode(self) -> list[Finished]:
        """One token of every running sequence."""
        count = self._rows.count
        positions = self._rows.lengths[:count]
        span = int(positions.max()) + 1
        self._cache.begin_step(positions, span)
        seen = self._columns[:span] <= positions[:, None]
        mask = torch.zeros(seen.shape, dtype=self._model.dtype).masked_fill_(~seen, -torch.inf)[:, None, None, :]
        output = self._model(
            self._rows.last[:count, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        positions += 1
        return self._take(torch.arange(count), output.logits[:, -1])

    def _take(self, rows: torch.Tensor, logits: torch.Tensor) -> list[Finished]:
        ended = self._rows.take(rows, logits, self._stops, self.version)
        self._tokens += rows.shape[0]
        finished = [self._rows.finished(row, self._stops) for row in ended]
        for sample in finished:
            self._keys[sample.key] -= 1
            if self._keys[sample.key] == 0:
                del self._keys[sample.key]
        self._release(ended)
        return finished

    def _release(self, rows: list[int]) -> None:
        if rows:
            sources, targets = self._rows.release(rows)
            if len(sources):
                self._cache.move(sources, targets, int(self._rows.lengths[targets].max()))


def _arrival(waiting: _Waiting, sample: int) -> Arrival:
    sampling = waiting.request.sampling
    greedy = sampling.temperature == 0
    return Arrival(
        key=waiting.request.key,
        sample=sample,
        prompt_length=len(waiting.request.prompt),
        limit=waiting.limit,
        stream=waiting.streams[sample],
        temperature=sampling.temperature,
        top_k=0 if greedy else sampling.top_k,
        top_p=1.0 if greedy else sampling.top_p,
    )


def _refuse_sliding_window(model: PreTrainedModel) -> None:
    """Every sequence attends to all of its tokens here; a model that mixes in shorter windows needs another engine."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise EngineError(
            f"the transformers engine runs models whose layers all use full attention; this one "
            f"({model.config.model_type}) has layers of kind {', '.join(sorted(kinds))}: choose another engine or model"
        )
