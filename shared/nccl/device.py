"""NCCL and this process's GPU: loaded before torch where meshes may want it, and told when a rank registers."""

from __future__ import annotations

import os

from shared.config.schema import WeightsTable
from shared.gpus import GpuError, first_gpu
from shared.messages import Device
from shared.nccl.library import VARIABLE, NcclError, find, open_library, preload


def prepare(table: WeightsTable) -> None:
    """Called by a service before torch: load NCCL where meshes may want it. NcclError where they do and cannot."""
    if table.backend == "gloo":
        return
    try:
        found = first_gpu()
    except GpuError as error:
        raise NcclError(str(error)) from error
    if found is not None:
        preload(table.nccl_library, table.interface)
    elif table.backend == "nccl":
        raise NcclError('expected a GPU for weights.backend = "nccl", found none here: set it to "auto" or "gloo"')


def own_device() -> Device | None:
    """What this rank says of its GPU when it registers; None where the service had no NCCL to load."""
    gpu = first_gpu() if VARIABLE in os.environ else None
    return Device(gpu=gpu, nccl=open_library(find()).version) if gpu is not None else None
