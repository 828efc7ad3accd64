"""From a TrainStep and its payload frames to padded micro-batches of tensors. Called by the trainer.

The samples of a group share their prompt, which is computed once for all that stand in one row (Prefix Grouper, arXiv
2506.05433): a row is prompt | response | response | ..., positions go on from the prompt's end in every response, and
attention shows each response the prompt and itself. Log-probabilities and gradients are those of separate rows.

Invariant: the composition depends only on the step's content (longest row first, ties by group, attempt and sample),
so equal steps give equal micro-batches on every replica, run and replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
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
    replica: str = ""


@dataclass(frozen=True)
class Row:
    """One prompt, and those of its responses that stand behind it."""

    responses: tuple[TrainSequence, ...]

    @property
    def prompt(self) -> np.ndarray:
        """Token ids of the prompt of all responses."""
        return self.responses[0].prompt

    @property
    def length(self) -> int:
        """Tokens of the prompt and all responses together."""
        return len(self.prompt) + sum(len(s.tokens) for s in self.responses)


@dataclass(frozen=True)
class MicroBatch:
    """B rows padded on the right to S positions, holding the T tokens of N responses, listed row after row.

    A model that is given `inputs` [B, S] and asked for the logits of the last `keep` positions gives [B * keep, V], in
    which the rows `picks` are the distributions of the response tokens `targets`.
    """

    inputs: Tensor  # int64 [B, S]
    parts: Tensor  # int64 [B, S], 0 on the prompt, k on the k-th response, -1 on padding
    positions: Tensor  # int64 [B, S]
    keep: int
    picks: Tensor  # int64 [T]
    targets: Tensor  # int64 [T]
    lengths: Tensor  # int64 [N], tokens of each response
    advantages: Tensor  # float32 [T]
    engine_logprobs: Tensor  # float32 [T]
    temperatures: Tensor  # float32 [T], what each token was sampled with
    replicas: tuple[str, ...]  # [N], who sampled each response

    @property
    def tokens(self) -> int:
        """T, the response tokens of this micro-batch."""
        return self.targets.numel()

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What attention adds to its scores, [B, 1, S, S]: 0 where a position sees another, -inf elsewhere.

        A position sees the earlier ones of its own part and the whole prompt. (Padding sees the prompt too: a row of
        -inf alone would give NaN.)
        """
        seen = (self.parts[:, None, :] == self.parts[:, :, None]) | (self.parts[:, None, :] == 0)
        hidden = torch.zeros((), dtype=dtype, device=seen.device).expand(seen.shape)
        return hidden.masked_fill(~seen.tril_(), -torch.inf)[:, None]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def sequences_of(step: TrainStep, frames: Sequence[Frame]) -> list[TrainSequence]:
    """The step's sequences in their canonical order: by group, attempt, sample. BatchError."""
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
    return sorted(found, key=lambda s: (s.group, s.attempt, s.sample))


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
                arrays["logprobs"][part], advantage, group.temperature, group.replica,
            )
        )  # fmt: skip
    return found


def rows_of(sequences: Sequence[TrainSequence], limit: int, width: int) -> list[Row]:
    """Sequences in their canonical order gathered into rows of at most `limit` tokens, longest row first.

    A group may take several rows: where it must, and where sharing would cost more than it saves in a model whose
    hidden states are `width` wide. A sequence that is longer than `limit` has a row of its own. Sequences without a
    response token teach nothing and are left out; the global denominators count them.
    """
    rows: list[Row] = []
    for _, samples in groupby(sequences, key=lambda s: (s.group, s.attempt)):
        row: Row | None = None
        for sample in samples:
            if len(sample.tokens) == 0:
                continue
            if row is not None and row.length + len(sample.tokens) <= limit and _shares(row, sample, width):
                row = Row((*row.responses, sample))
            else:
                if row is not None:
                    rows.append(row)
                row = Row((sample,))
        if row is not None:
            rows.append(row)
    # sorting is stable: rows of equal length stay in the order of their groups, attempts and samples
    return sorted(rows, key=lambda row: -row.length)


def _shares(row: Row, sample: TrainSequence, width: int) -> bool:
    """Whether the sample costs less in this row than with a prompt of its own.

    Attention under a mask computes all pairs of a row, those between responses too, so that long rows cost more than
    they save. A pair takes 4 x width operations in a layer; a token takes 24 x width^2, as much as 6 x width pairs.
    """
    alone = len(sample.prompt) + len(sample.tokens)
    pairs = (row.length + len(sample.tokens)) ** 2 - row.length**2 - alone**2
    return pairs < 6 * width * len(sample.prompt)


def micro_batches(rows: Sequence[Row], limit: int, pad: int) -> list[MicroBatch]:
    """Rows in the given order (longest first), cut so that B x S stays within `limit` padded tokens.

    A single row longer than `limit` still makes a micro-batch of its own.
    """
    batches: list[MicroBatch] = []
    current: list[Row] = []
    for row in rows:
        if current and current[0].length * (len(current) + 1) > limit:
            batches.append(_pad(current, pad))
            current = []
        current.append(row)
    if current:
        batches.append(_pad(current, pad))
    return batches


def _pad(rows: Sequence[Row], pad: int) -> MicroBatch:
    size = max(row.length for row in rows)
    first_prediction = min(len(row.prompt) for row in rows) - 1
    keep = size - first_prediction
    inputs = np.full((len(rows), size), pad, dtype=np.int64)
    parts = np.full((len(rows), size), -1, dtype=np.int64)
    positions = np.zeros((len(rows), size), dtype=np.int64)
    picks = []
    for index, row in enumerate(rows):
        end = len(row.prompt)
        inputs[index, :end], parts[index, :end], positions[index, :end] = row.prompt, 0, np.arange(end)
        start = end
        for part, response in enumerate(row.responses, start=1):
            here = slice(start, start + len(response.tokens))
            inputs[index, here], parts[index, here] = response.tokens, part
            positions[index, here] = np.arange(end, end + len(response.tokens))
            # the logits at a position are the distribution of the token after it; the first one comes after the prompt
            predicting = np.arange(here.start - 1, here.stop - 1, dtype=np.int64)
            predicting[0] = end - 1
            picks.append(index * keep + predicting - first_prediction)
            start = here.stop
    responses = [response for row in rows for response in row.responses]
    lengths = [len(s.tokens) for s in responses]
    advantages = np.repeat(np.array([s.advantage for s in responses], dtype=np.float32), lengths)
    temperatures = np.repeat(np.array([s.temperature for s in responses], dtype=np.float32), lengths)
    return MicroBatch(
        inputs=torch.from_numpy(inputs),
        parts=torch.from_numpy(parts),
        positions=torch.from_numpy(positions),
        keep=keep,
        picks=torch.from_numpy(np.concatenate(picks)),
        targets=torch.from_numpy(np.concatenate([s.tokens for s in responses]).astype(np.int64)),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        advantages=torch.from_numpy(advantages),
        engine_logprobs=torch.from_numpy(np.concatenate([s.logprobs for s in responses]).astype(np.float32)),
        temperatures=torch.from_numpy(temperatures),
        replicas=tuple(s.replica for s in responses),
    )
