"""What can go wrong on the bus, by name. Every text says what was expected, what came, and what to do."""

from __future__ import annotations

from shared.messages import Refused


class BusError(Exception):
    """Base of everything the bus raises."""


class BusTimeout(BusError):
    """Somebody waited for somebody else, for longer than the named limit."""


class BusClosed(BusError):
    """The bus was used after `close`, or its thread has ended with an error."""


class BindRefused(BusError):
    """The address to listen on is not one that the bus may bind."""


class KeysRefused(Exception):
    """A key, or a list of keys, that cannot be used: missing, readable by others, malformed, or of somebody else.

    No `BusError`: it shows before anything is connected, and no waiting or starting again mends it.
    """


class TurnedAway(BusError):
    """The connection did not get through the handshake: its key is not on the list, or one side alone has keys."""


class _Named(BusError):
    """An error that carries the four parts of a `Refused` message."""

    def __init__(self, fault: str, expected: str, got: str, advice: str) -> None:
        super().__init__(f"{fault}: expected {expected}, got {got}; {advice}")
        self.fault = fault
        self.expected = expected
        self.got = got
        self.advice = advice

    def as_message(self) -> Refused:
        """The same four parts, ready to be sent."""
        return Refused(fault=self.fault, expected=self.expected, got=self.got, advice=self.advice)


class Refusal(_Named):
    """The other side answered with `Refused`."""

    @classmethod
    def of(cls, refused: Refused) -> Refusal:
        """The error that stands for a received `Refused`."""
        return cls(refused.fault, refused.expected, refused.got, refused.advice)


class Fenced(Refusal):
    """The controller has given this replica to a newer process, or taken its key off the list.

    This one must end without doing anything more.
    """


class WireFault(_Named):
    """Frames that are not a message of this protocol: fault `malformed`, `protocol` or `too_large`.

    `sequence`, `request` and `body_type` are what could be read of the envelope all the same (0, 0 and "" if nothing),
    so that the receiver can answer and step over the message.
    """

    def __init__(
        self,
        fault: str,
        expected: str,
        got: str,
        advice: str,
        *,
        sequence: int = 0,
        request: int = 0,
        body_type: str = "",
    ) -> None:
        super().__init__(fault, expected, got, advice)
        self.sequence = sequence
        self.request = request
        self.body_type = body_type
