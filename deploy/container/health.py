"""`python -m deploy.container.health ADDRESS`: does the controller in this container answer a question?

A replica's own health is cheaper to see: `shared/bus/pulse.py` keeps a file as young as the controller's last word.
"""

from __future__ import annotations

import sys

from shared.bus import BusError, ask, keys_place
from shared.messages import WantedRequest

ANSWER_S = 5.0


def main(address: str) -> int:
    """0 if it does; 1, with the reason, if it does not."""
    try:
        ask(address, WantedRequest(), ANSWER_S, keys=keys_place(None))
    except BusError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
