"""A person's single question to the controller: what the command line and the launcher use. No session, no thread."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import zmq

from shared.bus import wire
from shared.bus.doorstep import Doorstep
from shared.bus.errors import BusTimeout, Refusal, TurnedAway
from shared.bus.keys import PERSON, VARIABLE, client_keys
from shared.bus.sockets import RECONNECT_MS
from shared.messages import PROTOCOL, AnyMessage, Envelope, Refused

SENDER = PERSON
ASK_AGAIN_S = 2.0
MAX_BYTES = 256 << 20


def ask(
    address: str,
    message: AnyMessage,
    timeout_s: float,
    *,
    keys: Path | None = None,
    context: zmq.Context | None = None,
) -> AnyMessage:
    """Send a transient `message` and return what answers it; it is repeated until then, so it must bear repetition.

    `keys` is where the person's key lies (`keys_place`). BusTimeout if nothing came in `timeout_s`, Refusal if the
    controller refused, TurnedAway if it let nobody in with this key or without one, WireFault if it speaks otherwise;
    KeysRefused for a key that cannot be used.
    """
    if message.reliable:
        raise ValueError(f"{type(message).__name__} is a reliable message, which needs a session: use BusClient")
    request = 1 + secrets.randbits(32)
    envelope = Envelope(
        protocol=PROTOCOL,
        term=0,
        sender=SENDER,
        rank=0,
        incarnation=0,
        sequence=0,
        request=request,
        reply_to=0,
        body=message,
    )
    parts = wire.encode(envelope, (), MAX_BYTES)
    mine = client_keys(keys, SENDER) if keys is not None else None
    deadline = time.monotonic() + timeout_s
    used = context or zmq.Context()
    socket = used.socket(zmq.DEALER)
    doorstep = Doorstep(used, socket)
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(doorstep.events, zmq.POLLIN)
    try:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.MAXMSGSIZE, MAX_BYTES)
        socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.set(zmq.ROUTING_ID, f"{SENDER}/{secrets.token_hex(8)}".encode())
        if mine is not None:
            mine.configure(socket)
        socket.connect(address)
        ask_at = 0.0
        while (now := time.monotonic()) < deadline:
            if now >= ask_at:
                ask_at = now + ASK_AGAIN_S
                socket.send_multipart(parts, zmq.DONTWAIT)
            ready = dict(poller.poll(max(1, round(1000 * (min(deadline, ask_at) - now)))))
            if doorstep.events in ready:
                _check(doorstep, address)
            if socket in ready:
                answer, _ = wire.decode(socket.recv_multipart(), MAX_BYTES)
                if answer.reply_to != request:
                    continue
                if isinstance(answer.body, Refused):
                    raise Refusal.of(answer.body)
                return answer.body
    finally:
        doorstep.close()
        socket.close(linger=0)
        if context is None:
            used.term()
    raise BusTimeout(
        f"waited {timeout_s:g} s for the controller at {address} to answer {type(message).__name__}: expected an "
        "answer, got nothing; check that the run is up (`orrery status`) and that the address is right"
    )


def _check(doorstep: Doorstep, address: str) -> None:
    for failure in doorstep.failures():
        if failure.final:
            raise TurnedAway(
                f"the controller at {address} did not let this connection in: {failure.text}; give the place of a "
                f"person's key as {VARIABLE} ('orrery keys list' shows whose there are)"
            )
