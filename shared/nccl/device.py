"""The GPU of this process: its identity, found without touching CUDA here.

A process that has called cuInit can no longer fork workers that use CUDA, and engines do: a short-lived child asks. A
rank's GPU is the first one that CUDA_VISIBLE_DEVICES leaves it; whoever starts ranks gives each its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

from shared.config.schema import WeightsTable
from shared.messages import Device
from shared.nccl.library import VARIABLE, NcclError, find, open_library, preload

ASK_S = 60.0
"""How long the driver may take to come up."""

ASK = """
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    sys.exit(0)
count, device, uuid = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(16)
if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
    sys.exit(0)
if cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetUuid_v2(uuid, device):
    sys.exit("the driver does not tell the identity of GPU 0")
print(uuid.raw.hex())
"""


@cache
def first_gpu() -> str | None:
    """The identity of the first GPU that this process may use; None where there is none. NcclError if none can tell."""
    try:
        told = subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=ASK_S, check=True
        ).stdout.strip()
    except subprocess.TimeoutExpired:
        raise NcclError(f"waited {ASK_S:g} s for CUDA's driver to name this process's GPU: see nvidia-smi") from None
    except subprocess.CalledProcessError as error:
        raise NcclError(f"CUDA's driver cannot be asked for this process's GPU: {error.stderr.strip()}") from error
    return told or None


def prepare(table: WeightsTable) -> None:
    """Called by a service before torch: load NCCL where meshes may want it. NcclError where they do and cannot."""
    if table.backend == "gloo":
        return
    if first_gpu() is not None:
        preload(table.nccl_library, table.interface)
    elif table.backend == "nccl":
        raise NcclError('expected a GPU for weights.backend = "nccl", found none here: set it to "auto" or "gloo"')


def own_device() -> Device | None:
    """What this rank says of its GPU when it registers; None where the service had no NCCL to load."""
    gpu = first_gpu() if VARIABLE in os.environ else None
    return Device(gpu=gpu, nccl=open_library(find()).version) if gpu is not None else None
