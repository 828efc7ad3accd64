"""The few things that journal and spool ask of a disk, so that they also run on a simulated one.

Nothing counts as written before `sync`. Names are relative to one folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

MOST_PARTS = 1024
"""Most parts that one writev takes (IOV_MAX on Linux)."""
MOST_BYTES = 1 << 20
"""Bytes that one writev is given, about: several megabytes at a time take ext4 several times the CPU."""


class Disk(Protocol):
    """A flat folder of files."""

    def names(self) -> list[str]:
        """The files that exist, sorted."""

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file; fewer than asked for at its end."""

    def append(self, name: str, *parts: bytes | memoryview) -> None:
        """Add to the end of a file, made when it isn't there. OSError when the disk is full."""

    def sync(self, name: str) -> None:
        """Return when everything appended to the file, and its name, would survive a crash."""

    def truncate(self, name: str, size: int) -> None:
        """Cut a file, durably."""

    def replace(self, name: str, data: bytes) -> None:
        """Give a file new content, all or nothing, durably."""

    def delete(self, name: str) -> None:
        """Remove a file; one that isn't there is no error."""


class FolderDisk:
    """A real folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files: dict[str, int] = {}
        self._unsynced_names: set[str] = set()

    def names(self) -> list[str]:
        """The files that exist, sorted."""
        return sorted(path.name for path in self._folder.iterdir() if path.is_file())

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file; fewer than asked for at its end."""
        with (self._folder / name).open("rb") as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)

    def append(self, name: str, *parts: bytes | memoryview) -> None:
        """Add to the end of a file, made when it isn't there; without copying, in as few calls as the system allows."""
        descriptor = self._files.get(name)
        if descriptor is None:
            if not (self._folder / name).exists():
                self._unsynced_names.add(name)
            descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._files[name] = descriptor
        views = [memoryview(part) for part in parts]
        first = 0
        while first < len(views):
            end, size = first, 0
            while end < len(views) and size < MOST_BYTES and end - first < MOST_PARTS:
                size += views[end].nbytes
                end += 1
            written = os.writev(descriptor, views[first:end])
            while first < len(views) and written >= views[first].nbytes:
                written -= views[first].nbytes
                first += 1
            if written:
                views[first] = views[first][written:]

    def sync(self, name: str) -> None:
        """fsync the file, and the folder when the file is new or was written by another process."""
        if name not in self._files:
            self._files[name] = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND)
            self._unsynced_names.add(name)
        os.fsync(self._files[name])
        if name in self._unsynced_names:
            self._sync_folder()
            self._unsynced_names.discard(name)

    def truncate(self, name: str, size: int) -> None:
        """Cut a file, durably."""
        self._close(name)
        with (self._folder / name).open("rb+") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def replace(self, name: str, data: bytes) -> None:
        """Write beside it, fsync, rename."""
        self._close(name)
        beside = self._folder / f".{name}.new"
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._folder / name)
        self._sync_folder()

    def delete(self, name: str) -> None:
        """Remove a file; one that isn't there is no error."""
        self._close(name)
        (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close every file."""
        for name in list(self._files):
            self._close(name)

    def _close(self, name: str) -> None:
        descriptor = self._files.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
