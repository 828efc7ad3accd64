"""The live hyper-parameters: one revision number, changed only at a step boundary, the same for every replica.

A change is *requested* for a step and comes into force when that step is first assigned; leases and steps carry the
revision in force. Values are validated by the shell against the recipe's schema before they come here.
"""

from __future__ import annotations

import msgspec

from shared.messages import Scalar


class PendingChange(msgspec.Struct):
    """A change that waits for its step."""

    at_step: int
    changes: dict[str, Scalar]


class Hyperparameters(msgspec.Struct):
    """Revision in force, its values, and what waits."""

    values: dict[str, Scalar]
    revision: int = 0
    pending: list[PendingChange] = []

    def request(self, changes: dict[str, Scalar], at_step: int) -> None:
        """Note a change for `at_step`; several for one step apply in the order of asking."""
        self.pending.append(PendingChange(at_step, dict(changes)))
        self.pending.sort(key=lambda change: change.at_step)

    def holds(self, changes: dict[str, Scalar], step: int) -> bool:
        """Whether these values will be in force at `step` without being asked for (again)."""
        then = dict(self.values)
        for change in self.pending:
            if change.at_step <= step:
                then.update(change.changes)
        return all(then.get(name) == value for name, value in changes.items())

    def advance(self, step: int) -> list[dict[str, Scalar]]:
        """Bring into force what is due at `step`; each change makes one revision. The changes applied, in order."""
        applied = []
        while self.pending and self.pending[0].at_step <= step:
            change = self.pending.pop(0)
            self.values.update(change.changes)
            self.revision += 1
            applied.append(change.changes)
        return applied

    def number(self, name: str) -> float:
        """The value of a numeric field."""
        return float(self.values[name])

    def whole(self, name: str) -> int:
        """The value of an integer field."""
        return int(self.values[name])
