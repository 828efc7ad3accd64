"""What `ReplicaSession` tells `BusClient` to do: plain values, so that tests read them without a socket."""

from __future__ import annotations

from dataclasses import dataclass

from shared.bus.wire import Frames
from shared.messages import AnyMessage, Envelope, Refused, Registered


@dataclass(frozen=True)
class Delivery:
    """A message for the service, with its payload frames (zero-copy views; they keep their memory alive)."""

    message: AnyMessage
    frames: Frames = ()


@dataclass(frozen=True)
class Transmit:
    """Put this on the socket; if that fails it is no matter, it will be said again."""

    envelope: Envelope
    frames: Frames = ()


@dataclass(frozen=True)
class Deliver:
    """Put this into the inbox."""

    delivery: Delivery


@dataclass(frozen=True)
class Freed:
    """So many reliable messages were acknowledged: as many may be pushed again."""

    count: int


@dataclass(frozen=True)
class Answer:
    """The answer to question `request` has come (or its refusal)."""

    request: int
    message: AnyMessage


@dataclass(frozen=True)
class Opened:
    """A session stands; `first` for the first one of this process."""

    registered: Registered
    first: bool


@dataclass(frozen=True)
class Rejected:
    """The controller does not want this rank, for a reason that registering again will not mend by itself."""

    refused: Refused


@dataclass(frozen=True)
class KeyRefused:
    """The key of this connection is no longer on the list: go on with another one, or fence the session."""

    refused: Refused


@dataclass(frozen=True)
class FencedOff:
    """A newer process is this replica now, or this one has no key any more."""

    refused: Refused


Instruction = Transmit | Deliver | Freed | Answer | Opened | Rejected | KeyRefused | FencedOff
