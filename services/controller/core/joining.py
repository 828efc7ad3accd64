"""Joining: how a policy becomes a member of the steps while they go on, and how the members are known to be equal.

    forming -> receiving (in the first step of a batch) -> ready, when the digests are equal

One policy joins at a time. Two meshes form while training goes on: one of the source and the joiner, which carries the
state, and one of the members and the joiner, for gradients. Then, in the first step of a batch, the source sends what
it holds from a thread, and the joiner receives it while the members compute; it takes part in the sum with zeros,
votes, and applies on commit. So it has caught up after one step, however slow it is.

With each checkpoint every member is asked for the digest of its state: a *comparison*.

The transition that must not exist: receiving -> ready without a digest.
"""

from __future__ import annotations

import msgspec

from shared.messages import MeshMember, Position


class Join(msgspec.Struct):
    """A stale policy on its way to the members: they and it are in `members`.

    `position` is what it is sent, once that is known.
    """

    joiner: str
    source: str
    members: list[MeshMember]
    state_mesh: int
    gradients_mesh: int
    position: Position | None = None
    deadline: float | None = None
    sent: str | None = None
    received: str | None = None

    @property
    def decided(self) -> bool:
        """Whether both have told their digests."""
        return self.sent is not None and self.received is not None


class Comparison(msgspec.Struct):
    """Which incarnations were asked for the digest of their state at `position`, and what they answered; the writer's
    is the true one.
    """

    position: Position
    writer: str
    asked: dict[str, int]
    deadline: float
    digests: dict[str, str] = {}


class Torn(msgspec.Struct):
    """How often in a row the gradients mesh of these members broke in a step."""

    members: list[MeshMember]
    times: int = 1


class Joining(msgspec.Struct):
    """The join and the comparison under way; `gradients` are the live epochs of gradients meshes.

    `last` is whose turn to join it was, so that one that cannot is not tried again and again before the others.
    """

    gradients: list[int] = []
    join: Join | None = None
    last: str = ""
    failures: int = 0
    not_before: float = 0.0
    torn: Torn | None = None
    comparison: Comparison | None = None
    mismatches: int = 0
