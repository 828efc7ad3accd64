"""Lineages: which history of the weights is the true one.

*Committed* is the state that the journal says exists; *settled* is the newest durable checkpoint (position 0 of the
first lineage is the recipe's own initial weights and needs none). When no replica holds the committed state any more, a
new lineage begins at the settled one: a message about an older lineage is refused from then on.
"""

from __future__ import annotations

import msgspec

from shared.messages import Position


class SavePoint(msgspec.Struct):
    """A checkpoint under way: who writes it, until when, and whether the run's export goes with it."""

    replica: str
    position: Position
    export: bool
    deadline: float


class Lineages(msgspec.Struct):
    """Committed and settled positions, the settled checkpoint's path ("": the initial weights), and what is written.

    `failed` is the position whose checkpoint last failed, `failures` counts those in a row.
    """

    committed: Position
    settled: Position
    path: str = ""
    exported: bool = False
    saving: SavePoint | None = None
    failures: int = 0
    failed: Position | None = None

    def commit(self, last_of_batch: bool) -> Position:
        """One more step; one more version when it ended its batch."""
        now = self.committed
        self.committed = Position(now.lineage, now.version + int(last_of_batch), now.step + 1)
        return self.committed

    def settle(self, position: Position, path: str, export: bool) -> None:
        """A checkpoint is durable."""
        self.settled, self.path, self.saving, self.failures = position, path, None, 0
        self.exported = self.exported or export

    def roll_back(self) -> Position:
        """Begin a new lineage at the settled state."""
        lineage = self.committed.lineage + 1
        self.settled = Position(lineage, self.settled.version, self.settled.step)
        self.committed, self.saving = self.settled, None
        return self.committed

    def end_batch(self) -> Position:
        """The batch in hand ends without a further step: its version counts all the same."""
        now = self.committed
        self.committed = Position(now.lineage, now.version + 1, now.step)
        return self.committed
