"""The spool: payload frames of reported groups, undecoded, until a checkpoint settles them.

A report is acknowledged only when its frames are synced here and its record is synced in the journal. Segments whose
groups are all settled or discarded are deleted. The newest payloads are forwarded from memory: the frames as they came,
not copied, read back or hashed again.
"""

from __future__ import annotations

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
        self._unwritten: list[tuple[str, Sequence[bytes | memoryview]]] = []
        self._sealed: list[tuple[str, Sequence[bytes | memoryview]]] = []
        self._recent: dict[tuple[int, int], Sequence[bytes | memoryview]] = {}
        self._recent_bytes = 0

    def append(self, frames: Sequence[bytes | memoryview]) -> Spooled:
        """Take the frames, which must not change any more; they are written by the next `sync`, and count from then."""
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

    def seal(self) -> None:
        """What was appended so far is what the next `flush` makes durable."""
        self._sealed += self._unwritten
        self._unwritten = []

    def sync(self) -> None:
        """Make everything appended durable."""
        self.seal()
        self.flush()

    def flush(self) -> None:
        """Make everything sealed durable. May run in another thread while others are appended."""
        parts: dict[str, list[bytes | memoryview]] = {}
        for name, frames in self._sealed:
            parts.setdefault(name, []).extend(frames)
        for name in parts:
            self._disk.append(name, *parts[name])  # in one go: each call would have to wait for the other thread
            self._disk.sync(name)
        self._sealed = []

    def read(self, place: Spooled) -> Sequence[bytes | memoryview]:
        """The frames at a place; those from disk are checked. SpoolDamaged if they are not the ones reported."""
        recent = self._recent.get((place.segment, place.offset))
        if recent is not None:
            return recent
        name = self._name(place.segment)
        data = self._disk.read(name, place.offset, sum(place.sizes))
        return split_frames(data, place.sizes, place.hash, f"{name} at byte {place.offset}")

    def free_below(self, segment: int) -> None:
        """Delete segments below `segment` (all but the one in use when it is negative)."""
        least = self._segment if segment < 0 else min(segment, self._segment)
        for place in [place for place in self._recent if place[0] < least]:
            self._forget(place)
        for name in self._disk.names():
            if name.endswith(".seg") and int(name.removesuffix(".seg")) < least:
                self._disk.delete(name)

    def _remember(self, place: Spooled, frames: Sequence[bytes | memoryview]) -> None:
        self._recent[place.segment, place.offset] = frames
        self._recent_bytes += sum(place.sizes)
        while self._recent_bytes > RECENT_BYTES:
            self._forget(next(iter(self._recent)))

    def _forget(self, place: tuple[int, int]) -> None:
        self._recent_bytes -= sum(memoryview(frame).nbytes for frame in self._recent.pop(place))

    @staticmethod
    def _name(segment: int) -> str:
        return f"{segment:08d}.seg"
