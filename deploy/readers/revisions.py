"""Where live hyper-parameters changed, as the lines of metrics.jsonl tell: marks for curves and views."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PREFIX = "set/"


@dataclass(frozen=True)
class Mark:
    """The first committed step under a revision, and what is new in it."""

    step: int
    revision: int
    changes: dict[str, Any]

    @property
    def text(self) -> str:
        """For a person: `train.lr 1e-06, train.samples 4`."""
        return ", ".join(f"{name} {value}" for name, value in self.changes.items())


def marks(lines: Iterable[dict[str, Any]]) -> list[Mark]:
    """One mark for each change of the revision between lines in the order of their steps."""
    found: list[Mark] = []
    before: dict[str, Any] = {}
    known = 0
    for line in lines:
        values = {key.removeprefix(PREFIX): value for key, value in line.items() if key.startswith(PREFIX)}
        revision = int(line.get("revision", known))
        if revision != known:
            changes = {name: value for name, value in values.items() if before.get(name) != value}
            found.append(Mark(int(line["step"]), revision, changes))
        known, before = revision, values
    return found
