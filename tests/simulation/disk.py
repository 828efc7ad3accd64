"""A disk in memory that crashes as disks do: what was synced stays, of the rest a random prefix, or not even the name.

`Image` is what lies on the disk; a `Handle` is one process's way to one of its folders, and where faults strike: each
operation asks `guard` first and tells it afterwards. A fenced handle can read but not write: its owner is no longer
the one whose journal counts.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

Guard = Callable[[str, str, str], None]
"""Told (operation, file, "before" | "middle" | "after"); may raise to end the process there."""


class Folder:
    """Files with what would survive a loss of power. Deletions and new names count once the folder was synced."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}
        self._synced: dict[str, int] = {}
        self._named: dict[str, None] = {}
        self._deleted: dict[str, bytes] = {}

    def append(self, name: str, data: bytes) -> None:
        """Into the page cache only."""
        self.files.setdefault(name, bytearray()).extend(data)

    def sync(self, name: str) -> None:
        """The file's content is durable, and its name if it was new."""
        self._synced[name] = len(self.files[name])
        if name not in self._named:
            self.sync_names()

    def sync_names(self) -> None:
        """The folder itself is durable."""
        self._named = dict.fromkeys(self.files)
        self._deleted.clear()

    def truncate(self, name: str, size: int) -> None:
        """Durably."""
        del self.files[name][size:]
        self._synced[name] = size

    def replace(self, name: str, data: bytes) -> None:
        """Durably, all or nothing."""
        self.files[name] = bytearray(data)
        self._synced[name] = len(data)
        self.sync_names()

    def delete(self, name: str) -> None:
        """Gone for the processes; durable with the next sync of the folder."""
        data = self.files.pop(name, None)
        if data is not None and name in self._named:
            self._deleted[name] = bytes(data[: self._synced.get(name, 0)])
        self._synced.pop(name, None)
        self._named.pop(name, None)

    def lose_power(self, chance: random.Random) -> None:
        """Keep what was synced, and of the rest what chance leaves."""
        for name, data in self._deleted.items():
            if name not in self.files and chance.random() < 0.5:
                self.files[name] = bytearray(data)
                self._synced[name] = len(data)
        for name in list(self.files):
            synced = self._synced.get(name, 0)
            if name not in self._named and synced == 0 and chance.random() < 0.5:
                del self.files[name]
                continue
            data = self.files[name]
            del data[chance.randint(synced, len(data)) :]
            self._synced[name] = len(data)
        self.sync_names()


class Image:
    """The controller's disk: `journal` and `spool`. `room` is how many more bytes fit (None: endless)."""

    def __init__(self) -> None:
        self.folders = {"journal": Folder(), "spool": Folder()}
        self.room: int | None = None

    def lose_power(self, chance: random.Random) -> None:
        """Every folder crashes."""
        for folder in self.folders.values():
            folder.lose_power(chance)


class Handle:
    """`services.controller.disk.Disk` on one folder of an image, for one process."""

    def __init__(self, image: Image, folder: str, guard: Guard, fenced: Callable[[], bool]) -> None:
        self._image = image
        self._folder = image.folders[folder]
        self._guard = guard
        self._fenced = fenced

    def names(self) -> list[str]:
        """The files that exist, sorted."""
        return sorted(self._folder.files)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file."""
        data = self._folder.files.get(name)
        if data is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return bytes(data[offset:]) if size is None else bytes(data[offset : offset + size])

    def append(self, name: str, *parts: bytes | memoryview) -> None:
        """Takes what fits, and then fails, as a real disk does."""
        self._write("append", name)
        fits = data = b"".join(parts)
        if self._image.room is not None:
            fits = data[: self._image.room]
            self._image.room -= len(fits)
        half = len(fits) // 2
        self._folder.append(name, fits[:half])
        self._guard("append", name, "middle")
        self._folder.append(name, fits[half:])
        if len(fits) < len(data):
            raise OSError(errno.ENOSPC, "no space left on device", name)
        self._guard("append", name, "after")

    def sync(self, name: str) -> None:
        """What the file holds now is durable."""
        self._write("sync", name)
        if name in self._folder.files:
            self._folder.sync(name)
        self._guard("sync", name, "after")

    def truncate(self, name: str, size: int) -> None:
        """Cut a file, durably."""
        self._write("truncate", name)
        self._folder.truncate(name, size)
        self._guard("truncate", name, "after")

    def replace(self, name: str, data: bytes) -> None:
        """New content, all or nothing, durably."""
        self._write("replace", name)
        if self._image.room is not None and self._image.room < len(data):
            raise OSError(errno.ENOSPC, "no space left on device", name)
        self._folder.replace(name, data)
        self._guard("replace", name, "after")

    def delete(self, name: str) -> None:
        """Remove a file."""
        self._write("delete", name)
        self._folder.delete(name)
        self._guard("delete", name, "after")

    def _write(self, operation: str, name: str) -> None:
        if self._fenced():
            raise OSError(errno.EROFS, "another controller has taken this disk", name)
        self._guard(operation, name, "before")
