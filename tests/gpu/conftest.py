"""Two ranks of NCCL, each a process, on two GPUs, or on one where NCCL allows it."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.controller.minting import Minted, Minter
from shared.config.schema import WeightsTable
from shared.gpus import first_gpu
from shared.nccl.library import NcclError, find, open_library

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
SHARING = (2, 30)
"""From this version on NCCL lets ranks share a GPU (NCCL_MULTI_RANK_GPU_ENABLE)."""
SHARED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "1"}
"""Two ranks of one GPU must both have room to run at the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.get_closest_marker("gpu") is not None]
    if here and first_gpu() is None:
        for item in here:
            item.add_marker(pytest.mark.skip(reason="wants a GPU: make gpu-check"))


@pytest.fixture(scope="session")
def version() -> str:
    try:
        return open_library(find()).version
    except NcclError as error:
        pytest.skip(f"no libnccl here (make test-nccl installs one): {error}")


@pytest.fixture
def minter(version: str) -> Iterator[Minter]:
    made = Minter(WeightsTable(interface="lo"))
    yield made
    made.close()


def new_id(minter: Minter, epoch: int) -> str:
    minter.mint(epoch, 1)
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        for word in minter.poll():
            assert isinstance(word, Minted), word
            return word.ids[0].hex()
        time.sleep(0.01)
    raise AssertionError(f"waited {PATIENCE_S:g} s for an id")


class Process:
    """A member, and how it is talked to."""

    def __init__(self, rank: int, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.member", str(rank), "2"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment,
        )  # fmt: skip
        self._selector = selectors.DefaultSelector()
        assert self.process.stdout is not None
        self._selector.register(self.process.stdout, selectors.EVENT_READ)

    def tell(self, do: str, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Its next line; whatever else a library prints is passed over."""
        assert self.process.stdout is not None
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if self._selector.select(1.0):
                line = self.process.stdout.readline()
                assert line, f"the member ended: {self.process.wait(10)}"
                if line.startswith("{"):
                    return json.loads(line)
        raise AssertionError(f"waited {PATIENCE_S:g} s for a member to answer")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Pair:
    """Ranks 0 and 1."""

    def __init__(self, minter: Minter, placed: list[dict[str, str]]) -> None:
        self.minter, self._placed = minter, placed
        self.members = [Process(rank, placed[rank]) for rank in range(2)]
        self.versions = [member.answer()["version"] for member in self.members]

    def form(self, epoch: int, timeout_s: float = 60.0, operation_s: float = 60.0) -> None:
        unique_id = new_id(self.minter, epoch)
        answers = self.both("form", epoch=epoch, unique_id=unique_id, timeout_s=timeout_s, operation_s=operation_s)
        assert not any("error" in answer for answer in answers), answers
        self.minter.forget(epoch)

    def both(self, do: str, **order: Any) -> list[dict[str, Any]]:
        for member in self.members:
            member.tell(do, **order)
        return [member.answer() for member in self.members]

    def replace(self, rank: int) -> None:
        """Kill a member and start another in its place."""
        self.members[rank].end()
        self.members[rank] = Process(rank, self._placed[rank])
        self.members[rank].answer()

    def end(self) -> None:
        for member in self.members:
            member.end()


@pytest.fixture
def pair(minter: Minter, version: str) -> Iterator[Pair]:
    import torch

    if torch.cuda.device_count() > 1:
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
        placed = [{"CUDA_VISIBLE_DEVICES": name} for name in names[:2]]
    elif tuple(map(int, version.split(".")[:2])) >= SHARING:
        placed = [SHARED, SHARED]
    else:
        pytest.skip(
            f"one GPU, which NCCL {version} lets no two ranks share: give another GPU, or ORRERY_NCCL_LIBRARY of "
            f"{'.'.join(map(str, SHARING))} or newer"
        )
    made = Pair(minter, placed)
    yield made
    made.end()
