"""The transformers engine: continuous batching of a plain Hugging Face causal LM, the default on a CPU.

A fixed number of slots; each running sequence has one. A prompt is prefilled once for all of its samples that fit, its
keys and values are copied to their slots, and from then on every `advance` decodes one token of all running sequences
in one batch. A sequence that ends leaves at once and the next one in the queue takes its place. One that was begun
elsewhere is prefilled alone, with the tokens that it has. (transformers' own
continuous batching knows neither seeds per request nor weight versions, and packs a batch into one row, whose masked
attention grows with the square of the batch on a CPU.)

Weights are swapped between two steps. Invariant: what is generated depends on the order of submissions and updates
alone, so equal submissions give equal bits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from transformers import DynamicCache, PreTrainedModel

from shared.config.schema import InFlight, Quantization
from shared.engines.base import (
    Begun,
    Engine,
    EngineError,
    EngineStats,
    Finished,
    Request,
    check_update,
    finished_as_begun,
    pixels_of,
    room_for,
)
from shared.engines.quantization import quantize_dequantize, quantized_weights
from shared.engines.rows import Arrival, Rows
from shared.engines.sampling import as_int64, stream_keys
from shared.engines.slots import SlotCache
from shared.engines.vision import Sight, Vision
from shared.models.images import ImageReader
from shared.weights import StagedWeights, load_into, manifest_of

PREFILL_TOKENS = 4096
"""Padded prompt tokens in one prefill forward; bounds its memory. A single longer prompt goes alone."""


@dataclass(slots=True)
class _Asked:
    """A request in flight: the samples of it that have no slot yet, and how many are still to be returned.

    `sight` is of its images, None without any. `begun` are the tokens that queued samples go on from.
    """

    request: Request
    limit: int
    streams: list[int]
    queued: deque[int]
    left: int
    sight: Sight | None
    begun: dict[int, Begun]

    def next_alike(self, most: int) -> list[int]:
        """The next queued samples that one prefill serves: those of the prompt alone, or one that was begun."""
        first = self.queued[0]
        if first in self.begun:
            return [first]
        return list(takewhile(lambda sample: sample not in self.begun, list(self.queued)[:most]))

    def tokens(self, sample: int) -> list[int]:
        """What is prefilled for a queued sample."""
        begun = self.begun.get(sample)
        return [*self.request.prompt, *(begun.tokens.tolist() if begun is not None else ())]


class TransformersEngine(Engine):
    """Generates with `model` on its own device, up to `slots` sequences side by side; `stops` are stop token ids.

    A vision-language model wants what reads its `images`.
    """

    resumes_draws = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        stops: Iterable[int],
        version: int = -1,
        quantization: Quantization | None = None,
        images: ImageReader | None = None,
    ) -> None:
        self.context = int(model.config.get_text_config().max_position_embeddings)
        _refuse_sliding_window(model)
        self._model = model.eval()
        self._images = images
        self._vision = Vision(model, images) if images is not None else None
        self._quantization = quantization
        self._narrow = quantized_weights(model, quantization) if quantization is not None else {}
        self._slots = slots
        self._stops = torch.tensor(sorted(set(stops)), dtype=torch.int64)
        self._cache = SlotCache(slots, self.context)
        self._rows = Rows(slots)
        self._asked: dict[Hashable, _Asked] = {}  # in the order of their submission
        self._waiting: deque[_Asked] = deque()  # those with queued samples
        self._whole: list[Finished] = []  # came finished
        self._columns = torch.arange(self.context)
        self._paused = False
        self._tokens = 0
        self._busy = 0.0
        self.version = version
        self.manifest = manifest_of(model)
        self._round_weights()

    def submit(self, request: Request) -> None:
        limit = min(request.sampling.max_new_tokens, room_for(request, self.context, self._asked))
        pixels = pixels_of(request, self._images)
        sight = self._vision.sight(pixels, len(request.prompt)) if self._vision is not None else None
        seeds = torch.full((request.samples,), as_int64(request.seed))
        streams = stream_keys(seeds, torch.arange(request.samples)).tolist()
        whole = finished_as_begun(request, limit, self._stops.tolist())
        queued = deque(sample for sample in range(request.samples) if sample not in whole)
        begun = {sample: tokens for sample, tokens in enumerate(request.begun) if tokens is not None}
        asked = _Asked(request, limit, streams, queued, request.samples, sight, begun)
        self._asked[request.key] = asked
        self._whole += whole.values()
        if queued:
            self._waiting.append(asked)

    @torch.inference_mode()  # the cache was made in inference mode and may be written in it alone
    def abort(self, key: Hashable) -> dict[int, Begun]:
        asked = self._asked.pop(key, None)
        if asked is None:
            return {}
        self._waiting = deque(asked for asked in self._waiting if asked.request.key != key)
        rows = {row: sample for row, (owner, sample) in enumerate(self._rows.owners) if owner == key}
        queued = [*asked.queued, *(finished.sample for finished in self._whole if finished.key == key)]
        self._whole = [finished for finished in self._whole if finished.key != key]
        begun = {sample: asked.begun[sample] for sample in queued if sample in asked.begun}
        begun |= {sample: self._rows.made(row) for row, sample in rows.items()}
        self._release(list(rows))
        return begun

    @torch.inference_mode()
    def advance(self) -> list[Finished]:
        if self._paused or not (self._waiting or self._rows.count or self._whole):
            return []
        started = time.perf_counter()
        finished = self._take_whole() + self._admit()
        if self._rows.count:
            finished += self._decode()
        self._busy += time.perf_counter() - started
        return finished

    def pause(self) -> None:
        self._paused = True

    @torch.inference_mode()
    def update(self, weights: StagedWeights, version: int, in_flight: InFlight = "keep") -> None:
        check_update(self._paused, self.manifest, weights)
        load_into(self._model, weights.tensors)
        self._round_weights()
        self.version = version
        for asked in self._asked.values():
            if asked.sight is not None:
                asked.sight.features = None  # the old vision tower's
        if in_flight == "recompute":
            self._recompute()
        elif in_flight == "abort":
            self._begin_anew()

    def resume(self) -> None:
        self._paused = False

    def stats(self) -> EngineStats:
        queued = sum(len(asked.queued) for asked in self._waiting) + len(self._whole)
        used = self._rows.count / self._slots
        return EngineStats(self._rows.count, queued, self._tokens, self._busy, kv_use=used)

    def close(self) -> None:
        self._waiting.clear()
        self._whole.clear()
        self._asked.clear()
        self._cache = SlotCache(0, self.context)
        self._rows = Rows(0)
        self._paused = True

    @torch.no_grad()
    def _round_weights(self) -> None:
        """Put the numbers that the quantised format can hold in the place of the weights that came."""
        for weight in self._narrow.values():
            assert self._quantization is not None
            weight.copy_(quantize_dequantize(weight, self._quantization))

    def _admit(self) -> list[Finished]:
        """Give free slots to waiting samples and draw their first tokens, until slots or samples run out."""
        finished: list[Finished] = []
        # A prefill of one sample costs nearly as much as that of several: wait until a few slots are free.
        while self._waiting:
            free = self._slots - self._rows.count
            first = self._waiting[0]
            wanted = min(len(first.queued), max(1, self._slots // 8))
            if free < wanted:
                break
            finished += self._prefill(self._next_prompts(free))
        return finished

    def _next_prompts(self, free: int) -> list[tuple[_Asked, list[int]]]:
        """Waiting samples for `free` slots, by prompt, within the padded size of one prefill."""
        chosen: list[tuple[_Asked, list[int]]] = []
        longest = 0
        while self._waiting and free:
            asked = self._waiting[0]
            samples = asked.next_alike(free)
            longest = max(longest, len(asked.tokens(samples[0])))
            if chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            for _ in samples:
                asked.queued.popleft()
            chosen.append((asked, samples))
            free -= len(samples)
            if not asked.queued:
                self._waiting.popleft()
        return chosen

    def _prefill(self, prompts: list[tuple[_Asked, list[int]]]) -> list[Finished]:
        """Run the prompts once each, copy them into the rows of their samples, draw the first tokens."""
        cache, logits = self._forward([(asked, asked.tokens(samples[0])) for asked, samples in prompts])
        rows = self._rows.add([_arrival(asked, sample) for asked, samples in prompts for sample in samples])
        sources = torch.repeat_interleave(torch.tensor([len(samples) for _, samples in prompts]))
        self._cache.place(cache, sources, rows)
        return self._take(rows, logits[sources])

    def _forward(self, sequences: Sequence[tuple[_Asked, Sequence[int]]]) -> tuple[DynamicCache, torch.Tensor]:
        """Keys and values of all sequences, padded on the right, and the logits [sequences, vocabulary] at their ends.

        Each begins with the prompt of its request. Causal attention of a sequence itself never looks at the padding
        behind it: no mask is needed.
        """
        lengths = torch.tensor([len(tokens) for _, tokens in sequences])
        padded = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
        for row, (_, tokens) in enumerate(sequences):
            padded[row, : lengths[row]] = torch.as_tensor(tokens)
        cache = DynamicCache()
        ends, end_of = torch.unique(lengths - 1, return_inverse=True)
        inputs = {"input_ids": padded}
        if self._vision is not None:
            inputs = self._vision.inputs(padded, [asked.sight for asked, _ in sequences])
        output = self._model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=ends)
        return cache, output.logits[torch.arange(len(sequences)), end_of]

    def _recompute(self) -> None:
        """Make the keys and values of all running sequences again, with the weights as they are now."""
        rows: list[int] = []
        for row in range(self._rows.count):
            longest = int(self._rows.lengths[[*rows, row]].max())
            if rows and longest * (len(rows) + 1) > PREFILL_TOKENS:
                self._recompute_rows(rows)
                rows = []
            rows.append(row)
        if rows:
            self._recompute_rows(rows)

    def _recompute_rows(self, rows: list[int]) -> None:
        owners = [self._asked[self._rows.owners[row][0]] for row in rows]
        sequences = [[*asked.request.prompt, *self._rows.cached(row)] for asked, row in zip(owners, rows, strict=True)]
        cache, _ = self._forward(list(zip(owners, sequences, strict=True)))
        self._cache.place(cache, torch.arange(len(rows)), torch.tensor(rows))

    def _begin_anew(self) -> None:
        """Throw away what running samples have so far, and queue them again, in their old order."""
        for key, sample in self._rows.owners:
            self._asked[key].queued.append(sample)
        for asked in self._asked.values():
            asked.queued = deque(sorted(asked.queued))
            asked.begun.clear()
        self._waiting = deque(asked for asked in self._asked.values() if asked.queued)
        self._release(list(range(self._rows.count)))

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
            position_ids=(positions + self._rows.offsets[:count])[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        positions += 1
        return self._take(torch.arange(count), output.logits[:, -1])

    def _take(self, rows: torch.Tensor, logits: torch.Tensor) -> list[Finished]:
        ended = self._rows.take(rows, logits, self._stops, self.version)
        self._tokens += rows.shape[0]
        finished = self._given_out([self._rows.finished(row, self._stops) for row in ended])
        self._release(ended)
        return finished

    def _take_whole(self) -> list[Finished]:
        """The samples that came finished."""
        whole, self._whole = self._whole, []
        return self._given_out(whole)

    def _given_out(self, finished: list[Finished]) -> list[Finished]:
        for sample in finished:
            asked = self._asked[sample.key]
            asked.left -= 1
            if asked.left == 0:
                del self._asked[sample.key]
        return finished

    def _release(self, rows: list[int]) -> None:
        if rows:
            sources, targets = self._rows.release(rows)
            if len(sources):
                self._cache.move(sources, targets, int(self._rows.lengths[targets].max()))


def _arrival(asked: _Asked, sample: int) -> Arrival:
    sampling = asked.request.sampling
    greedy = sampling.temperature == 0
    return Arrival(
        key=asked.request.key,
        sample=sample,
        prompt_length=len(asked.request.prompt),
        offset=asked.sight.offset if asked.sight is not None else 0,
        limit=asked.limit,
        stream=asked.streams[sample],
        temperature=sampling.temperature,
        top_k=0 if greedy else sampling.top_k,
        top_p=1.0 if greedy else sampling.top_p,
        begun=asked.begun.get(sample),
    )


def _refuse_sliding_window(model: PreTrainedModel) -> None:
    """Every sequence attends to all of its tokens here; a model that mixes in shorter windows needs another engine."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise EngineError(
            f"the transformers engine runs models whose layers all use full attention; this one "
            f"({model.config.model_type}) has layers of kind {', '.join(sorted(kinds))}: choose another engine or model"
        )
