"""What happens to connections before they can say anything: the failures of ZeroMQ's handshake, in words."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)  # fmt: skip

_numbers = itertools.count()


@dataclass(frozen=True)
class Failure:
    """One handshake that failed. `of_key`: the controller does not know the key. `final`: ZeroMQ does not try again."""

    text: str
    of_key: bool = False
    final: bool = True


class Doorstep:
    """Watches a socket's connections. To be made before that is bound or connected, and closed before it."""

    def __init__(self, context: zmq.Context, socket: zmq.Socket[Any]) -> None:
        self._socket = socket
        address = f"inproc://doorstep-{next(_numbers)}"
        socket.monitor(address, FAILED)
        self.events = context.socket(zmq.PAIR)
        """Readable when there is something new; to be polled."""
        self.events.set(zmq.LINGER, 0)
        self.events.set(zmq.RCVHWM, 0)  # a full queue would hold up ZeroMQ's own thread
        self.events.connect(address)

    def failures(self) -> list[Failure]:
        """What has failed since this was last asked."""
        found: list[Failure] = []
        while True:
            try:
                event = parse_monitor_message(self.events.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return found
            if event["event"] & FAILED:
                found.append(_describe(event["event"], event["value"]))

    def close(self) -> None:
        """Watch no longer."""
        self._socket.monitor(None, 0)
        self.events.close(linger=0)


def _describe(event: int, value: int) -> Failure:
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return Failure("its key is not on the controller's list", of_key=True)
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        return Failure("the other side hung up: it may have another key than expected here, or none", final=False)
    if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return Failure("one side has keys, the other has none")
    if value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
        return Failure("the keys of the two sides do not belong together")
    return Failure(f"the other side does not speak ZeroMQ's protocol (error {value:#x})")
