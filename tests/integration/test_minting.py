"""The real minter: a child for each attempt, with the real libnccl, which needs no GPU for that."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.controller.minting import Minted, Minter, MintFailed
from shared.config.schema import WeightsTable
from shared.nccl.library import NcclError, find, open_library

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def library() -> str:
    try:
        return open_library(find()).version
    except NcclError as error:
        pytest.skip(f"no libnccl here (make test-nccl installs one): {error}")


@pytest.fixture
def minter() -> Iterator[Minter]:
    made = Minter(WeightsTable(interface="lo"))
    yield made
    made.close()
    assert made.pids == {}


def next_word(minter: Minter) -> Minted | MintFailed:
    """Wait for what the children say or for their ends, and take it."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        words = minter.poll()
        if words:
            assert len(words) == 1, words
            return words[0]
        watched = [child.pipe for child in minter._children.values() if not child.answered]
        ends = [os.pidfd_open(pid) for pid in minter.pids.values()]
        select.select([*watched, *ends], [], [], 1.0)
        for descriptor in ends:
            os.close(descriptor)
    raise AssertionError(f"waited {PATIENCE_S:g} s for the children {minter.pids} to say something or to end")


def minted(minter: Minter, epoch: int, count: int = 1) -> Minted:
    minter.mint(epoch, count)
    word = next_word(minter)
    assert isinstance(word, Minted), word
    return word


def address(unique_id: bytes) -> tuple[str, int]:
    """Where its ranks are to come: after eight bytes of magic, a sockaddr_in."""
    assert int.from_bytes(unique_id[8:10], sys.byteorder) == socket.AF_INET
    return socket.inet_ntoa(unique_id[12:16]), int.from_bytes(unique_id[10:12], "big")


def somebody_waits_at(place: tuple[str, int]) -> bool:
    with socket.socket() as asking:
        asking.settimeout(PATIENCE_S)
        return asking.connect_ex(place) == 0


def wait_for_the_end_of(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([descriptor], [], [], PATIENCE_S)
    os.close(descriptor)
    assert ended, f"waited {PATIENCE_S:g} s for process {pid} to end"


def test_an_id_names_the_configured_interface_and_somebody_waits_there(minter: Minter, library: str) -> None:
    word = minted(minter, 7)
    assert (word.epoch, word.version) == (7, library)
    host, port = address(word.ids[0])
    assert host == "127.0.0.1"
    assert somebody_waits_at((host, port))


def test_the_child_dies_with_its_attempt_and_nobody_waits_there_any_more(minter: Minter) -> None:
    word = minted(minter, 1)
    pid = minter.pids[1]
    minter.forget(1)
    wait_for_the_end_of(pid)
    assert not somebody_waits_at(address(word.ids[0]))
    assert minter.poll() == [], "its end was wanted"
    minter.forget(1)


def test_every_attempt_has_a_child_and_ids_of_its_own_as_many_as_are_asked_for(minter: Minter) -> None:
    first, second = minted(minter, 1), minted(minter, 2, count=3)
    assert len({*first.ids, *second.ids}) == 4
    assert len({address(unique_id) for unique_id in (*first.ids, *second.ids)}) == 4
    assert len(set(minter.pids.values())) == 2


def test_a_child_that_is_killed_while_its_mesh_forms_is_told_by_name(minter: Minter) -> None:
    minted(minter, 3)
    pid = minter.pids[3]
    os.kill(pid, signal.SIGKILL)
    word = next_word(minter)
    assert word == MintFailed(
        3, f"the process that minted its id (pid {pid}) ended while the mesh was forming: killed by SIGKILL"
    )
    assert minter.poll() == []


def test_a_child_that_hangs_holds_nobody_up_and_is_killed_with_its_attempt(tmp_path: Path) -> None:
    path = tmp_path / "libnccl.so.2"
    os.mkfifo(path)  # whoever opens it to read waits for a writer
    minter = Minter(WeightsTable(nccl_library=str(path)))
    minter.mint(1, 1)
    pid = minter.pids[1]
    began = time.monotonic()
    for _ in range(100):
        assert minter.poll() == []
    assert time.monotonic() - began < PATIENCE_S / 10
    minter.forget(1)
    wait_for_the_end_of(pid)
    minter.close()


@pytest.mark.parametrize("kind", ["absent", "no library"])
def test_a_library_that_is_none_fails_the_attempt_with_what_to_do(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "libnccl.so.2"
    if kind == "no library":
        path.write_text("text")
    minter = Minter(WeightsTable(nccl_library=str(path)))
    minter.mint(1, 1)
    word = next_word(minter)
    assert isinstance(word, MintFailed)
    assert word.cause.startswith(f"no id could be minted: expected NCCL's library at {path}")
    assert "set weights.nccl_library" in word.cause
    minter.close()


KILLED_WITH_A_CHILD = """
import sys, time
from services.controller.minting import Minter
from shared.config.schema import WeightsTable
minter = Minter(WeightsTable())
minter.mint(1, 1)
while not minter.poll():
    time.sleep(0.01)
print(minter.pids[1], flush=True)
sys.stdin.read()
"""


def test_a_controller_that_is_killed_takes_its_children_along() -> None:
    controller = subprocess.Popen(
        [sys.executable, "-c", KILLED_WITH_A_CHILD],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True,
    )  # fmt: skip
    assert controller.stdout is not None and controller.stdin is not None
    try:
        child = int(controller.stdout.readline())
    finally:
        controller.kill()
        controller.wait()
        controller.stdin.close()
        controller.stdout.close()
    wait_for_the_end_of(child)
