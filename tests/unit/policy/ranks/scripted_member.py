"""A member that does what an order's cause tells it: `python tests/unit/policy/ranks/scripted_member.py NAME`."""

from __future__ import annotations

import os
import signal
import sys

import msgspec

from services.policy.ranks.channel import MemberChannel
from services.policy.ranks.orders import Done, Failed, Here, Leave, Load, Revoke, Start, Told
from shared.messages import MeshFailed


def main() -> None:
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    channel = MemberChannel(start.meet, start.rank)
    channel.answer(Here(start.rank, channel.address))
    while True:
        number, order, _ = channel.receive()
        wanted = order.state.path if isinstance(order, Load) else ""
        if isinstance(order, Leave):
            return
        if isinstance(order, Revoke):
            channel.answer(Told(start.rank, MeshFailed(order.mesh.epoch, order.mesh.cause)))
        elif wanted == "done":
            channel.answer(Done(start.rank, number, holds=True))
        elif wanted == "die":
            os.kill(os.getpid(), signal.SIGKILL if start.rank == 2 else signal.SIGSTOP)
        elif wanted in ("fatal", "restart", "mesh"):
            channel.answer(Failed(start.rank, number, wanted, "told to"))  # type: ignore[arg-type]  # one of the kinds
        # else: hang


main()
