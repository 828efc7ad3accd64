"""The spool: payload frames of reported groups, undecoded, until a checkpoint settles them.

A report is acknowledged only when its frames are synced here and its record is synced in the journal. Segments whose
groups are all settled or discarded are deleted.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from services.controller.core.events import Spooled
from services.controller.disk import Disk
from shared.records import split_frames


class Spool:
    """Appends payloads to numbered segments. After a restart a new segment begins: an old tail may be torn."""

    def __init__(self, disk: Disk, segment_bytes: int) -> None:
        self._disk = disk
        self._segment_bytes = segment_bytes
        numbers = [int(name.removesuffix(".seg")) for name in disk.names() if name.endswith(".seg")]
        self._segment = max(numbers, default=0) + 1
        self._offset = 0
        self._dirty: set[str] = set()

    def append(self, frames: Sequence[bytes | memoryview]) -> Spooled:
        """Write the frames; they count from the next `sync` on."""
        data = b"".join(frames)
        if self._offset + len(data) > self._segment_bytes and self._offset:
            self._segment, self._offset = self._segment + 1, 0
        name = self._name(self._segment)
        self._disk.append(name, data)
        self._dirty.add(name)
        place = Spooled(self._segment, self._offset, [len(frame) for frame in frames], xxhash.xxh3_64_intdigest(data))
        self._offset += len(data)
        return place

    def sync(self) -> None:
        """Make everything appended durable."""
        for name in sorted(self._dirty):
            self._disk.sync(name)
        self._dirty.clear()

    def read(self, place: Spooled) -> list[bytes]:
        """The frames at a place, checked. SpoolDamaged if they are not the ones that were reported."""
        name = self._name(place.segment)
        data = self._disk.read(name, place.offset, sum(place.sizes))
        return split_frames(data, place.sizes, place.hash, f"{name} at byte {place.offset}")

    def free_below(self, segment: int) -> None:
        """Delete segments below `segment` (all but the one in use when it is negative)."""
        least = self._segment if segment < 0 else min(segment, self._segment)
        for name in self._disk.names():
            if name.endswith(".seg") and int(name.removesuffix(".seg")) < least:
                self._disk.delete(name)

    @staticmethod
    def _name(segment: int) -> str:
        return f"{segment:08d}.seg"
