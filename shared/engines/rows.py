"""What the transformers engine keeps for each sequence in flight, as tensors: one row a sequence, dense from row 0.

Owned by the engine alone, beside `SlotCache`, whose rows are the same rows. Nothing here runs Python once a token and
sequence: a decode step is a few tensor operations over all rows, and only sequences that end cost Python work.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from shared.engines.base import Begun, Finished, weights_diverged
from shared.engines.sampling import draw, uniforms


@dataclass(frozen=True, slots=True)
class Arrival:
    """A sample about to get a row: whose it is, and what its row starts with, tokens of earlier attempts included."""

    key: Hashable
    sample: int
    prompt_length: int
    offset: int
    limit: int
    stream: int
    temperature: float
    top_k: int
    top_p: float
    begun: Begun | None = None


class Rows:
    """State of up to `slots` sequences. `count` rows are in use."""

    def __init__(self, slots: int) -> None:
        self.count = 0
        self.owners: list[tuple[Hashable, int]] = []
        self.lengths = torch.zeros(slots, dtype=torch.int64)  # tokens in the KV cache
        self.offsets = torch.zeros(slots, dtype=torch.int64)  # from a place in the cache to its rotary position
        self.last = torch.zeros(slots, dtype=torch.int64)  # newest token, not yet in the cache
        self._made = torch.zeros(slots, dtype=torch.int64)
        self._limits = torch.zeros(slots, dtype=torch.int64)
        self._streams = torch.zeros(slots, dtype=torch.int64)
        self._temperature = torch.ones(slots)
        self._top_k = torch.zeros(slots, dtype=torch.int64)
        self._top_p = torch.ones(slots)
        self._tokens = torch.zeros(slots, 64, dtype=torch.int32)
        self._logprobs = torch.zeros(slots, 64)
        self._versions = torch.zeros(slots, 64, dtype=torch.int32)
        self._greedy = False
        self._truncated = False

    def add(self, arrivals: Sequence[Arrival]) -> torch.Tensor:
        """Give each arrival the next free row; returns the rows."""
        rows = torch.arange(self.count, self.count + len(arrivals))
        made = torch.tensor([len(a.begun.tokens) if a.begun is not None else 0 for a in arrivals])
        self.lengths[rows] = torch.tensor([a.prompt_length for a in arrivals]) + made
        self.offsets[rows] = torch.tensor([a.offset for a in arrivals])
        self._made[rows] = made
        self._limits[rows] = torch.tensor([a.limit for a in arrivals])
        self._streams[rows] = torch.tensor([a.stream for a in arrivals])
        self._temperature[rows] = torch.tensor([a.temperature for a in arrivals], dtype=torch.float32)
        self._top_k[rows] = torch.tensor([a.top_k for a in arrivals])
        self._top_p[rows] = torch.tensor([a.top_p for a in arrivals], dtype=torch.float32)
        self.owners += [(a.key, a.sample) for a in arrivals]
        self.count += len(arrivals)
        self._widen(max(a.limit for a in arrivals))
        for row, arrival in zip(rows.tolist(), arrivals, strict=True):
            if arrival.begun is not None:
                self._begin(row, arrival.begun)
        self._composition_changed()
        return rows

    def take(self, rows: torch.Tensor, logits: torch.Tensor, stops: torch.Tensor, version: int) -> list[int]:
        """Draw the next token of `rows` from `logits` [rows, vocabulary]; returns the rows that ended with it."""
        made = self._made[rows]
        tokens, logprobs = draw(
            logits,
            uniforms(self._streams[rows], made),
            self._temperature[rows],
            self._top_k[rows],
            self._top_p[rows],
            greedy=self._greedy,
            truncated=self._truncated,
        )
        if not bool(logprobs.isfinite().all()):
            raise weights_diverged(version)
        self._tokens[rows, made] = tokens.int()
        self._logprobs[rows, made] = logprobs
        self._versions[rows, made] = version
        self.last[rows] = tokens
        made += 1
        self._made[rows] = made
        ended = torch.isin(tokens, stops) | (made >= self._limits[rows])
        return rows[ended].tolist() if bool(ended.any()) else []

    def finished(self, row: int, stops: torch.Tensor) -> Finished:
        """The sample in a row that ended."""
        key, sample = self.owners[row]
        made = self.made(row)
        truncated = not bool(torch.isin(self.last[row], stops))
        return Finished(key, sample, made.tokens, made.logprobs, made.versions, truncated)

    def made(self, row: int) -> Begun:
        """What the sample in a row has so far."""
        made = int(self._made[row])
        return Begun(
            tokens=self._tokens[row, :made].numpy().copy(),
            logprobs=self._logprobs[row, :made].numpy().copy(),
            versions=self._versions[row, :made].numpy().copy(),
        )

    def cached(self, row: int) -> list[int]:
        """The generated tokens whose keys and values are in the cache: all but the newest."""
        return self._tokens[row, : int(self._made[row]) - 1].tolist()

    def release(self, ended: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Free rows and close the gaps with the last ones; returns (sources, targets) of the rows that moved."""
        gone = set(ended)
        remaining = self.count - len(gone)
        targets = [row for row in sorted(gone) if row < remaining]
        sources = [row for row in range(remaining, self.count) if row not in gone]
        moved, into = torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
        if sources:
            for state in (
                self.lengths, self.offsets, self.last, self._made, self._limits, self._streams, self._temperature,
                self._top_k, self._top_p, self._tokens, self._logprobs, self._versions,
            ):  # fmt: skip
                state[into] = state[moved]
            for source, target in zip(sources, targets, strict=True):
                self.owners[target] = self.owners[source]
        del self.owners[remaining:]
        self.count = remaining
        self._composition_changed()
        return moved, into

    def _begin(self, row: int, begun: Begun) -> None:
        made = len(begun.tokens)
        self._tokens[row, :made] = torch.tensor(begun.tokens.tolist(), dtype=torch.int32)
        self._logprobs[row, :made] = torch.tensor(begun.logprobs.tolist())
        self._versions[row, :made] = torch.tensor(begun.versions.tolist(), dtype=torch.int32)

    def _composition_changed(self) -> None:
        used = slice(0, self.count)
        self._greedy = bool((self._temperature[used] == 0).any())
        self._truncated = bool(((self._top_k[used] > 0) | (self._top_p[used] < 1)).any())

    def _widen(self, limit: int) -> None:
        missing = limit - self._tokens.shape[1]
        if missing > 0:
            pad = torch.nn.functional.pad
            self._tokens, self._logprobs, self._versions = (
                pad(buffer, (0, missing)) for buffer in (self._tokens, self._logprobs, self._versions)
            )
