"""What the loop of an `EngineService` expects of whoever scores its groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from shared.messages import LeaseRef
from shared.rewards.score import Score
from shared.serving.generation import Group


class JudgedGroup(Protocol):
    """A group whose samples are all judged. `error` is empty when `scores` has one entry a sample."""

    @property
    def group(self) -> Group: ...
    @property
    def completions(self) -> Sequence[str]: ...
    @property
    def scores(self) -> Sequence[Score]: ...
    @property
    def error(self) -> str: ...


class Judge(Protocol):
    """Scores finished groups, in its own time. `len` is the number of groups that wait."""

    def __len__(self) -> int: ...

    @property
    def groups(self) -> list[Group]:
        """The groups that wait, oldest first."""
        ...

    def submit(self, group: Group, completions: list[str]) -> None:
        """Have each completion of a finished group scored."""
        ...

    def collect(self, timeout_s: float = 0.0) -> Sequence[JudgedGroup]:
        """Groups that are scored by now; waits up to `timeout_s` for one if there is none."""
        ...

    def revoke(self, refs: Iterable[LeaseRef]) -> None:
        """Drop these attempts; unknown ones are ignored."""
        ...
