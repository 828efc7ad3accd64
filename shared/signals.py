"""SIGTERM and SIGINT of a replica: it leaves in good order where that is to be had, else at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Protocol

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The signal came before there was a service, or it does not leave in good order: drop what is under way."""


class Leaves(Protocol):
    """A service that can leave in good order."""

    def leave(self) -> bool:
        """Begin to; safe in a signal handler. False if there is nothing to wait for: it may be interrupted."""


class Signals:
    """Handles them from now on; `service` is set as soon as there is one."""

    def __init__(self) -> None:
        self.service: Leaves | None = None
        for number in NUMBERS:
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.service is None or not self.service.leave():
            raise Stopped

    def ignore(self) -> None:
        """A further one must not tear the goodbye, nor the exit code."""
        for number in NUMBERS:
            signal.signal(number, signal.SIG_IGN)
