"""The processes of an engine: whether they still live, and that none outlives the rollout which started them.

They may be grandchildren, of which neither `waitpid` nor the kernel's signal for the death of a parent tells.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterable

from shared.nccl.library import preload_in_engines


class Watched:
    """Processes whose end is seen at once, whoever their parent is. The first `ranks` of them hold a part of the model.

    The rollout is rank 0 of its replica, they are the ranks from 1 on.
    """

    def __init__(self, pids: Iterable[int], ranks: int = 0) -> None:
        pids = list(pids)
        self._names = {pid: f"rank {1 + index} (process {pid})" for index, pid in enumerate(pids[:ranks])}
        self._descriptors: dict[int, int] = {}
        self._gone: int | None = None
        for pid in pids:
            try:
                self._descriptors[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                self._gone = pid

    def ended(self) -> str | None:
        """The name of one that has ended; cheap, from any thread."""
        pid = self._ended()
        return self._names.get(pid, f"process {pid}") if pid is not None else None

    def _ended(self) -> int | None:
        if self._gone is not None:
            return self._gone
        looking = select.poll()  # select() knows descriptors below 1024 alone
        for descriptor in self._descriptors.values():
            looking.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in looking.poll(0)}
        return next((pid for pid, descriptor in self._descriptors.items() if descriptor in ready), None)

    def kill(self) -> None:
        """End all that are left, and wait for those that are children."""
        for descriptor in self._descriptors.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        for pid in self._descriptors:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def close(self) -> None:
        """Watch nothing more."""
        descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)


OWNER_VARIABLE = "ORRERY_ENGINE_OWNER"
"""Process id of the rollout, in the environment of its engine's processes."""


def own_engines() -> None:
    """Called by the rollout, before it starts an engine: its processes end with it, and load the NCCL that it has."""
    os.environ[OWNER_VARIABLE] = str(os.getpid())
    preload_in_engines(os.environ)


def die_with_owner() -> None:
    """Called in an engine's worker: once the owner is gone, its parent and itself are killed."""
    owner = os.environ.get(OWNER_VARIABLE)
    if owner is not None:
        threading.Thread(target=_watch, args=(int(owner), os.getppid()), name="owner", daemon=True).start()


def _watch(owner: int, parent: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        looking = select.poll()
        looking.register(os.pidfd_open(owner), select.POLLIN)
        looking.poll()
    for process in (parent, os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
