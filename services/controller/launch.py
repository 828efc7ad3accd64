"""Which launch of a run a controller belongs to, where an older one may still be alive on a machine that was cut off.

Whoever starts controllers *claims* the run first: it writes the next number to the file `launch` and starts its
controllers with it. A controller of an older launch is fenced. Three things together see to it that two controllers
never write one journal, and that nobody is told what the newer one does not know:

    lock      a controller opens the journal only with the run's lock, which the file system gives to one (`__main__`)
    look      every LOOK_S a controller compares the file with its own number; the older one ends, and the lock is free
    commit    so it does after each sync, before anything leaves: what it wrote after the claim has no consequences

The run folder is on a file system that all machines share, and its locks must hold across them.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

LOOK_S = 1.0
"""How often a controller looks whether it was superseded."""
CLAIM = "launch"


class Superseded(Exception):
    """A newer launch of this run has begun: this controller is fenced."""


class Launch:
    """The claim that a controller acts under; 0 is that of a launcher that knows itself to be the only one."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self._path = folder / CLAIM

    def check(self) -> None:
        """Superseded if a newer launch has claimed the run. May run in any thread."""
        if self.number and (newest := newest_launch(self._path.parent)) > self.number:
            raise Superseded(f"expected launch {self.number} in {self._path}, got {newest}: this process ends")


def newest_launch(folder: Path) -> int:
    """The last claim's number; 0 if nobody has claimed the run."""
    try:
        text = (folder / CLAIM).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return 0
    return int(text) if text.isdigit() else 0


def claim_launch(folder: Path) -> int:
    """Claim the run: from now on controllers of launches before this one end. Its number."""
    lock = os.open(folder / f"{CLAIM}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        number = newest_launch(folder) + 1
        beside = folder / f".{CLAIM}.new"
        with beside.open("w", encoding="utf-8") as file:
            file.write(f"{number}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, folder / CLAIM)
        return number
    finally:
        os.close(lock)
