"""Where the controller listens: an address as it is, or a file that always names the newest one.

A launcher that picks the port once gives everybody the address. Where a new term may begin on another machine, it gives
the path of `controller.address` in the run folder instead, which each term replaces by renaming (`TELLS`), and whoever
connects reads it again and again.
"""

from __future__ import annotations

from pathlib import Path

TELLS = "controller.address"
"""The file in a run's folder: ADDRESS TERM."""


def resolve(given: str) -> str:
    """The address to connect to now; empty while the file that would tell it has not been written."""
    if not given.startswith("/"):
        return given
    try:
        words = Path(given).read_text(encoding="utf-8").split()
    except OSError:
        return ""  # no term has begun yet, or the file system is away for a moment
    return words[0] if words else ""
