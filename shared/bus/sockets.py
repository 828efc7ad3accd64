"""Socket options that both ends of the bus share, and the rule about addresses."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import zmq
import zmq.asyncio

from shared.bus.errors import BindRefused
from shared.bus.keys import VARIABLE

if TYPE_CHECKING:
    import asyncio

    from shared.bus.wire import Frame
    from shared.config.schema import BusTable

RECONNECT_MS = 100
RECONNECT_MOST_MS = 2000
CURVE_BYTES = 64
"""What encryption adds to a frame, rounded up."""


def configure(socket: zmq.Socket, settings: BusTable) -> None:
    """Bounded queues and sizes, ZeroMQ's own heartbeats, nothing kept after close."""
    socket.set(zmq.LINGER, 0)
    # Two windows: a resent window may follow the one that is still on its way.
    socket.set(zmq.SNDHWM, 2 * settings.window)
    socket.set(zmq.RCVHWM, 2 * settings.window)
    # Per frame, and by cutting the connection: shared.bus.wire refuses the message's total by name before that.
    socket.set(zmq.MAXMSGSIZE, max_bytes(settings) + CURVE_BYTES)
    socket.set(zmq.HEARTBEAT_IVL, max(1, round(1000 * settings.heartbeat_s)))
    socket.set(zmq.HEARTBEAT_TIMEOUT, max(1, round(1000 * settings.lost_after_s)))


def configure_dealer(socket: zmq.Socket, settings: BusTable) -> None:
    """The connecting side: in addition reconnects, and queues nothing for a controller that is not there."""
    configure(socket, settings)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MOST_MS)
    # Without it, what is repeated to a dead controller piles up and reaches the next one all at once.
    socket.set(zmq.IMMEDIATE, 1)


def configure_router(socket: zmq.Socket, settings: BusTable) -> None:
    """The binding side: unreachable peers are errors, and a reconnecting peer takes its identity over."""
    configure(socket, settings)
    socket.set(zmq.ROUTER_MANDATORY, 1)
    socket.set(zmq.ROUTER_HANDOVER, 1)


def send_now(socket: zmq.asyncio.Socket, parts: Sequence[Frame]) -> BaseException | None:
    """Hand `parts` to ZeroMQ without waiting and, where they are large, without copying; returns what went wrong."""
    sent = cast("asyncio.Future[object]", socket.send_multipart(as_frames(parts), flags=zmq.DONTWAIT, copy=False))
    return sent.exception()  # with DONTWAIT the future is done already


def as_frames(parts: Sequence[Frame]) -> list[Frame | zmq.Frame]:
    """What came in as a frame goes out as that frame: a view would be wrapped once more, and freed by a thread."""
    return [part.obj if isinstance(part, memoryview) and isinstance(part.obj, zmq.Frame) else part for part in parts]


def max_bytes(settings: BusTable) -> int:
    """Largest message, all frames together, in bytes."""
    return settings.max_message_mb << 20


def check_bind(address: str, *, keys: bool) -> None:
    """BindRefused unless only this machine (or process) can reach `address`, or whoever connects must show a key."""
    scheme, _, rest = address.partition("://")
    if scheme == "inproc" and rest and keys:
        raise BindRefused(f"the controller was to listen on {address!r} with keys: CURVE needs tcp:// or ipc://")
    if scheme in ("inproc", "ipc") and rest:
        return
    host, _, port = rest.rpartition(":")
    host = host.strip("[]")
    if scheme == "tcp" and host and port and (keys or host == "localhost" or _is_loopback(host)):
        return
    raise BindRefused(
        f"the controller was to listen on {address!r}: expected a loopback address such as tcp://127.0.0.1:*, or keys, "
        "because anyone who reaches the port could steer the run; run 'orrery keys make' and give its folder as "
        f"bus.keys or {VARIABLE}, or set bus.bind to a loopback address"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name or a wildcard
        return False
