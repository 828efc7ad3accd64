"""One engine in its own environment, which measures what it is told to on stdin and answers with a line of JSON.

`python -m benchmarks.engine_speed.worker RECIPE ENGINE`; see __main__. Weights are the recipe's model before training,
which hardly ever stops by itself: lengths are set, drawn from a distribution with a long tail.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch

from shared.config import load_recipe
from shared.engines.base import Engine, Request
from shared.engines.load import load_engine
from shared.messages import Sampling
from shared.models import load_model
from shared.weights import StagedWeights, digest_of, manifest_of
from shared.weights.staging import allocate, load_tensors, named_weights

PROMPT, SAMPLES = 30, 8
SHORTEST, LONGEST = 8, 200


class Feed:
    """An endless stream of requests, equal for all engines."""

    def __init__(self, vocabulary: int) -> None:
        self._random = np.random.default_rng(7)
        self._vocabulary = vocabulary
        self._count = 0

    def __call__(self) -> Request:
        self._count += 1
        prompt = self._random.integers(0, self._vocabulary, PROMPT).tolist()
        length = int(np.clip(self._random.lognormal(3.4, 0.8), SHORTEST, LONGEST))
        return Request(f"{self._count}", prompt, SAMPLES, Sampling(1.0, 1.0, 0, length), self._count)


def throughput(engine: Engine, feed: Feed, requests: int) -> dict[str, float]:
    """All requests at once, until the last sample is out."""
    began, tokens, samples = time.perf_counter(), 0, 0
    for _ in range(requests):
        engine.submit(feed())
    while engine.stats().running or engine.stats().queued:
        for sample in engine.advance():
            tokens += len(sample.tokens)
            samples += 1
    seconds = time.perf_counter() - began
    return {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}


def in_flight(engine: Engine, feed: Feed, weights: StagedWeights, count: int, every: int) -> dict[str, float]:
    """`count` updates, one for every `every` tokens, while work is always waiting."""
    began, tokens, pauses = time.perf_counter(), 0, 0.0
    for version in range(count):
        while tokens < every * (version + 1):
            while engine.stats().queued < SAMPLES:
                engine.submit(feed())
            tokens += sum(len(sample.tokens) for sample in engine.advance())
        pauses += update(engine, weights, version)
    seconds = time.perf_counter() - began
    while engine.stats().running or engine.stats().queued:
        engine.advance()
    return {"tokens_per_second": tokens / seconds, "pause_seconds": pauses / count}


def drain_and_wait(engine: Engine, feed: Feed, weights: StagedWeights, count: int, every: int) -> dict[str, float]:
    """`count` updates, each once requests of `every` tokens in all are answered."""
    began, tokens, pauses = time.perf_counter(), 0, 0.0
    for version in range(count):
        asked = 0
        while asked < every:
            request = feed()
            asked += SAMPLES * request.sampling.max_new_tokens
            engine.submit(request)
        while engine.stats().running or engine.stats().queued:
            tokens += sum(len(sample.tokens) for sample in engine.advance())
        pauses += update(engine, weights, version)
    seconds = time.perf_counter() - began
    return {"tokens_per_second": tokens / seconds, "pause_seconds": pauses / count}


def update(engine: Engine, weights: StagedWeights, version: int) -> float:
    """Replace the weights; the seconds that the engine stood still."""
    began = time.perf_counter()
    engine.pause()
    engine.update(weights, version)
    engine.resume()
    return time.perf_counter() - began


def main() -> None:
    """Load, say so, and measure until stdin ends."""
    recipe = load_recipe(sys.argv[1], [f"rollout.engine={sys.argv[2]}"])
    torch.set_num_threads(recipe.rollout.threads)
    engine, tokenizer = load_engine(recipe, "rollout-0")
    model = load_model(recipe.model, recipe.run.seed, weights=True)
    area = allocate(manifest_of(model))
    load_tensors(area.tensors, named_weights(model))
    weights = StagedWeights(area, digest_of(area.tensors))
    update(engine, weights, 0)
    feed = Feed(len(tokenizer))
    throughput(engine, feed, 16)  # the first steps of an engine are slow
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["measure"] == "throughput":
            found = throughput(engine, feed, order["requests"])
        else:
            way = in_flight if order["measure"] == "keep" else drain_and_wait
            found = way(engine, feed, weights, order["count"], order["every"])
        print(json.dumps(found), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
