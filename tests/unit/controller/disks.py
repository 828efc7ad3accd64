"""A disk in memory: what was synced survives its crash, what was only written may not; it can run full."""

from __future__ import annotations

import errno
from pathlib import Path


class MemoryDisk:
    """One folder. `log` tells what was done, in order; `room` is how many more bytes fit (None: endless)."""

    def __init__(self, files: dict[str, bytes] | None = None, log: list[tuple[str, str]] | None = None) -> None:
        self.files = {name: bytearray(data) for name, data in (files or {}).items()}
        self.log = log if log is not None else []
        self.room: int | None = None
        self._durable: dict[str, bytes] = dict(files or {})

    def names(self) -> list[str]:
        """The files that exist, sorted."""
        return sorted(self.files)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file."""
        data = bytes(self.files[name])
        return data[offset:] if size is None else data[offset : offset + size]

    def append(self, name: str, *parts: bytes | memoryview) -> None:
        """Add to the end; a full disk takes what fits and then fails, as a real one does."""
        self.log.append(("append", name))
        data = b"".join(parts)
        fits = data if self.room is None else data[: self.room]
        self.files.setdefault(name, bytearray()).extend(fits)
        if self.room is not None:
            self.room -= len(fits)
            if len(fits) < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")

    def sync(self, name: str) -> None:
        """What the file holds now is durable."""
        self.log.append(("sync", name))
        if name in self.files:
            self._durable[name] = bytes(self.files[name])

    def truncate(self, name: str, size: int) -> None:
        """Cut a file, durably."""
        self.log.append(("truncate", name))
        del self.files[name][size:]
        self._durable[name] = bytes(self.files[name])

    def replace(self, name: str, data: bytes) -> None:
        """New content, durably."""
        self.log.append(("replace", name))
        self.files[name] = bytearray(data)
        self._durable[name] = data

    def delete(self, name: str) -> None:
        """Remove a file."""
        self.log.append(("delete", name))
        self.files.pop(name, None)
        self._durable.pop(name, None)

    def after_crash(self) -> MemoryDisk:
        """The disk that the next process finds: only what was synced."""
        return MemoryDisk(dict(self._durable))

    def copy(self) -> MemoryDisk:
        """The disk as it is, everything written included."""
        return MemoryDisk({name: bytes(data) for name, data in self.files.items()})

    def dump(self, folder: Path) -> None:
        """Write the files into a real folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
