"""A file that is as young as the controller's last word: how others see that a replica is on the bus.

`ORRERY_PULSE` names the file. While a session is open, it is touched whenever the controller has been heard since the
last look, at most once every heartbeat; so its age is the silence, and a health check needs no connection of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

from shared.telemetry import get_logger

VARIABLE = "ORRERY_PULSE"


class Pulse:
    """The file of this process; none where nobody asked for it, and none after a disk has refused it."""

    def __init__(self, path: Path | None, every_s: float) -> None:
        self._path = path
        self._every_s = every_s
        self._told = float("-inf")

    @classmethod
    def of_environment(cls, every_s: float) -> Pulse:
        """The file that `ORRERY_PULSE` names."""
        place = os.environ.get(VARIABLE)
        return cls(Path(place) if place else None, every_s)

    def heard(self, at: float) -> None:
        """The controller was last heard at this time, of any one clock."""
        if self._path is None or at < self._told + self._every_s:
            return
        self._told = at
        try:
            self._path.touch()
        except OSError as error:
            get_logger().warning("the pulse cannot be told", file=str(self._path), why=str(error))
            self._path = None
