"""torch's default process group, which is that of a replica's ranks: what their layout makes its groups of."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from services.policy.ranks.orders import RanksError


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
