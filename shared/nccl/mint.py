"""`python -m shared.nccl.mint DESCRIPTOR COUNT LIBRARY PARENT`: mints ids, hosts their rendezvous, waits to be killed.

An id of NCCL is an address: whoever minted it has a socket and a thread there until all ranks have come, which nothing
but the end of the process takes back. So each attempt at a mesh has a process of its own. Its one answer, on the
descriptor, is a line of JSON: {"version": "2.32.3", "ids": ["hex", ...]} or {"error": "..."}.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

from shared.nccl.library import NcclError, find, open_library

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def main(arguments: list[str]) -> int:
    """Answer, then wait."""
    descriptor, count, configured = int(arguments[0]), int(arguments[1]), arguments[2]
    # with the controller's death the attempts that it had begun are void
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(arguments[3]):
        return 1
    try:
        library = open_library(find(configured))
        answer = {"version": library.version, "ids": [library.unique_id().hex() for _ in range(count)]}
    except NcclError as error:
        answer = {"error": str(error)}
    with os.fdopen(descriptor, "w") as pipe:
        pipe.write(json.dumps(answer) + "\n")
    if "error" in answer:
        return 1
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
