"""What a replica hands over of a group that it does not finish, and how the next one takes it: partial rollout.

Called by the loop of an `EngineService`. Invariant: each token keeps the log-probability and the weight version that it
was sampled with, whoever goes on from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.arrays import ArrayError, Frame, pack, unpack
from shared.engines.base import Begun
from shared.messages import Partial

ARRAYS = ("tokens", "logprobs", "versions")


def pack_partial(so_far: Sequence[Begun | None], before: Sequence[Begun | None]) -> tuple[Partial, list[Frame]] | None:
    """What the samples of a group have so far, of which `before` came with the lease; None if nothing was added."""
    counts = [len(begun.tokens) if begun is not None else 0 for begun in before] or [0] * len(so_far)
    added = [begun.versions[count:] for begun, count in zip(so_far, counts, strict=True) if begun is not None]
    if not sum(map(len, added)):
        return None
    parts = [begun for begun in so_far if begun is not None]
    arrays = {name: np.concatenate([getattr(begun, name) for begun in parts]) for name in ARRAYS}
    headers, frames = pack(arrays)
    partial = Partial(
        lengths=[len(begun.tokens) if begun is not None else 0 for begun in so_far],
        oldest=int(arrays["versions"].min()),
        newest=int(np.concatenate(added).max()),
        arrays=headers,
    )
    return partial, frames


def unpack_partial(partial: Partial, frames: Sequence[Frame]) -> list[Begun | None]:
    """What each sample of a group goes on from. Raises `ArrayError` for arrays that do not fit their lengths."""
    arrays = unpack(partial.arrays, frames)
    expected = dict.fromkeys(ARRAYS, sum(partial.lengths))
    found = {name: array.size for name, array in arrays.items()}
    if found != expected:
        raise ArrayError(f"tokens handed over: expected arrays of sizes {expected}, got {found}")
    ends = np.cumsum(partial.lengths)
    return [
        Begun(*(arrays[name][end - length : end] for name in ARRAYS)) if length else None
        for length, end in zip(partial.lengths, ends, strict=True)
    ]
