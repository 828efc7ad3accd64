"""torch's default process group, which is that of a replica's ranks: what their layout makes its groups of."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from services.policy.device import CPU
from services.policy.ranks.orders import RanksError
from shared.nccl.library import INTERFACE_VARIABLE, exactly

OVER_TCP = "tcp://"
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""What carries the tensors of ranks that compute on such a device; what is in the host's memory always goes by Gloo."""


class Meeting:
    """Rank 0's: where the ranks find each other. Others reach it by `path` (see `store_at`).

    On one node that is a file without a name: no port is opened, and nothing is left behind. With an `address` of this
    node it is a server there, for ranks of other nodes too.
    """

    def __init__(self, world: int, address: str | None = None) -> None:
        self._world = world
        self._file = -1
        self._server: dist.Store | None = None
        if address is None:
            self._file = os.memfd_create("orrery-world")
            self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            listening = socket.create_server((address, 0))
            port = int(listening.getsockname()[1])
            self.path = f"{OVER_TCP}{address}:{port}"
            self._server = dist.TCPStore(
                address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )

    def store(self) -> dist.Store:
        """Rank 0's own way in."""
        return self._server or store_at(self.path, self._world)

    def close(self) -> None:
        """End it; the process group must have ended, since a store still wants its file then."""
        self._server = None
        if self._file >= 0:
            os.close(self._file)


def store_at(path: str, world: int) -> dist.Store:
    """The store of rank 0's `Meeting`; RanksError if there is none."""
    try:
        if not path.startswith(OVER_TCP):
            return dist.FileStore(path, world)
        host, _, port = path.removeprefix(OVER_TCP).rpartition(":")
        return dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    except RuntimeError as error:
        raise RanksError(f"rank 0's store at {path} cannot be reached: {error}") from error


def form_world(
    rank: int, world: int, store: dist.Store, *, interface: str, timeout_s: float, device: torch.device = CPU
) -> None:
    """Make torch's default process group, of this replica's ranks; RanksError if they do not meet within `timeout_s`.

    Tensors on GPUs go by NCCL, others by Gloo. `timeout_s` also bounds every collective: one of Gloo raises then, one
    of NCCL, which a thread of torch watches, ends the process, since what it computes cannot be relied on any more.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    os.environ.setdefault(INTERFACE_VARIABLE, exactly(interface))
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(BACKENDS[device.type], store=store, rank=rank, world_size=world, timeout=timeout)
    except RuntimeError as error:
        raise RanksError(f"rank {rank} did not meet the {world} ranks of its replica: {error}") from error


def leave_world() -> None:
    """Give up the process group, if there is one; nothing may be under way in it.

    Of NCCL all ranks of a node would have to do so together, and those that have ended cannot.
    """
    if not dist.is_initialized():
        return
    if "nccl" in dist.get_backend_config():
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
