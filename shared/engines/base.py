"""The interface of every engine: what the rollout and the evaluator may ask of whatever generates their text.

The caller owns the loop: it submits requests, calls `advance` again and again, and takes samples as they finish. One
thread calls all methods. Invariant: every token that comes out carries the weight version that sampled it and its
log-probability under the distribution it was drawn from, whatever happened to the weights in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.messages import Sampling

if TYPE_CHECKING:
    import torch

    from shared.weights import TensorSpec


class EngineError(Exception):
    """The engine cannot do what was asked; the text says what was expected, what came, and what to do."""


class PromptTooLong(EngineError):
    """The prompt leaves no room for a single new token in the model's context."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to answer `samples` times; `key` is the caller's (hashable) name for it while it is in flight.

    `seed` decides every draw: the same (seed, sample, position) draws the same uniform number whatever else runs.
    Temperature 0 is greedy: the likeliest token, with its log-probability under temperature 1 and no truncation.
    """

    key: Any
    prompt: Sequence[int]
    samples: int
    sampling: Sampling
    seed: int


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
    """Load and speed: sequences running and queued, tokens generated so far, and the seconds spent at it."""

    running: int
    queued: int
    tokens: int
    busy_seconds: float

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

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queue a request. Raises `PromptTooLong`, or `EngineError` for a key in flight or an empty prompt."""

    @abstractmethod
    def abort(self, key: Hashable) -> None:
        """Forget a request, its queued and running samples alike. Unknown keys are ignored."""

    @abstractmethod
    def advance(self) -> list[Finished]:
        """Do one bounded piece of work (a decode step of all running sequences); return the samples that finished."""

    @abstractmethod
    def pause(self) -> None:
        """Stop between two tokens; sequences in flight keep their tokens and their KV. `advance` does nothing now."""

    @abstractmethod
    def update(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Replace all weights while paused; later tokens carry `version`. EngineError if not paused, WeightsError."""

    @abstractmethod
    def resume(self) -> None:
        """Go on where `pause` stopped."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """What is going on, from counters; cheap."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory and processes. The engine is unusable afterwards."""
