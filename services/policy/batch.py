"""From a TrainStep and its payload frames to padded micro-batches of tensors. Called by the trainer.

Invariant: the composition depends only on the step's content (longest sequence first, ties by group, attempt and
sample), so equal steps give equal micro-batches on every replica, run and replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.arrays import unpack
from shared.messages import AssignedGroup, TrainStep

Frame = bytes | memoryview


class BatchError(Exception):
    """A step whose payload does not fit its description; the text says what was expected and what came."""


@dataclass(frozen=True)
class TrainSequence:
    """One prompt with one sampled response; arrays are views of the payload frames."""

    group: int
    attempt: int
    sample: int
    prompt: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    advantage: float
    temperature: float

    @property
    def length(self) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class MicroBatch:
    """B sequences padded on the right to S positions, holding T response tokens, listed sequence after sequence.

    A model that is given `inputs` [B, S] and asked for the logits of the last `keep` positions gives [B * keep, V], in
    which the rows `picks` are the distributions of the response tokens `targets`.
    """

    inputs: Tensor  # int64 [B, S]
    attention: Tensor  # int64 [B, S], 1 on real tokens
    positions: Tensor  # int64 [B, S]
    keep: int
    picks: Tensor  # int64 [T]
    targets: Tensor  # int64 [T]
    lengths: Tensor  # int64 [B], response tokens of each sequence
    advantages: Tensor  # float32 [T]
    engine_logprobs: Tensor  # float32 [T]
    temperatures: Tensor  # float32 [T], what each token was sampled with

    @property
    def tokens(self) -> int:
        """T, the response tokens of this micro-batch."""
        return self.targets.numel()

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def sequences_of(step: TrainStep, frames: Sequence[Frame]) -> list[TrainSequence]:
    """The step's sequences in their canonical order: longest first, then by group, attempt, sample. BatchError."""
    wanted = sum(len(group.arrays) for group in step.groups)
    if wanted != len(frames):
        raise BatchError(
            f"step {step.step}: expected {wanted} payload frames for {len(step.groups)} groups, got {len(frames)}"
        )
    found: list[TrainSequence] = []
    start = 0
    for group in step.groups:
        found += _split(step.step, group, frames[start : start + len(group.arrays)])
        start += len(group.arrays)
    return sorted(found, key=lambda s: (-s.length, s.group, s.attempt, s.sample))


def _split(step: int, group: AssignedGroup, frames: Sequence[Frame]) -> list[TrainSequence]:
    where = f"step {step}, group {group.group} attempt {group.attempt}"
    try:
        arrays = unpack(group.arrays, frames)
    except ValueError as error:
        raise BatchError(f"{where}: {error}") from error
    total = sum(group.lengths)
    expected = {"prompt": group.prompt_length, "tokens": total, "logprobs": total}
    for name, size in expected.items():
        if name not in arrays or arrays[name].shape != (size,):
            got = f"shape {arrays[name].shape}" if name in arrays else "no such array"
            raise BatchError(f"{where}: array {name!r} should have shape ({size},), got {got}")
    if len(group.advantages) != len(group.lengths):
        raise BatchError(f"{where}: {len(group.lengths)} samples but {len(group.advantages)} advantages")
    if group.prompt_length < 1:
        raise BatchError(f"{where}: a prompt needs at least one token, got none")
    found = []
    start = 0
    for sample, (length, advantage) in enumerate(zip(group.lengths, group.advantages, strict=True)):
        part = slice(start, start + length)
        start += length
        found.append(
            TrainSequence(
                group.group, group.attempt, sample, arrays["prompt"], arrays["tokens"][part],
                arrays["logprobs"][part], advantage, group.temperature,
            )
        )  # fmt: skip
    return found


def micro_batches(sequences: Sequence[TrainSequence], limit: int, pad: int) -> list[MicroBatch]:
    """Sequences in the given order (longest first), cut so that B x S stays within `limit` padded tokens.

    A single sequence longer than `limit` still makes a micro-batch of its own. Sequences without a response token
    teach nothing and are left out; the global denominators count them.
    """
    batches: list[MicroBatch] = []
    current: list[TrainSequence] = []
    width = 0
    for sequence in sequences:
        if len(sequence.tokens) == 0:
            continue
        wider = max(width, sequence.length)
        if current and wider * (len(current) + 1) > limit:
            batches.append(_pad(current, pad))
            current, wider = [], sequence.length
        current.append(sequence)
        width = wider
    if current:
        batches.append(_pad(current, pad))
    return batches


def _pad(sequences: Sequence[TrainSequence], pad: int) -> MicroBatch:
    size = max(s.length for s in sequences)
    first_prediction = min(len(s.prompt) for s in sequences) - 1
    inputs = np.full((len(sequences), size), pad, dtype=np.int64)
    attention = np.zeros((len(sequences), size), dtype=np.int64)
    keep = size - first_prediction
    picks = []
    for row, s in enumerate(sequences):
        inputs[row, : len(s.prompt)] = s.prompt
        inputs[row, len(s.prompt) : s.length] = s.tokens
        attention[row, : s.length] = 1
        # the logits at position i are the distribution of the token at i + 1
        predicting = np.arange(len(s.prompt) - 1, s.length - 1, dtype=np.int64)
        picks.append(row * keep + predicting - first_prediction)
    lengths = [len(s.tokens) for s in sequences]
    advantages = np.repeat(np.array([s.advantage for s in sequences], dtype=np.float32), lengths)
    temperatures = np.repeat(np.array([s.temperature for s in sequences], dtype=np.float32), lengths)
    return MicroBatch(
        inputs=torch.from_numpy(inputs),
        attention=torch.from_numpy(attention),
        positions=torch.arange(size).expand(len(sequences), size),
        keep=keep,
        picks=torch.from_numpy(np.concatenate(picks)),
        targets=torch.from_numpy(np.concatenate([s.tokens for s in sequences]).astype(np.int64)),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        advantages=torch.from_numpy(advantages),
        engine_logprobs=torch.from_numpy(np.concatenate([s.logprobs for s in sequences]).astype(np.float32)),
        temperatures=torch.from_numpy(temperatures),
    )
