"""What C libraries keep of a CPU process's memory, kept small: holes in the heap, and kernels compiled for old shapes.

Micro-batches differ in length, so that a step leaves the heap full of holes, which the next step does not fit into,
and oneDNN, which computes in bfloat16, with primitives for shapes that do not come again: 1,024 of them unless told
otherwise, of 0.2 to 2 MB each. (`make bench-memory-plan` shows what a process takes.)
"""

from __future__ import annotations

import ctypes
import os

import torch

KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "64"}
"""How many primitives oneDNN keeps, and torch, which holds some with their workspaces; a step's shapes fit."""


def bound_kernels() -> None:
    """Keep few compiled kernels; what the environment says already holds. Call it before torch computes."""
    for name, value in KERNELS.items():
        os.environ.setdefault(name, value)


def trim(device: torch.device) -> None:
    """Give the holes back to the system, which takes some hundredths of a second.

    Nothing where the heap is not glibc's, or where what comes and goes in a step is on a GPU.
    """
    if _malloc_trim is not None and device.type == "cpu":
        _malloc_trim(0)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
