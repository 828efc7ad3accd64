"""The spool: payloads come back as they were reported, or not at all."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from services.controller.disk import FolderDisk
from services.controller.spool import Spool
from shared.records import SpoolDamaged, read_spooled
from tests.unit.controller.disks import MemoryDisk

FRAMES = [b"prompt", b"", bytes(range(256)), memoryview(b"versions")]


def raw(frames: object) -> list[bytes]:
    return [bytes(frame) for frame in frames]  # type: ignore[attr-defined]


def test_frames_come_back_as_they_were() -> None:
    disk = MemoryDisk()
    spool = Spool(disk, 1 << 20)
    first, second = spool.append(FRAMES), spool.append([b"other"])
    spool.sync()
    assert raw(spool.read(first)) == raw(FRAMES)
    again = Spool(disk.after_crash(), 1 << 20)
    assert raw(again.read(first)) == raw(FRAMES)
    assert raw(again.read(second)) == [b"other"]


def test_what_was_not_synced_is_gone_after_a_crash() -> None:
    disk = MemoryDisk()
    spool = Spool(disk, 1 << 20)
    kept = spool.append([b"kept"])
    spool.sync()
    lost = spool.append([b"lost"])
    again = Spool(disk.after_crash(), 1 << 20)
    assert raw(again.read(kept)) == [b"kept"]
    with pytest.raises(SpoolDamaged):
        again.read(lost)


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    disk = MemoryDisk()
    spool = Spool(disk, 1 << 20)
    place = spool.append([b"some tokens", b"some more"])
    spool.sync()
    [name] = disk.names()
    for at in range(sum(place.sizes)):
        damaged = disk.copy()
        damaged.files[name][at] ^= 0x20
        with pytest.raises(SpoolDamaged, match=rf"{name} at byte 0.*length or hash differ"):
            Spool(damaged, 1 << 20).read(place)


def test_a_restart_begins_a_new_segment_and_never_touches_an_old_tail() -> None:
    disk = MemoryDisk()
    spool = Spool(disk, 1 << 20)
    first = spool.append([b"before"])
    spool.sync()
    second = Spool(disk, 1 << 20).append([b"after"])
    assert (first.segment, second.segment) == (1, 2)


def test_a_full_segment_is_rolled_and_a_payload_is_never_split() -> None:
    spool = Spool(MemoryDisk(), 100)
    places = [spool.append([b"x" * 40]) for _ in range(5)]
    assert [(place.segment, place.offset) for place in places] == [(1, 0), (1, 40), (2, 0), (2, 40), (3, 0)]
    huge = spool.append([b"y" * 1000])
    assert (huge.segment, huge.offset) == (4, 0)


def test_segments_that_nobody_needs_are_deleted_but_never_the_one_in_use() -> None:
    disk = MemoryDisk()
    spool = Spool(disk, 10)
    places = [spool.append([b"0123456789"]) for _ in range(4)]
    spool.sync()
    spool.free_below(3)
    spool.sync()
    assert disk.names() == ["00000003.seg", "00000004.seg"]
    assert raw(spool.read(places[2])) == [b"0123456789"]
    spool.free_below(99)
    spool.sync()
    assert disk.names() == ["00000004.seg"]


def test_what_may_go_is_deleted_by_the_next_sync_since_that_takes_a_while() -> None:
    disk = MemoryDisk()
    spool = Spool(disk, 10)
    for _ in range(3):
        spool.append([b"0123456789"])
    spool.sync()
    spool.free_below(3)
    assert len(disk.names()) == 3
    spool.sync()
    assert disk.names() == ["00000003.seg"]


def test_what_was_written_ahead_counts_only_when_it_is_synced() -> None:
    disk = MemoryDisk()
    spool = Spool(disk, 100)
    spool.append([b"before"])
    spool.sync()
    place = spool.append([b"0123456789"])
    assert spool.unwritten
    spool.write()
    assert not spool.unwritten
    with pytest.raises(SpoolDamaged):
        Spool(disk.after_crash(), 100).read(place)
    spool.sync()
    assert raw(Spool(disk.after_crash(), 100).read(place)) == [b"0123456789"]


def test_payload_is_forwarded_from_memory_once_and_read_back_after_that() -> None:
    disk = MemoryDisk()
    spool = Spool(disk, 100)
    place = spool.append([b"0123456789"])
    assert raw(spool.read(place)) == [b"0123456789"], "nothing is on the disk yet"
    spool.sync()
    assert raw(spool.read(place)) == [b"0123456789"]


def test_one_sync_covers_every_segment_that_was_written() -> None:
    disk = MemoryDisk()
    spool = Spool(disk, 10)
    for _ in range(3):
        spool.append([b"0123456789"])
    spool.sync()
    assert [entry for entry in disk.log if entry[0] == "sync"] == [("sync", f"0000000{n}.seg") for n in (1, 2, 3)]
    disk.log.clear()
    spool.sync()
    assert disk.log == []


def test_anyone_reads_a_payload_from_the_folder(tmp_path: Path) -> None:
    spool = Spool(FolderDisk(tmp_path / "spool"), 1 << 20)
    spool.append([b"other"])
    place = spool.append(FRAMES)
    spool.sync()
    plain = msgspec.to_builtins(place)
    assert read_spooled(tmp_path, plain) == raw(FRAMES)
    with pytest.raises(SpoolDamaged):
        read_spooled(tmp_path, {**plain, "hash": 1})
    with pytest.raises(SpoolDamaged, match="settled payloads are deleted"):
        read_spooled(tmp_path, {**plain, "segment": 9})
