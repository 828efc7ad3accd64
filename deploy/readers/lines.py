"""Reading files that others are still writing, whole lines only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


class LineFollower:
    """Yields each line of a growing file once. A file that is not there yet is empty; a line without its end waits."""

    def __init__(self, path: Path, *, at_end: bool = False) -> None:
        self._path = path
        self._offset = self._size() if at_end else 0

    def new(self) -> Iterator[str]:
        """The lines that were completed since the last call, without their ends."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return  # read again from its start: its writer may also cut it off
                    self._offset += len(line)
                    yield line[:-1].decode(errors="replace")
        except FileNotFoundError:
            return

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0
