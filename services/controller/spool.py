"""The spool: payload frames of reported groups, undecoded, until a checkpoint settles them.

A report is acknowledged only when its frames are synced here and its record is synced in the journal. Segments whose
groups are all settled or discarded are deleted. The newest payloads are forwarded from memory: the frames as they came,
not copied, read back or hashed again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import xxhash

from services.controller.core.events import Spooled
from services.controller.disk import Disk
from shared.records import split_frames

RECENT_BYTES = 256 << 20
"""Newest payload that stays in memory; what is older is read from disk."""


class Spool:
    """Appends payloads to numbered segments. After a restart a new segment begins: an old tail may be torn."""

    def __init__(self, disk: Disk, segment_bytes: int) -> None:
        self._disk = disk
        self._segment_bytes = segment_bytes
        numbers = [int(name.removesuffix(".seg")) for name in disk.names() if name.endswith(".seg")]
        self._segment = max(numbers, default=0) + 1
        self._offset = 0
        self._unwritten: deque[tuple[str, Sequence[bytes | memoryview]]] = deque()
        self._unsynced: dict[str, None] = {}
        self._writing = threading.Lock()
        self._recent: dict[tuple[int, int], Sequence[bytes | memoryview]] = {}
        self._recent_bytes = 0
        self._least = self._deleted = 0

    def append(self, frames: Sequence[bytes | memoryview]) -> Spooled:
        """Take the frames, which must not change any more; they count once the next `sync` has returned."""
        sizes = [memoryview(frame).nbytes for frame in frames]
        if self._offset + sum(sizes) > self._segment_bytes and self._offset:
            self._segment, self._offset = self._segment + 1, 0
        self._unwritten.append((self._name(self._segment), frames))
        hasher = xxhash.xxh3_64()
        for frame in frames:
            hasher.update(frame)
        place = Spooled(self._segment, self._offset, sizes, hasher.intdigest())
        self._offset += sum(sizes)
        self._remember(place, frames)
        return place

    @property
    def unwritten(self) -> bool:
        """Whether something was appended that `write` has not come to."""
        return bool(self._unwritten)

    def write(self) -> None:
        """Hand the operating system what was appended. In a thread of its own, this goes on while another one syncs."""
        with self._writing:
            parts: dict[str, list[bytes | memoryview]] = {}
            while self._unwritten:
                name, frames = self._unwritten.popleft()
                parts.setdefault(name, []).extend(frames)
            for name in parts:
                self._disk.append(name, *parts[name])  # in one go: each call has to wait for the interpreter's lock
                self._unsynced[name] = None

    def sync(self) -> None:
        """Make durable everything that was appended before the call, and delete what may go. May run in a thread."""
        self.write()
        with self._writing:
            names, self._unsynced = self._unsynced, {}
        for name in names:
            self._disk.sync(name)
        if self._deleted < self._least:
            self._deleted = self._least
            for name in self._disk.names():
                if name.endswith(".seg") and int(name.removesuffix(".seg")) < self._deleted:
                    self._disk.delete(name)

    def read(self, place: Spooled) -> Sequence[bytes | memoryview]:
        """The frames at a place; those from disk are checked. SpoolDamaged if they are not the ones reported.

        Whoever reads them forwards them, seldom twice: from then on they are on disk only.
        """
        recent = self._forget((place.segment, place.offset))
        if recent is not None:
            return recent
        name = self._name(place.segment)
        data = self._disk.read(name, place.offset, sum(place.sizes))
        return split_frames(data, place.sizes, place.hash, f"{name} at byte {place.offset}")

    def free_below(self, segment: int) -> None:
        """Segments below `segment` may go; the next `sync` deletes them, since that takes a while too."""
        self._least = min(segment, self._segment)
        for place in [place for place in self._recent if place[0] < self._least]:
            self._forget(place)

    def _remember(self, place: Spooled, frames: Sequence[bytes | memoryview]) -> None:
        self._recent[place.segment, place.offset] = frames
        self._recent_bytes += sum(place.sizes)
        while self._recent_bytes > RECENT_BYTES:
            self._forget(next(iter(self._recent)))

    def _forget(self, place: tuple[int, int]) -> Sequence[bytes | memoryview] | None:
        frames = self._recent.pop(place, None)
        if frames is not None:
            self._recent_bytes -= sum(memoryview(frame).nbytes for frame in frames)
        return frames

    @staticmethod
    def _name(segment: int) -> str:
        return f"{segment:08d}.seg"
