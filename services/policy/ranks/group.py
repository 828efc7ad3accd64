"""The process group inside a replica, and what its ranks share and sum over it. Used by each rank's trainer.

Invariants: every rank makes the same calls in the same order; what `sum_...` leaves is the same on every rank, bit for
bit, so that ranks which hold the same weights go on holding them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from services.policy.ranks.orders import RanksError
from services.policy.reduce import reduce_gradients, reduce_metrics
from shared.config import RecipeError
from shared.config.schema import PolicyParallelTable
from shared.mesh import MeshError

T = TypeVar("T")


def check_built(parallel: PolicyParallelTable) -> None:
    """RecipeError for an axis that no trainer can lay out yet."""
    for axis in ("pp", "fsdp", "ep", "cp", "tp"):
        if getattr(parallel, axis) > 1:
            raise RecipeError(f"policy.parallel.{axis} = {getattr(parallel, axis)}: not built yet; leave {axis} at 1")


def form_world(rank: int, world: int, store: str, *, interface: str, timeout_s: float) -> None:
    """Make torch's default process group, of this replica's ranks; RanksError if they do not meet within `timeout_s`.

    `store` is the path of a file that all ranks can open: no port is opened to find each other. `timeout_s` also bounds
    every collective.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    timeout = timedelta(seconds=timeout_s)
    try:
        file = dist.FileStore(store, world)
        dist.init_process_group("gloo", store=file, rank=rank, world_size=world, timeout=timeout)
    except RuntimeError as error:
        raise RanksError(f"rank {rank} did not meet the {world} ranks of its replica: {error}") from error


def leave_world() -> None:
    """Give up the process group, if there is one; nothing may be under way in it."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """The ranks of this replica as copies of the whole model, which share the rows of each step."""

    def __init__(self, bucket_bytes: int) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._bucket_bytes = bucket_bytes

    def share(self, rows: Sequence[T]) -> list[T]:
        """This rank's part of the rows: they come longest first, so that dealing them out gives even parts."""
        return list(rows[self.rank :: self.size])

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over the ranks."""
        reduce_gradients(gradients, self, self._bucket_bytes)

    def sum_metrics(
        self, sums: dict[str, float], maxima: dict[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The sums added up over the ranks, and the largest of the maxima."""
        return reduce_metrics(sums, maxima, self)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A MeshError on one rank within is one on all, so that none waits in the next collective for one that left."""
        own: MeshError | None = None
        try:
            yield
        except MeshError as error:
            own = error
        failed = torch.tensor([own is not None], dtype=torch.int32)
        self.all_reduce(failed)
        if own is not None:
            raise own
        if int(failed):
            raise MeshError(f"{int(failed)} of {self.size} ranks failed in their groups; their logs say why")

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the ranks; RanksError if one of them is gone or late."""
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise RanksError(f"rank {self.rank} waited for a sum over the {self.size} ranks: {error}") from error
