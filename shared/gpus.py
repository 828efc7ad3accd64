"""The GPUs that this process may use, found without touching CUDA here.

A process that has called cuInit can no longer fork workers that use CUDA, and engines do: a short-lived child asks.
CUDA_VISIBLE_DEVICES says which they are. A rank's GPU is the first of them; whoever starts ranks gives each its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

from shared.config import RecipeError

VISIBLE = "CUDA_VISIBLE_DEVICES"
ASK_S = 60.0
"""How long the driver may take to come up."""

ASK = """
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    sys.exit(0)
count, device, uuid = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(16)
if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
    sys.exit(0)
for index in range(count.value):
    if cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDeviceGetUuid_v2(uuid, device):
        sys.exit(f"the driver does not tell the identity of GPU {index}")
    print(uuid.raw.hex())
"""


class GpuError(RecipeError):
    """GPUs that cannot be asked for, or of which there are too few."""


def identities() -> tuple[str, ...]:
    """The identities of the GPUs that this process may use, in their order. GpuError if the driver cannot tell."""
    return _asked(os.environ.get(VISIBLE))


def names() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls them. GpuError."""
    count, told = len(identities()), os.environ.get(VISIBLE)
    return (
        [str(index) for index in range(count)] if told is None else [name.strip() for name in told.split(",")][:count]
    )


def first_gpu() -> str | None:
    """The identity of this rank's GPU; None where there is none. GpuError."""
    return next(iter(identities()), None)


def take(place: int) -> None:
    """Leave this process, and those that it starts, one of the GPUs that it may use. GpuError if there are fewer.

    Before anything of CUDA is touched: CUDA reads the variable once.
    """
    found = names()
    if place >= len(found):
        raise GpuError(
            f"expected {place + 1} GPUs here, one for each rank of the replica on this node, got {len(found)} "
            f"({VISIBLE}={os.environ.get(VISIBLE, '')}); give the node more, or change policy.parallel"
        )
    os.environ[VISIBLE] = found[place]


@cache
def _asked(_visible: str | None) -> tuple[str, ...]:
    try:
        told = subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=ASK_S, check=True
        ).stdout
    except subprocess.TimeoutExpired:
        raise GpuError(f"waited {ASK_S:g} s for CUDA's driver to name this process's GPUs: see nvidia-smi") from None
    except subprocess.CalledProcessError as error:
        raise GpuError(f"CUDA's driver cannot be asked for this process's GPUs: {error.stderr.strip()}") from error
    return tuple(told.split())
