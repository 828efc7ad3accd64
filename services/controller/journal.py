"""The journal: every event with the facts that followed from it, in order, on disk before its consequences leave.

Appends gather in memory and become durable together (`sync`, the group commit). A snapshot bounds replay; the segments
stay, since the audit folds them all. A torn tail is cut at the last whole record; damage anywhere else is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import msgspec

from services.controller.core.events import CORE_VERSION, AnyEvent
from services.controller.core.outcome import AnyFact
from services.controller.disk import Disk
from shared.records import MAGIC, JournalDamaged, frame, scan

SNAPSHOTS_KEPT = 2


class Record(msgspec.Struct, frozen=True):
    """One event and its facts, as the core of version `core` decided them in `term`."""

    core: int
    term: int
    event: AnyEvent
    facts: list[AnyFact]


class _Snapshot(msgspec.Struct, frozen=True):
    core: int
    number: int
    crc: int
    state: bytes


class Journal:
    """Appends and replays records. `number` is the last one's (0: there is none), `durable` the last durable one's."""

    def __init__(self, disk: Disk, segment_bytes: int) -> None:
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Record)
        self._buffer: list[bytes] = []
        self._sealed: list[bytes] = []
        self._sealed_number = 0
        self.number = 0
        self.durable = 0
        self.cut = 0
        self._snapshot_number = 0
        self._snapshot: bytes | None = None
        self._segments = [name for name in disk.names() if name.endswith(".log")]
        self._size = 0
        self._recover()

    def snapshot(self) -> bytes | None:
        """The newest whole snapshot of this core version, if any."""
        return self._snapshot

    def replay(self) -> Iterator[Record]:
        """The records after the snapshot. JournalDamaged when another core version wrote them."""
        for number, payload in self._records():
            if number <= self._snapshot_number:
                continue
            record = self._decode(number, payload)
            if record.core != CORE_VERSION:
                raise JournalDamaged(
                    f"record {number} was decided by core version {record.core}, this is {CORE_VERSION}: end the run "
                    "once with the version that began it, so that its last snapshot covers everything, then resume"
                )
            yield record

    def append(self, term: int, event: AnyEvent, facts: list[AnyFact]) -> None:
        """Take a record; it counts from the next `sync` on."""
        self.number += 1
        self._buffer.append(frame(self.number, self._encoder.encode(Record(CORE_VERSION, term, event, facts))))

    @property
    def pending(self) -> int:
        """Records that are not durable yet."""
        return len(self._buffer) + len(self._sealed)

    def seal(self) -> None:
        """What was appended so far is what the next `flush` writes; others may be appended while it does."""
        self._sealed += self._buffer
        self._sealed_number = self.number
        self._buffer = []

    def sync(self) -> None:
        """Make everything appended durable."""
        self.seal()
        self.flush()

    def flush(self) -> None:
        """Make everything sealed durable: one write, one fsync. May run in another thread."""
        if not self._sealed:
            return
        if not self._segments or self._size >= self._segment_bytes:
            self._segments.append(f"{len(self._segments) + 1:08d}.log")
            self._sealed.insert(0, MAGIC)
            self._size = 0
        self._disk.append(self._segments[-1], *self._sealed)
        self._disk.sync(self._segments[-1])
        self._size += sum(map(len, self._sealed))
        self._sealed = []
        self.durable = self._sealed_number

    def since_snapshot(self) -> int:
        """Records that a restart would replay now."""
        return self.number - self._snapshot_number

    def save_snapshot(self, state: bytes) -> None:
        """Keep the state as of the last record, which must be durable already."""
        if self.pending:
            raise ValueError("sync the journal before taking a snapshot")
        body = msgspec.msgpack.encode(_Snapshot(CORE_VERSION, self.number, _crc(self.number, state), state))
        self._disk.replace(f"{self.number:012d}.snapshot", body)
        self._snapshot_number = self.number
        for name in self._snapshots()[:-SNAPSHOTS_KEPT]:
            self._disk.delete(name)

    def _recover(self) -> None:
        """Cut a torn tail, find the last number and the newest whole snapshot."""
        expected = 1
        for position, name in enumerate(self._segments):
            found = scan(self._disk.read(name), name, expected)
            last = position == len(self._segments) - 1
            if found.torn and not last:
                raise JournalDamaged(
                    f"{name}: {found.torn} bytes at its end are no record, but a later segment follows"
                )
            if last:
                if found.torn:
                    self._disk.truncate(name, found.length)
                    self.cut = found.torn
                else:  # records that a process before this one wrote and never synced count from now on
                    self._disk.sync(name)
                self._size = found.length
                if found.length == 0:  # torn inside its magic: as if it had never been begun
                    self._disk.delete(name)
                    self._segments.pop()
                    self._size = self._segment_bytes  # the one before was full
            expected += len(found.records)
        self.number = self.durable = expected - 1
        for name in reversed(self._snapshots()):
            snapshot = self._whole_snapshot(self._disk.read(name))
            if snapshot is not None and snapshot.number <= self.number:
                self._snapshot, self._snapshot_number = snapshot.state, snapshot.number
                return

    def _records(self) -> Iterator[tuple[int, bytes]]:
        expected = 1
        for name in self._segments:
            records = scan(self._disk.read(name), name, expected).records
            yield from records
            expected += len(records)

    def _decode(self, number: int, payload: bytes) -> Record:
        try:
            return self._decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise JournalDamaged(f"record {number} is whole but not one that this version reads: {error}") from None

    def _snapshots(self) -> list[str]:
        return [name for name in self._disk.names() if name.endswith(".snapshot")]

    @staticmethod
    def _whole_snapshot(body: bytes) -> _Snapshot | None:
        try:
            snapshot = msgspec.msgpack.decode(body, type=_Snapshot)
        except msgspec.MsgspecError:
            return None
        whole = _crc(snapshot.number, snapshot.state) == snapshot.crc and snapshot.core == CORE_VERSION
        return snapshot if whole else None


def _crc(number: int, state: bytes) -> int:
    return zlib.crc32(state, number)
