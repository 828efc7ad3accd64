"""Envelopes to ZeroMQ frames and back.

The first frame is the envelope as a msgpack map; the frames after it are raw payload, described by the message's
`ArrayHeader`s, and never decoded here. Whatever bytes arrive, `decode` returns a checked message or raises `WireFault`,
never anything else: both ends of the bus rely on that to stay up. Called by `client`, `router` and `person` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec

from shared.bus.errors import WireFault
from shared.messages import (
    PROTOCOL,
    AnyMessage,
    ArrayHeader,
    Envelope,
    GroupReport,
    Lease,
    LeaseReturned,
    Partial,
    TrainStep,
)

Frame = bytes | memoryview
Frames = Sequence[Frame]

MAX_FRAMES = 65_536
"""Most frames of one message, the envelope included."""
MAX_ENVELOPE_BYTES = 16 << 20
"""Largest envelope: one byte of msgpack can become ten in memory, payload cannot."""
MAX_DIMENSIONS = 8
MAX_SENDER = 200
"""Characters of a sender's name."""
MAX_GOT = 200
"""Characters of a fault's `got`, so that a refusal cannot be used to echo megabytes."""

ITEM_BYTES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}
"""Element types that may travel, by numpy's name, with their size in bytes."""

ADVICE = {
    "malformed": "send messages as shared/messages.py defines them, through shared.bus",
    "protocol": "run the same version of Orrery on both sides",
    "too_large": "send less in one message, or raise bus.max_message_mb on both sides",
}

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


class _Glimpse(msgspec.Struct):
    """What can be read of an envelope that does not decode: every field optional, of any type, the others skipped."""

    protocol: Any = None
    sequence: Any = None
    request: Any = None
    body: msgspec.Raw = msgspec.Raw()


class _BodyGlimpse(msgspec.Struct):
    type: Any = None


_glimpse = msgspec.msgpack.Decoder(_Glimpse)
_body_glimpse = msgspec.msgpack.Decoder(_BodyGlimpse)


def encode(envelope: Envelope, frames: Frames, max_bytes: int) -> list[Frame]:
    """The frames to put on the socket. WireFault if the other side would refuse them."""
    first = _encoder.encode(envelope)
    parts: list[Frame] = [first, *frames]
    _check_size(parts, max_bytes)
    _check_payload(envelope.body, frames)
    return parts


def check_outgoing(message: AnyMessage, frames: Frames, max_bytes: int) -> None:
    """WireFault now, in the thread of the caller, for what `encode` might refuse later, whatever the envelope says."""
    widest = (1 << 63) - 1
    envelope = Envelope(
        protocol=PROTOCOL,
        term=widest,
        sender="?" * MAX_SENDER,
        rank=widest,
        incarnation=widest,
        sequence=widest,
        request=widest,
        reply_to=widest,
        body=message,
    )
    encode(envelope, frames, max_bytes)


def decode(parts: Frames, max_bytes: int) -> tuple[Envelope, tuple[Frame, ...]]:
    """The envelope and its payload frames, checked: protocol, types, sizes, counts. WireFault and nothing else."""
    if not parts:
        raise _fault("malformed", "an envelope and its payload frames", "a message without frames")
    try:
        _check_size(parts, max_bytes)
        try:
            envelope = _decoder.decode(parts[0])
        except Exception as error:  # whatever the bytes: invalid UTF-8 and deep nesting have errors of their own
            got = f"{type(error).__name__}: {error}"
            raise _fault("malformed", "a msgpack envelope of shared/messages.py", got) from None
        _check_protocol(envelope.protocol)
        _check_numbers(envelope)
        _check_payload(envelope.body, parts[1:])
    except WireFault as fault:
        raise _look_again(fault, parts[0]) from None
    return envelope, tuple(parts[1:])


def array_headers(message: object) -> list[ArrayHeader]:
    """The headers that describe the payload frames of `message`, in order; none for most messages."""
    match message:
        case GroupReport():
            return message.arrays
        case TrainStep():
            return list(chain.from_iterable(group.arrays for group in message.groups))
        case LeaseReturned(partial=Partial(arrays=arrays)):
            return arrays
        case Lease():
            partials = (grant.partial for grant in message.grants)
            return [header for partial in partials if partial is not None for header in partial.arrays]
    return []


def _check_size(parts: Frames, max_bytes: int) -> None:
    if len(parts) > MAX_FRAMES:
        raise _fault("too_large", f"at most {MAX_FRAMES} frames", f"{len(parts)} frames")
    envelope_bytes = _size(parts[0])
    if envelope_bytes > MAX_ENVELOPE_BYTES:
        raise _fault("too_large", f"an envelope of at most {MAX_ENVELOPE_BYTES} bytes", f"{envelope_bytes} bytes")
    total = sum(map(_size, parts))
    if total > max_bytes:
        raise _fault("too_large", f"at most {max_bytes} bytes in one message", f"{total} bytes")


def _check_protocol(protocol: int) -> None:
    if protocol != PROTOCOL:
        raise _fault("protocol", f"protocol version {PROTOCOL}", f"version {protocol}")


def _check_numbers(envelope: Envelope) -> None:
    for name in ("term", "incarnation", "sequence", "request", "reply_to"):
        value = getattr(envelope, name)
        if value < 0:
            raise _fault("malformed", f"{name} of 0 or more", str(value))
    if len(envelope.sender) > MAX_SENDER:
        raise _fault("malformed", f"a sender of at most {MAX_SENDER} characters", f"{len(envelope.sender)}")
    kind = type(envelope.body).__name__
    if envelope.body.reliable and envelope.sequence == 0:
        raise _fault("malformed", f"a sequence of 1 or more on {kind}, which is reliable", "0")
    if not envelope.body.reliable and envelope.sequence != 0:
        raise _fault("malformed", f"sequence 0 on {kind}, which is transient", str(envelope.sequence))


def _check_payload(message: object, frames: Frames) -> None:
    headers = array_headers(message)
    if len(headers) != len(frames):
        kind = type(message).__name__
        raise _fault("malformed", f"{len(headers)} payload frames, as the headers of {kind} say", str(len(frames)))
    for header, frame in zip(headers, frames, strict=True):
        expected = _described_bytes(header)
        if expected != _size(frame):
            what = f"{expected} bytes for array {header.name[:40]!r} ({header.dtype}{header.shape})"
            raise _fault("malformed", what, f"{_size(frame)} bytes")


def _described_bytes(header: ArrayHeader) -> int:
    item = ITEM_BYTES.get(header.dtype)
    if item is None:
        raise _fault("malformed", "a dtype among " + ", ".join(ITEM_BYTES), header.dtype)
    if len(header.shape) > MAX_DIMENSIONS:
        raise _fault("malformed", f"at most {MAX_DIMENSIONS} dimensions", str(len(header.shape)))
    total = item
    for length in header.shape:
        if length < 0:
            raise _fault("malformed", "lengths of 0 or more in a shape", str(header.shape))
        total *= length
    return total


def _size(frame: Frame) -> int:
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def _fault(fault: str, expected: str, got: str) -> WireFault:
    return WireFault(fault, expected, got[:MAX_GOT], ADVICE[fault])


def _look_again(fault: WireFault, first: Frame) -> WireFault:
    """The fault, with what a schema-free look at the envelope adds: its numbers, and the version if that is why."""
    if _size(first) > MAX_ENVELOPE_BYTES:
        return fault
    try:
        seen = _glimpse.decode(first)
        body = _body_glimpse.decode(seen.body) if bytes(seen.body) else _BodyGlimpse()
    except Exception:  # not even a map: the first look has said all there is to say
        return fault
    if fault.fault == "malformed" and type(seen.protocol) is int and seen.protocol != PROTOCOL:
        fault = _fault("protocol", f"protocol version {PROTOCOL}", f"version {seen.protocol}")
    fault.sequence, fault.request = _natural(seen.sequence), _natural(seen.request)
    fault.body_type = body.type if isinstance(body.type, str) else ""
    return fault


def _natural(value: object) -> int:
    return value if type(value) is int and value > 0 else 0
