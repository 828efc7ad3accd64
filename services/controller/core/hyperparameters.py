"""The live hyper-parameters: one revision number, changed only at a step boundary, the same for every replica.

A change is *requested* for a step and comes into force when that step is first assigned; leases and steps carry the
revision in force. Values are validated by the shell against the recipe's schema before they come here. Every revision
stays on record with what it replaced, so that any earlier one can be told, and gone back to by asking for its values.
"""

from __future__ import annotations

import msgspec

from shared.messages import Scalar


class PendingChange(msgspec.Struct):
    """A change that waits for its step."""

    at_step: int
    changes: dict[str, Scalar]


class Revision(msgspec.Struct, frozen=True):
    """A change that came into force: `step` was the first one under it, `before` is what it replaced."""

    revision: int
    at: float
    step: int
    changes: dict[str, Scalar]
    before: dict[str, Scalar]


class Hyperparameters(msgspec.Struct):
    """Revision in force, its values, what waits, and how they came to be."""

    values: dict[str, Scalar]
    revision: int = 0
    pending: list[PendingChange] = []
    history: list[Revision] = []

    def request(self, changes: dict[str, Scalar], at_step: int) -> None:
        """Note a change for `at_step`; several for one step apply in the order of asking."""
        self.pending.append(PendingChange(at_step, dict(changes)))
        self.pending.sort(key=lambda change: change.at_step)

    def at(self, step: int) -> dict[str, Scalar]:
        """The values that will be in force at `step` by what was asked for so far."""
        then = dict(self.values)
        for change in self.pending:
            if change.at_step <= step:
                then.update(change.changes)
        return then

    def under(self, revision: int) -> dict[str, Scalar]:
        """The values of an earlier revision, or of the one in force."""
        then = dict(self.values)
        for known in reversed(self.history):
            if known.revision <= revision:
                break
            then.update(known.before)
        return then

    def reward_weights(self, revision: int) -> dict[str, float]:
        """The weight of each part of the reward under a revision, by the part's name, in the recipe's order."""
        then = self.under(revision) if revision != self.revision else self.values
        return {
            name.removeprefix("rewards.").removesuffix(".weight"): float(value)
            for name, value in then.items()
            if name.startswith("rewards.")
        }

    def holds(self, changes: dict[str, Scalar], step: int) -> bool:
        """Whether these values will be in force at `step` without being asked for (again)."""
        then = self.at(step)
        return all(then.get(name) == value for name, value in changes.items())

    def advance(self, step: int, at: float) -> list[Revision]:
        """Bring into force what is due at `step`; each change makes one revision. Those that are new, in order."""
        fresh = []
        while self.pending and self.pending[0].at_step <= step:
            changes = self.pending.pop(0).changes
            before = {name: self.values[name] for name in changes}
            self.values.update(changes)
            self.revision += 1
            fresh.append(Revision(self.revision, at, step, changes, before))
        self.history += fresh
        return fresh

    @property
    def changed(self) -> dict[str, Scalar]:
        """The values in force of every field that was ever changed in this run, by name."""
        names = {name for revision in self.history for name in revision.changes}
        return {name: self.values[name] for name in sorted(names)}

    def number(self, name: str) -> float:
        """The value of a numeric field."""
        return float(self.values[name])

    def whole(self, name: str) -> int:
        """The value of an integer field."""
        return int(self.values[name])
