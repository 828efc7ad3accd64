"""`python -m services.policy.ranks NAME`: a further rank of a policy replica. Started by rank 0 alone (`crew`).

The name is for whoever looks at a list of processes; what to do comes over standard input, and then as orders.
"""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from shared.service import begin_process
from shared.signals import NUMBERS


def main() -> NoReturn:
    """Load torch only once this process is tied to rank 0."""
    begin_process()
    for number in NUMBERS:  # they reach the whole process group; what they mean is rank 0's to decide
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)  # rank 0 starts its members with these blocked
    told = sys.stdin.buffer.readline()
    from services.policy.ranks.member import run

    run(told)


if __name__ == "__main__":
    main()
