"""Copies of what a replica holds, put together by all its ranks at once in memory that they share.

What a peer or a checkpoint gets is such a copy, so that the next step neither waits for it nor tears it. (Weights for
engines are staged by each rank alone: see `state.stage`.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import msgspec

from services.policy.learner import Learner
from services.policy.ranks.orders import AnyOrder, Done, Gather
from services.policy.state import head_of, manifest_for
from services.policy.trainer import Trainer
from shared.weights.staging import Area, allocate

Together = Callable[[AnyOrder], AbstractContextManager[list[Done]]]
"""What rank 0 does within, all ranks of the replica do."""


class Copies:
    """Takes copies of what this rank's learner and those of the other ranks hold."""

    def __init__(self, learner: Learner, together: Together) -> None:
        self._learner, self._together = learner, together

    def take(self, trainer: Trainer, over: Area | None = None) -> Area:
        """The replica's state as it is now; OSError if there is no memory for it.

        `over` is a copy of the same tensors that nobody reads any more: to write over it takes a third of the time
        that fresh memory takes.
        """
        area = over or allocate(manifest_for(head_of(trainer), trainer.layout))
        manifest = msgspec.msgpack.encode(area.manifest)
        with self._together(Gather(trainer.position, manifest, area.path)):
            self._learner.gather(trainer.position, area.manifest, area.memory)
        return area
