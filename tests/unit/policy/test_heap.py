"""What a policy does so that C libraries keep little memory."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest

from services.policy import heap
from services.policy.device import CPU

MIB = 1 << 20
CHUNK = 64 << 10  # small enough for glibc's heap


def resident() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the heap is not glibc's")
def test_trimming_gives_holes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    held = [libc.malloc(CHUNK) for _ in range(4096)]  # 256 MiB
    for place in held:
        ctypes.memset(place, 1, CHUNK)
    for index, place in enumerate(held):
        if index % 16:  # what stays keeps the heap from shrinking
            libc.free(place)
    full = resident()
    heap.trim(CPU)
    assert full - resident() > 150 * MIB
    for place in held[::16]:
        libc.free(place)


def test_the_environment_decides_how_many_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, other = heap.KERNELS
    monkeypatch.setenv(chosen, "7")
    monkeypatch.setenv(other, "")  # so that it is set back afterwards
    monkeypatch.delenv(other)
    heap.bound_kernels()
    assert (os.environ[chosen], os.environ[other]) == ("7", heap.KERNELS[other])
