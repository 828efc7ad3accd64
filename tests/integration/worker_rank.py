"""A worker of an engine that computes for ever, for test_ranks.py: `python -m tests.integration.worker_rank NUMBER`.

Reads the invitation from its standard input, joins the replica, says so, and keeps the interpreter busy.
"""

from __future__ import annotations

import sys

from shared.engines.ranks import join

if __name__ == "__main__":
    join(sys.stdin.buffer.read(), int(sys.argv[1]))
    print("joined", flush=True)
    while True:
        sum(range(1000))
