"""Stages: what the run does first, next and last.

    sft -> train -> closing -> over

Each stage trains its number of batches, or fewer when its stop rule holds; between stages lies a checkpoint, so that a
rollback never crosses a stage. Closing judges the last version, writes the last checkpoint with its export, and ends.
"""

from __future__ import annotations

from typing import Literal

import msgspec

StageName = Literal["sft", "train", "closing", "over"]


class Stages(msgspec.Struct):
    """Where the run is. `starts` are the versions at which its stages began; `stopping` ends the run after the batch;
    `announced`: the outcome is on record and the shell knows.
    """

    names: list[StageName]
    index: int = 0
    starts: list[int] = msgspec.field(default_factory=lambda: [0])
    rule_met: bool = False
    filtered_in_a_row: int = 0
    stopping: str = ""
    stop_deadline: float = 0.0
    outcome: str = ""
    announced: bool = False
    cause: str = ""

    @property
    def name(self) -> StageName:
        """The stage in force."""
        return self.names[self.index]

    @property
    def began(self) -> int:
        """The version at which the stage in force began."""
        return self.starts[-1]

    def advance(self, version: int) -> StageName:
        """The next stage begins at this version."""
        self.index += 1
        self.starts.append(version)
        self.rule_met, self.filtered_in_a_row = False, 0
        return self.name

    def go_back(self, version: int) -> None:
        """A rollback to `version`: stages that began after it have not begun."""
        while self.index > 0 and self.began > version:
            self.starts.pop()
            self.index -= 1
        self.rule_met, self.filtered_in_a_row = False, 0

    def reopen(self) -> None:
        """A new term goes on with a run that was stopped or failed; a complete one stays complete."""
        self.stopping, self.stop_deadline = "", 0.0
        if self.name != "over":
            self.outcome, self.cause, self.announced = "", "", False

    def finish(self, outcome: Literal["complete", "stopped", "failed"], cause: str) -> None:
        """The run ends; the first outcome stands."""
        if not self.outcome:
            self.outcome, self.cause = outcome, cause
