"""The interface of every engine: what the rollout and the evaluator may ask of whatever generates their text.

The caller owns the loop: it submits requests, calls `advance` again and again, and takes samples as they finish. One
thread calls all methods. Invariant: every token that comes out carries the weight version that sampled it and its
log-probability under the distribution it was drawn from, whatever happened to the weights in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.messages import Sampling
from shared.weights.errors import WeightsError

if TYPE_CHECKING:
    from shared.config.schema import InFlight
    from shared.models.images import ImageReader, Pixels
    from shared.weights import StagedWeights, TensorSpec


class EngineError(Exception):
    """The engine cannot do what was asked; the text says what was expected, what came, and what to do."""


class EngineDied(Exception):
    """A process of the engine ended by itself: the replica has to begin anew; the text says which, and how."""


class PromptTooLong(EngineError):
    """The prompt leaves no room for a single new token in the model's context."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The tokens that a sample has so far, of this engine or of another; arrays as those of `Finished`."""

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray

    def ended(self, limit: int, stops: Container[int]) -> bool:
        """Whether there is nothing left to generate: it fills its limit, or its last token is a stop token."""
        return len(self.tokens) >= limit or int(self.tokens[-1]) in stops


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to answer `samples` times; `key` is the caller's (hashable) name for it while it is in flight.

    `seed` decides every draw of a `seeded` engine: the same (seed, sample) draws the same, whatever else runs.
    Temperature 0 is greedy: the likeliest token, with its log-probability under temperature 1 and no truncation.

    `prompt` is the sequence that the model reads, token for token. Each of `images` (uint8 [height, width, 3], in
    order) has its run of image tokens there, as many as its size makes: `shared.models.images.ImageReader.expand`.

    `begun` is empty or has an entry a sample: the tokens to go on from, or None. They count towards the length limit,
    and come back at the front of `Finished` as they are; a sample that they end is finished as it stands.
    """

    key: Any
    prompt: Sequence[int]
    samples: int
    sampling: Sampling
    seed: int
    images: Sequence[np.ndarray] = ()
    begun: Sequence[Begun | None] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """One sample of a request. Arrays have one entry a generated token, the stop token included.

    `tokens` int32; `logprobs` float32, after temperature, top-k and top-p; `versions` int32. `truncated` means that
    the sample ran into its length limit before a stop token.
    """

    key: Any
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    truncated: bool


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Load and speed: sequences running and queued, tokens generated so far, and the seconds spent at it.

    `kv_use` is the share of the KV cache in use, `prefix_hits` the share of prompt tokens found in the prefix cache.
    """

    running: int
    queued: int
    tokens: int
    busy_seconds: float
    kv_use: float = 0.0
    prefix_hits: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per busy second, 0 before the first token."""
        return self.tokens / self.busy_seconds if self.busy_seconds > 0 else 0.0


class Engine(ABC):
    """Generates samples from prompts with weights that may be replaced while sequences are in flight."""

    version: int
    """Version of the weights that sample the next token."""
    context: int
    """Most tokens of prompt and response together."""
    manifest: Sequence[TensorSpec]
    """The tensors that `update` wants."""
    seeded: bool = True
    """Whether a request's seed decides its draws; where it does not, they are random, of the same distribution."""
    resumes_draws: bool = False
    """Whether a sample that was begun goes on with the draws that it would have had if nothing had interrupted it.

    In other `seeded` engines its next draws follow from the seed and the number of tokens that it has.
    """

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queue a request. Raises `PromptTooLong`, or `EngineError` for a key in flight or an empty prompt.

        EngineError, too, for images that the model cannot read, or that the prompt has no right place for.
        """

    @abstractmethod
    def abort(self, key: Hashable) -> dict[int, Begun]:
        """Forget a request, its queued and running samples alike; what these have so far, by sample.

        Samples without a token and those that `advance` has returned are left out. Unknown keys are ignored. EngineDied
        if a process of the engine has ended.
        """

    @abstractmethod
    def advance(self) -> list[Finished]:
        """Do one bounded piece of work, or wait shortly for it; return the samples that finished.

        EngineError if the model's logits are no numbers, EngineDied if a process of the engine has ended.
        """

    @abstractmethod
    def pause(self) -> None:
        """Stop between two tokens; sequences in flight keep their tokens and their KV. `advance` does nothing now."""

    @abstractmethod
    def update(self, weights: StagedWeights, version: int, in_flight: InFlight = "keep") -> None:
        """Replace all weights while paused; later tokens carry `version`. EngineError if not paused, WeightsError.

        Sequences in flight go on with the keys and values that they have ("keep"), get them computed again by the new
        weights ("recompute"), or begin again ("abort"), without what they were begun with, too. No prompt that starts
        from now on meets those of older weights.
        """

    @abstractmethod
    def resume(self) -> None:
        """Go on where `pause` stopped."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """What is going on, from counters; cheap."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory and processes. The engine is unusable afterwards."""


def room_for(request: Request, context: int, in_flight: Container[Hashable]) -> int:
    """Most tokens that a response to `request` can have; what `submit` raises for one that cannot be taken."""
    if request.key in in_flight:
        raise EngineError(f"request {request.key!r} is in flight already; abort it, or choose another key")
    if not request.prompt or request.samples < 1:
        raise EngineError(
            f"request {request.key!r} wants a prompt of at least one token and at least one sample; "
            f"it has {len(request.prompt)} tokens and {request.samples} samples"
        )
    arrays = [{len(b.tokens), len(b.logprobs), len(b.versions)} for b in request.begun if b is not None]
    if len(request.begun) not in (0, request.samples) or any(len(sizes) != 1 or 0 in sizes for sizes in arrays):
        raise EngineError(
            f"request {request.key!r} wants to go on from {len(request.begun)} samples of {request.samples}; give an "
            "entry a sample: None, or at least one token with as many log-probabilities and versions"
        )
    room = context - len(request.prompt)
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {len(request.prompt)} tokens, but the model's context of {context} tokens must "
            "hold it and at least one new token; shorten the prompt or take a model with a longer context"
        )
    return room


def pixels_of(request: Request, reader: ImageReader | None) -> Pixels | None:
    """The request's images as the model takes them, None without any; what `submit` raises for those it cannot."""
    if reader is None:
        if request.images:
            raise EngineError(
                f"request {request.key!r} has {len(request.images)} images, but the model reads text alone; "
                "leave them out, or take a vision-language model"
            )
        return None
    from shared.models.errors import ImageError

    try:
        return reader.read(request.prompt, request.images)
    except ImageError as error:
        raise EngineError(f"request {request.key!r}: {error}") from error


def finished_as_begun(request: Request, limit: int, stops: Container[int]) -> dict[int, Finished]:
    """The samples of a request that are whole as they were begun, by sample."""
    return {
        index: Finished(
            request.key, index, begun.tokens, begun.logprobs, begun.versions, int(begun.tokens[-1]) not in stops
        )
        for index, begun in enumerate(request.begun)
        if begun is not None and begun.ended(limit, stops)
    }


def weights_diverged(version: int) -> EngineError:
    """The error of logits that are no numbers."""
    return EngineError(
        f"the model's logits under weight version {version} are no finite numbers, so no token can be drawn; "
        "training has diverged: lower the learning rate or the clip range"
    )


def check_update(paused: bool, wanted: Sequence[TensorSpec], weights: StagedWeights) -> None:
    """What every engine's `update` asks first."""
    if not paused:
        raise EngineError("weights are replaced between two tokens: call pause() before update()")
    if list(wanted) != weights.area.manifest:
        got = {spec.name: spec for spec in weights.area.manifest}
        own = {spec.name: spec for spec in wanted}
        name = next((name for name in own | got if own.get(name) != got.get(name)), "their order")
        raise WeightsError(f"weights {name!r}: expected {own.get(name)}, got {got.get(name)}")
