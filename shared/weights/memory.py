"""Memory that other processes of this machine may map, so that weights reach an engine's own processes without a copy.

It has no name in any file system: it ends with the last process that maps it, however that process ends. Others open
it by its path, which is valid as long as the memory is held here. Invariant: what is handed out is zeroed.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """`data` (uint8), and the `path` by which processes of the same user open it; "" where the system has no such."""

    data: Tensor
    path: str


def shared_memory(nbytes: int) -> SharedMemory:
    """That many zeroed bytes (at least one page is reserved)."""
    if sys.platform != "linux":
        return SharedMemory(torch.zeros(nbytes, dtype=torch.uint8), "")
    descriptor = os.memfd_create("orrery-weights")
    os.ftruncate(descriptor, max(nbytes, mmap.PAGESIZE))
    mapped = mmap.mmap(descriptor, max(nbytes, mmap.PAGESIZE))
    weakref.finalize(mapped, os.close, descriptor)  # the tensor holds the mapping
    return SharedMemory(torch.frombuffer(mapped, dtype=torch.uint8)[:nbytes], f"/proc/{os.getpid()}/fd/{descriptor}")


def open_shared(path: str, nbytes: int) -> Tensor:
    """The memory behind another process's path, to be read (uint8); OSError if it is gone."""
    with open(path, "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
