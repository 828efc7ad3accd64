"""Packing: rows of tokens one behind the other in micro-batches without padding, and what attends to what in them.

Linear layers see a micro-batch as one long line of tokens. Attention cuts the line into its rows again, so that it
costs what the rows cost: rows of about the same length make a block and are computed together, short ones padded to
the longest in the block and nowhere else.

Invariant: the composition depends only on the rows and the number of `ways`, so every rank of a replica knows the
micro-batches of all the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.policy.batch import Row

PAD = 0
"""Token id of padding; what it is changes nothing."""
FILLED = 0.8
"""A row joins a block whose longest row it fills to this share."""


@dataclass(frozen=True)
class Block:
    """b rows that follow each other in the line and that attention computes together, up to q queries and k keys each.

    `queries` and `keys` are the places [start, stop) of their tokens. Rows of unequal lengths are spread over b x k
    places, where q = k; a row of which a part alone is asked for stands alone.
    """

    rows: int  # b
    length: int  # k
    queries: tuple[int, int]  # by the count of those who are asked for
    keys: tuple[int, int]  # in the whole line
    mask: Tensor | None  # bool [b, 1, q, k], True where a query sees a key; None: each sees itself and those before it
    valid: Tensor | None  # int64 [tokens], where of the b x k places its tokens stand, in their order; None: on all


@dataclass(frozen=True)
class MicroBatch:
    """S tokens in a line that hold the T tokens of N responses, listed row after row.

    The distribution of response token t is what a model says at place `picks[t]` of the line.
    """

    inputs: Tensor  # int64 [S]
    parts: Tensor  # int64 [S], 0 on a prompt and on padding, k on the k-th response of its row
    positions: Tensor  # int64 [S], or [3, S] with images: in time, height and width
    starts: tuple[int, ...]  # where each row begins in the line, and where the last one ends; padding is a row
    picks: Tensor  # int64 [T]
    targets: Tensor  # int64 [T]
    lengths: Tensor  # int64 [N], tokens of each response
    advantages: Tensor  # float32 [T]
    engine_logprobs: Tensor  # float32 [T]
    temperatures: Tensor  # float32 [T], what each token was sampled with
    replicas: tuple[str, ...]  # [N], who sampled each response
    pixels: Tensor | None = None  # float32 [patches, values], of all images in their order
    grids: Tensor | None = None  # int64 [images, 3]

    @property
    def size(self) -> int:
        """S, the tokens that the model computes."""
        return self.inputs.numel()

    @property
    def tokens(self) -> int:
        """T, the response tokens of this micro-batch."""
        return self.targets.numel()

    @cached_property
    def blocks(self) -> list[Block]:
        """What attention computes, for all queries."""
        return self.blocks_between(0, self.size)

    def blocks_between(self, first: int, last: int) -> list[Block]:
        """What attention computes for the queries at the places `first` to `last`, which go by their own count.

        Their answers, block after block, are those of the places in order.
        """
        groups: list[list[tuple[int, int]]] = []
        for row in zip(self.starts, self.starts[1:], strict=False):
            if row[1] <= first or row[0] >= last:
                continue
            if groups and _joins(row, groups[-1], first, last):
                groups[-1].append(row)
            else:
                groups.append([row])
        return [self._block(rows, first, last) for rows in groups]

    def _block(self, rows: Sequence[tuple[int, int]], first: int, last: int) -> Block:
        device = self.inputs.device
        begin, end = rows[0][0], rows[-1][1]
        asked = max(first, begin), min(last, end)
        lengths = torch.tensor([stop - start for start, stop in rows])[:, None]
        length = int(lengths.max())
        places = torch.arange(length)
        valid = None
        parts = self.parts[begin:end]
        if length * len(rows) > end - begin:
            valid = (places < lengths).flatten().nonzero().flatten().to(device)
            parts = parts.new_zeros(length * len(rows)).index_copy_(0, valid, parts)
        mask = None
        parts = parts.view(len(rows), length)
        if asked != (begin, end) or bool((parts > 1).any()):
            own = slice(asked[0] - begin, asked[1] - begin) if len(rows) == 1 else slice(None)
            seen = (parts[:, own, None] == parts[:, None]) | (parts[:, None] == 0)
            mask = (seen & (places <= places[own, None]).to(device))[:, None]
        return Block(len(rows), length, (asked[0] - first, asked[1] - first), (begin, end), mask, valid)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def _joins(row: tuple[int, int], rows: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    """Whether a row is computed in a block with those before it: all whole, and padded to the first one by little."""
    longest = rows[0][1] - rows[0][0]
    whole = first <= rows[0][0] and row[1] <= last
    return whole and FILLED * longest <= row[1] - row[0] <= longest


def share_out(rows: Sequence[Row], limit: int, ways: int = 1) -> list[list[list[Row]]]:
    """The micro-batches of each of `ways` ranks, all ranks as many: about equal numbers of tokens, at most `limit`.

    Each row goes where the fewest tokens are so far, the longest first (LPT; R. L. Graham, "Bounds on multiprocessing
    timing anomalies", 1969). A single row longer than `limit` makes a micro-batch of its own; some may stay empty.
    """
    total = sum(row.length for row in rows)
    # rows longer than the limit need fewer than their tokens would
    count = min(-(-total // (limit * ways)), -(-len(rows) // ways))
    longest_first = sorted(rows, key=lambda row: -row.length)
    while rows:
        bins: list[list[Row]] = [[] for _ in range(count * ways)]
        fill = [(0, index) for index in range(len(bins))]
        for row in longest_first:
            tokens, index = heapq.heappop(fill)
            bins[index].append(row)
            heapq.heappush(fill, (tokens + row.length, index))
        if all(len(each) < 2 or sum(row.length for row in each) <= limit for each in bins):
            return [bins[way::ways] for way in range(ways)]
        count += 1
    return [[] for _ in range(ways)]


def pack(rows: Sequence[Row], multiple: int = 1, at_least: int = 1, merge: int = 1) -> MicroBatch:
    """Rows in a line, longest first; the line has at least `at_least` tokens and is padded to a multiple of `multiple`.

    `merge` x `merge` patches of an image are one of its tokens.
    """
    longest_first = sorted(rows, key=lambda row: -row.length)
    size = sum(row.length for row in rows)
    padded = -(-max(size, at_least) // multiple) * multiple
    images = [row.images for row in longest_first if row.images is not None]
    inputs = np.full(padded, PAD, dtype=np.int64)
    parts, positions = np.zeros(padded, dtype=np.int64), np.zeros((3 if images else 1, padded), dtype=np.int64)
    positions[:, size:] = np.arange(padded - size)
    starts, picks = [0], []
    for row in longest_first:
        begin = starts[-1]
        end = begin + len(row.prompt)
        along = row.positions(merge)
        inputs[begin:end], positions[:, begin:end] = row.prompt, along
        place, following = end, int(along.max()) + 1
        for part, response in enumerate(row.responses, start=1):
            here = slice(place, place + len(response.tokens))
            inputs[here], parts[here] = response.tokens, part
            positions[:, here] = np.arange(following, following + len(response.tokens))
            # a place says what the token after it is; the first one of a response comes after the prompt
            saying = np.arange(here.start - 1, here.stop - 1, dtype=np.int64)
            saying[0] = end - 1
            picks.append(saying)
            place = here.stop
        starts.append(place)
    if padded > size:
        starts.append(padded)
    responses = [response for row in longest_first for response in row.responses]
    lengths = [len(s.tokens) for s in responses]
    return MicroBatch(
        inputs=torch.from_numpy(inputs),
        parts=torch.from_numpy(parts),
        positions=torch.from_numpy(positions if images else positions[0]),
        starts=tuple(starts),
        picks=torch.from_numpy(_joined(picks, np.int64)),
        targets=torch.from_numpy(_joined([s.tokens for s in responses], np.int64)),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        advantages=torch.from_numpy(np.repeat(np.array([s.advantage for s in responses], dtype=np.float32), lengths)),
        engine_logprobs=torch.from_numpy(_joined([s.logprobs for s in responses], np.float32)),
        temperatures=torch.from_numpy(
            np.repeat(np.array([s.temperature for s in responses], dtype=np.float32), lengths)
        ),
        replicas=tuple(s.replica for s in responses),
        pixels=torch.cat([each.values for each in images]) if images else None,
        grids=torch.cat([each.grids for each in images]) if images else None,
    )


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype=dtype)
