"""Engine processes that do not outlive the rollout which started them, however that ended.

The kernel's own signal for that reaches direct children alone; the workers of an engine are grandchildren, whose parent
does not always notice.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading

OWNER_VARIABLE = "ORRERY_ENGINE_OWNER"
"""Process id of the rollout, in the environment of its engine's processes."""


def own_engines() -> None:
    """Called by the rollout, before it starts an engine."""
    os.environ[OWNER_VARIABLE] = str(os.getpid())


def die_with_owner() -> None:
    """Called in an engine's worker: once the owner is gone, its parent and itself are killed."""
    owner = os.environ.get(OWNER_VARIABLE)
    if owner is not None:
        threading.Thread(target=_watch, args=(int(owner), os.getppid()), name="owner", daemon=True).start()


def _watch(owner: int, parent: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(owner)], [], [])
    for process in (parent, os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
