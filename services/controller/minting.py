"""Unique ids of NCCL meshes: one disposable child process for each attempt, which answers through a pipe.

The shell asks, and polls; nothing here waits. The deadline of an answer is the core's (`timeouts.mint_s`), and ends in
`forget`. Invariants: an attempt's child lives from `mint` to `forget` and no longer; one that dies before is told as a
failure, once, since ranks that have yet to come would meet nobody.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from shared.config.schema import WeightsTable
from shared.nccl.library import ID_BYTES, INTERFACE_VARIABLE, exactly

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_BYTES = 1 << 16
"""Of an answer: some 200 ids."""


@dataclass(frozen=True)
class Minted:
    """The ids of `epoch`, by the library of this version."""

    epoch: int
    version: str
    ids: list[bytes]


@dataclass(frozen=True)
class MintFailed:
    """There will be no ids for `epoch`, or those that there are lead nowhere."""

    epoch: int
    cause: str


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    pipe: int
    count: int
    answered: bool = False
    heard: bytearray = field(default_factory=bytearray)


class Minter:
    """The children that mint, by the epoch of their mesh. The table says which library, and where ranks meet."""

    def __init__(self, table: WeightsTable) -> None:
        self._library = table.nccl_library
        search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        # what the site has set for all services holds here too
        self._environment = {INTERFACE_VARIABLE: exactly(table.interface)} | os.environ | {"PYTHONPATH": search}
        self._children: dict[int, _Child] = {}
        self._dying: list[subprocess.Popen[bytes]] = []
        self._unstarted: list[MintFailed] = []

    @property
    def pids(self) -> dict[int, int]:
        """The live children, by epoch."""
        return {epoch: child.process.pid for epoch, child in self._children.items()}

    def mint(self, epoch: int, count: int) -> None:
        """Ask for `count` ids for one attempt; `poll` tells what comes of it."""
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "shared.nccl.mint", str(writing), str(count), self._library, str(os.getpid())]
        try:
            process = subprocess.Popen(
                command, pass_fds=[writing], env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            os.close(reading)
            self._unstarted.append(MintFailed(epoch, f"the process that mints its id could not be started: {error}"))
        else:
            os.set_blocking(reading, False)
            self._children[epoch] = _Child(process, reading, count)
        finally:
            os.close(writing)

    def poll(self) -> list[Minted | MintFailed]:
        """What has come since the last look."""
        self._dying = [process for process in self._dying if process.poll() is None]
        told: list[Minted | MintFailed] = [*self._unstarted]
        self._unstarted = []
        for epoch, child in list(self._children.items()):
            word = self._look(epoch, child)
            if word is not None:
                told.append(word)
            if isinstance(word, MintFailed):
                self.forget(epoch)
        return told

    def forget(self, epoch: int) -> None:
        """The mesh stands, or never will: its child ends, and with it the socket and the thread behind the id."""
        child = self._children.pop(epoch, None)
        if child is None:
            return
        os.close(child.pipe)
        child.process.kill()
        if child.process.poll() is None:
            self._dying.append(child.process)

    def close(self) -> None:
        """Leave nothing running."""
        for epoch in list(self._children):
            self.forget(epoch)
        for process in self._dying:
            process.wait()

    def _look(self, epoch: int, child: _Child) -> Minted | MintFailed | None:
        ended = child.process.poll()  # before the pipe is read, so that last words are heard
        if not child.answered:
            with suppress(BlockingIOError):
                child.heard += os.read(child.pipe, MOST_BYTES)
            if b"\n" in child.heard:
                child.answered = True
                return _answer(epoch, child)
        if ended is None:
            return None
        how = f"killed by {signal.Signals(-ended).name}" if ended < 0 else f"exit code {ended}"
        state = "while the mesh was forming" if child.answered else "before it had minted"
        return MintFailed(epoch, f"the process that minted its id (pid {child.process.pid}) ended {state}: {how}")


def _answer(epoch: int, child: _Child) -> Minted | MintFailed:
    try:
        answer = json.loads(child.heard)
        if "error" in answer:
            return MintFailed(epoch, f"no id could be minted: {answer['error']}")
        ids = [bytes.fromhex(text) for text in answer["ids"]]
        if len(ids) != child.count or {len(unique_id) for unique_id in ids} != {ID_BYTES}:
            raise ValueError(f"expected {child.count} ids of {ID_BYTES} bytes, got {[len(i) for i in ids]}")
        return Minted(epoch, str(answer["version"]), ids)
    except (ValueError, KeyError, TypeError) as error:
        return MintFailed(epoch, f"the process that mints its id gave no answer that can be read: {error}")
