"""Weights: who gets which version from whom.

    transferring -> loaded(digest) per receiver

One transfer is under way at a time, over a formed mesh: the source sends a staged copy, so that training goes on; a
receiver is ready only when its digest equals the source's. The two answers may come in either order: a receiver that
loaded before the source told its digest waits here until the digests can be compared.

The transition that must not exist: transferring -> ready without a digest.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.messages import Position


class Transfer(msgspec.Struct):
    """Weights of `position` travel from `source` to `receivers` over the mesh of `epoch`."""

    epoch: int
    position: Position
    source: str
    receivers: list[str]
    deadline: float
    began: float
    digest: str | None = None
    bytes: int = 0
    loaded: dict[str, str] = {}

    def verdict(self, receiver: str) -> Literal["equal", "different"]:
        """Whether a receiver that has loaded holds what the source sent, once the source's digest is known."""
        return "equal" if self.loaded[receiver] == self.digest else "different"

    @property
    def over(self) -> bool:
        """Whether the source and every receiver have answered."""
        return self.digest is not None and len(self.loaded) == len(self.receivers)


class Weights(msgspec.Struct):
    """The transfer under way, and what the last ones took."""

    transfer: Transfer | None = None
    last_seconds: float = 0.0
    last_bytes: int = 0
    mismatches: int = 0
