"""From a TrainStep and its payload frames to rows of tokens. Called by the trainer; `packing` goes on from here.

The samples of a group share their prompt, which is computed once for all that stand in one row (Prefix Grouper, arXiv
2506.05433): a row is prompt | response | response | ..., positions go on from the prompt's end in every response, and
attention shows each response the prompt and itself. Log-probabilities and gradients are those of separate rows.

Invariant: the composition depends only on the step's content (longest row first, ties by group, attempt and sample),
so equal steps give equal micro-batches on every replica, run and replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from shared.arrays import unpack
from shared.messages import AssignedGroup, TrainStep
from shared.models.images import Pixels

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
    """One prompt, with its images if it has any, and those of its responses that stand behind it."""

    responses: tuple[TrainSequence, ...]
    images: Pixels | None = None

    @property
    def prompt(self) -> np.ndarray:
        """Token ids of the prompt of all responses."""
        return self.responses[0].prompt

    @cached_property
    def length(self) -> int:
        """Tokens of the prompt and all responses together."""
        return len(self.prompt) + sum(len(s.tokens) for s in self.responses)

    def positions(self, merge: int) -> np.ndarray:
        """Rotary positions of the prompt, [1 or 3, tokens]; an image counts its patches by `merge` x `merge`."""
        if self.images is None:
            return np.arange(len(self.prompt))[None]
        return self.images.positions(len(self.prompt), merge).numpy()


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
