"""The journal: what was synced comes back whole, and what cannot be trusted is refused by name."""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec
import pytest

from services.controller.core.core import Core
from services.controller.core.events import CORE_VERSION, RunBegan, StopRequested, TermBegan
from services.controller.core.outcome import Issued
from services.controller.disk import FolderDisk
from services.controller.journal import SNAPSHOTS_KEPT, Journal, Record
from shared.records import HEADER, MAGIC, JournalDamaged, frame, read_journal, scan
from tests.unit.controller.disks import MemoryDisk
from tests.unit.controller.world import small_world

BIG = 1 << 20
FIRST = "00000001.log"


def write(journal: Journal, count: int, *, sync: bool = True) -> None:
    """Some records, each a little longer than the one before."""
    for _ in range(count):
        number = journal.number + 1
        journal.append(1, StopRequested(at=float(number), cause="x" * number), [Issued(1, number, "train", False)])
        if sync:
            journal.sync()


def causes(disk: MemoryDisk | FolderDisk, segment_bytes: int = BIG) -> list[str]:
    return [record.event.cause for record in Journal(disk, segment_bytes).replay()]  # type: ignore[union-attr]


def snapshots(disk: MemoryDisk) -> list[str]:
    return [name for name in disk.names() if name.endswith(".snapshot")]


def written(count: int) -> tuple[bytes, int]:
    """A segment of so many records, and where the last of them begins."""
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    write(journal, count - 1)
    start = len(disk.files[FIRST])
    write(journal, 1)
    return bytes(disk.files[FIRST]), start


def test_what_was_appended_and_synced_is_replayed_in_order() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    events = [RunBegan(at=1.0, run="r", recipe="t"), TermBegan(at=2.0, term=1), StopRequested(at=3.0, cause="c")]
    for event in events:
        journal.append(7, event, [Issued(1, 5, "eval", True)])
    journal.sync()
    records = list(Journal(disk.after_crash(), BIG).replay())
    assert [record.event for record in records] == events
    assert all(record == Record(CORE_VERSION, 7, record.event, [Issued(1, 5, "eval", True)]) for record in records)


def test_an_empty_journal_has_no_number_and_writes_nothing_by_itself() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    journal.sync()
    assert (journal.number, journal.pending, disk.names(), list(journal.replay())) == (0, 0, [], [])


def test_what_was_not_synced_does_not_survive_a_crash() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    write(journal, 3)
    write(journal, 2, sync=False)
    assert journal.pending == 2
    again = Journal(disk.after_crash(), BIG)
    assert (again.number, len(list(again.replay()))) == (3, 3)


def test_a_group_of_records_is_one_write_and_one_sync() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    write(journal, 100, sync=False)
    journal.sync()
    assert disk.log == [("append", FIRST), ("sync", FIRST)]
    journal.sync()
    assert len(disk.log) == 2, "nothing new, nothing to do"


def test_what_is_appended_after_the_seal_waits_for_the_next_write() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    write(journal, 2, sync=False)
    journal.seal()
    write(journal, 3, sync=False)
    journal.flush()
    assert (journal.durable, journal.number, journal.pending) == (2, 5, 3)
    assert Journal(disk.after_crash(), BIG).number == 2
    with pytest.raises(ValueError, match="sync the journal"):
        journal.save_snapshot(b"")
    journal.sync()
    assert (journal.durable, journal.pending) == (5, 0)
    assert causes(disk) == ["x" * n for n in range(1, 6)]


def test_numbers_go_on_after_a_restart() -> None:
    disk = MemoryDisk()
    write(Journal(disk, BIG), 3)
    write(Journal(disk, BIG), 2)
    assert causes(disk) == ["x" * n for n in range(1, 6)]
    assert disk.names() == [FIRST]


def test_a_tail_torn_at_any_byte_is_cut_at_the_last_whole_record_and_writing_goes_on() -> None:
    whole, start = written(4)
    for length in range(start, len(whole)):
        disk = MemoryDisk({FIRST: whole[:length]})
        journal = Journal(disk, BIG)
        assert (journal.number, journal.cut) == (3, length - start)
        assert bytes(disk.files[FIRST]) == whole[:start]
        write(journal, 1)
        assert bytes(disk.files[FIRST]) == whole
        assert causes(disk) == ["x" * n for n in range(1, 5)]


def test_a_first_segment_torn_inside_its_magic_is_begun_anew() -> None:
    whole, _ = written(2)
    for length in range(len(MAGIC)):
        disk = MemoryDisk({FIRST: whole[:length]})
        journal = Journal(disk, BIG)
        assert (journal.number, disk.names()) == (0, [])
        write(journal, 2)
        assert bytes(disk.files[FIRST]) == whole


@pytest.mark.parametrize("mask", [0x01, 0x10, 0x80, 0xFF])
def test_any_flipped_byte_of_the_last_record_costs_that_record_alone_and_writing_goes_on(mask: int) -> None:
    whole, start = written(4)
    for at in range(start, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= mask
        disk = MemoryDisk({FIRST: bytes(damaged)})
        journal = Journal(disk, BIG)
        assert (journal.number, journal.cut) == (3, len(whole) - start), f"byte {at}"
        assert bytes(disk.files[FIRST]) == whole[:start]
        write(journal, 1)
        assert bytes(disk.files[FIRST]) == whole


def test_a_last_record_alone_in_its_segment_is_cut_like_any_other() -> None:
    disk = MemoryDisk()
    write(Journal(disk, 1), 3)
    last = disk.names()[-1]
    whole, start = bytes(disk.files[last]), len(MAGIC)
    broken = [whole[:length] for length in range(start, len(whole))]
    broken += [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(start, len(whole))]
    for data in broken:
        torn = disk.copy()
        torn.files[last][:] = data
        journal = Journal(torn, 1)
        assert (journal.number, journal.cut) == (2, len(data) - start)
        write(journal, 1)
        assert causes(torn, 1) == ["x", "xx", "xxx"]


def test_a_last_segment_whose_magic_is_flipped_is_refused() -> None:
    disk = MemoryDisk()
    write(Journal(disk, 1), 3)
    last = disk.names()[-1]
    for at in range(len(MAGIC)):
        damaged = disk.copy()
        damaged.files[last][at] ^= 0xFF
        with pytest.raises(JournalDamaged, match=f"{last}: expected a journal segment"):
            Journal(damaged, 1)


def test_a_damaged_last_record_leaves_the_snapshot_before_it_and_voids_the_one_after_it() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    write(journal, 3)
    journal.save_snapshot(b"three")
    start = len(disk.files[FIRST])
    write(journal, 1)
    journal.save_snapshot(b"four")
    whole = bytes(disk.files[FIRST])
    for at in range(start, len(whole)):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            damaged = disk.copy()
            damaged.files[FIRST][:] = data
            again = Journal(damaged, BIG)
            assert (again.number, again.snapshot(), list(again.replay())) == (3, b"three", [])


def test_any_flipped_byte_before_the_last_record_is_refused() -> None:
    whole, start = written(5)
    for at in range(start):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        with pytest.raises(JournalDamaged, match=FIRST):
            Journal(MemoryDisk({FIRST: bytes(damaged)}), BIG)


@pytest.mark.parametrize("lost", [1, 2, 4, 20])
def test_damage_over_several_records_in_the_middle_is_refused(lost: int) -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    write(journal, 3)
    start = len(disk.files[FIRST])
    write(journal, lost)
    end = len(disk.files[FIRST])
    write(journal, 2)
    disk.files[FIRST][start:end] = bytes(end - start)
    with pytest.raises(JournalDamaged, match="record 4 at byte"):
        Journal(disk, BIG)


def test_a_missing_record_in_the_middle_is_refused() -> None:
    payload = msgspec.msgpack.encode(Record(CORE_VERSION, 1, StopRequested(at=1.0, cause=""), []))
    data = MAGIC + b"".join(frame(number, payload) for number in (1, 2, 4, 5))
    with pytest.raises(JournalDamaged, match="record 3"):
        scan(data, "a segment", 1)


def test_a_length_field_beyond_the_file_reads_nothing_beyond_it() -> None:
    whole, start = written(3)
    header = HEADER.pack(0xFFFFFFFF, 0, 3)
    found = scan(whole[:start] + header + b"abc", "a segment", 1)
    assert (len(found.records), found.length, found.torn) == (2, start, HEADER.size + 3)


def test_another_files_bytes_are_refused_saying_what_was_expected() -> None:
    with pytest.raises(JournalDamaged, match=r"expected a journal segment \(b'ORRERYJ1'\), got b'PK"):
        Journal(MemoryDisk({FIRST: b"PK\x03\x04 and more of it"}), BIG)


# --- segments --------------------------------------------------------------------------------------------------------


def test_a_full_segment_is_followed_by_a_new_one_and_all_are_replayed() -> None:
    disk = MemoryDisk()
    write(Journal(disk, 200), 20)
    assert len(disk.names()) > 3
    assert causes(disk, 200) == ["x" * n for n in range(1, 21)]
    write(Journal(disk, 200), 5)
    assert causes(disk, 200) == ["x" * n for n in range(1, 26)]


def test_a_new_segment_torn_before_its_first_record_is_written_again() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, 200)
    write(journal, 20)
    last = disk.names()[-1]
    for length in range(len(MAGIC) + 5):
        torn = disk.copy()
        del torn.files[last][length:]
        again = Journal(torn, 200)
        assert 0 < again.number < 20
        write(again, 20 - again.number)
        assert causes(torn, 200) == ["x" * n for n in range(1, 21)]
        assert torn.names() == disk.names()


def test_a_segment_torn_while_a_later_one_exists_is_refused() -> None:
    disk = MemoryDisk()
    write(Journal(disk, 200), 20)
    first = disk.names()[0]
    del disk.files[first][-1:]
    with pytest.raises(JournalDamaged, match=f"{first}.*but a later segment follows"):
        Journal(disk, 200)


def test_a_missing_segment_is_refused() -> None:
    disk = MemoryDisk()
    write(Journal(disk, 200), 20)
    disk.delete(disk.names()[1])
    with pytest.raises(JournalDamaged):
        Journal(disk, 200)


# --- snapshots -------------------------------------------------------------------------------------------------------


def test_only_what_follows_the_newest_snapshot_is_replayed() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, 200)
    write(journal, 5)
    journal.save_snapshot(b"five")
    write(journal, 3)
    assert journal.since_snapshot() == 3
    again = Journal(disk.after_crash(), 200)
    assert (again.snapshot(), again.since_snapshot(), again.number) == (b"five", 3, 8)
    assert [len(record.event.cause) for record in again.replay()] == [6, 7, 8]  # type: ignore[union-attr]


def test_a_snapshot_wants_a_durable_journal() -> None:
    journal = Journal(MemoryDisk(), BIG)
    write(journal, 1, sync=False)
    with pytest.raises(ValueError, match="sync the journal"):
        journal.save_snapshot(b"")


def test_a_damaged_snapshot_is_passed_over_for_the_one_before() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    write(journal, 2)
    journal.save_snapshot(b"two" * 20)
    write(journal, 2)
    journal.save_snapshot(b"four" * 20)
    newest = snapshots(disk)[-1]
    body = bytes(disk.files[newest])
    for at in range(len(body)):
        broken = bytearray(body)
        broken[at] ^= 0x03
        again = Journal(MemoryDisk({**{n: bytes(d) for n, d in disk.files.items()}, newest: bytes(broken)}), BIG)
        assert (again.snapshot(), again.since_snapshot()) in ((b"two" * 20, 2), (b"four" * 20, 0)), f"byte {at}"
    for length in range(0, len(body), 5):
        torn = MemoryDisk({**{n: bytes(d) for n, d in disk.files.items()}, newest: body[:length]})
        assert Journal(torn, BIG).snapshot() == b"two" * 20


def test_a_snapshot_of_another_core_version_is_ignored() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    write(journal, 2)
    journal.save_snapshot(b"old")
    [name] = snapshots(disk)
    body = msgspec.msgpack.decode(bytes(disk.files[name]))
    body["core"] = CORE_VERSION + 1
    disk.replace(name, msgspec.msgpack.encode(body))
    again = Journal(disk, BIG)
    assert again.snapshot() is None
    assert len(list(again.replay())) == 2


def test_a_snapshot_that_is_ahead_of_the_journal_is_ignored() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    write(journal, 4)
    journal.save_snapshot(b"four")
    del disk.files[FIRST][-3:]
    again = Journal(disk, BIG)
    assert (again.number, again.snapshot()) == (3, None)


def test_old_snapshots_are_deleted() -> None:
    disk = MemoryDisk()
    journal = Journal(disk, BIG)
    for _ in range(6):
        write(journal, 1)
        journal.save_snapshot(b"s")
    assert len(snapshots(disk)) == SNAPSHOTS_KEPT


def test_records_of_another_core_version_are_refused_with_advice() -> None:
    payload = msgspec.msgpack.encode(Record(CORE_VERSION + 1, 1, StopRequested(at=1.0, cause=""), []))
    disk = MemoryDisk({FIRST: MAGIC + frame(1, payload)})
    with pytest.raises(JournalDamaged, match=rf"record 1 was decided by core version {CORE_VERSION + 1}"):
        list(Journal(disk, BIG).replay())


def test_a_whole_record_that_makes_no_sense_is_refused_by_number() -> None:
    disk = MemoryDisk({FIRST: MAGIC + frame(1, msgspec.msgpack.encode({"what": "is this"}))})
    with pytest.raises(JournalDamaged, match="record 1 is whole but not one that this version reads"):
        list(Journal(disk, BIG).replay())


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", range(0, 260, 13))
def test_a_full_disk_is_an_error_and_loses_nothing_that_was_synced(room: int) -> None:
    disk = MemoryDisk()
    journal = Journal(disk, 150)
    write(journal, 3)
    disk.room = room
    before = journal.number
    try:
        for _ in range(20):
            write(journal, 1)
            before = journal.number
    except OSError as error:
        assert error.errno == errno.ENOSPC
    else:
        raise AssertionError("the disk never ran full")
    for left in (disk.after_crash(), disk.copy()):
        again = Journal(left, 150)
        assert again.number >= before
        assert causes(left, 150) == ["x" * n for n in range(1, again.number + 1)]
        write(again, 2)
        assert len(causes(left, 150)) == again.number


# --- reading without the schema --------------------------------------------------------------------------------------


def test_a_real_folder_serves_the_same_and_is_read_without_the_controllers_code(tmp_path: Path) -> None:
    world = small_world(sft={"dataset": "train", "batches": 1, "batch_size": 4, "lr": 1e-3})
    world.deliver()
    disk = FolderDisk(tmp_path / "journal")
    journal = Journal(disk, 2000)
    for record in world.records:
        journal.append(*record)
        journal.sync()
    disk.close()
    typed = list(Journal(FolderDisk(tmp_path / "journal"), 2000).replay())
    plain = list(read_journal(tmp_path))
    assert [number for number, _ in plain] == list(range(1, len(typed) + 1))
    assert [record for _, record in plain] == [msgspec.msgpack.decode(msgspec.msgpack.encode(r)) for r in typed]
    assert [(record.term, record.event, record.facts) for record in typed] == world.records


def test_a_replayed_core_ends_where_the_live_one_did(tmp_path: Path) -> None:
    world = small_world()
    world.deliver(limit=25)
    disk = FolderDisk(tmp_path / "journal")
    journal = Journal(disk, BIG)
    for record in world.records[:10]:
        journal.append(*record)
    journal.sync()
    core = Core(world.recipe)
    for _, event, _ in world.records[:10]:
        core.step(event)
    journal.save_snapshot(core.snapshot())
    for record in world.records[10:]:
        journal.append(*record)
    journal.sync()

    again = Journal(FolderDisk(tmp_path / "journal"), BIG)
    snapshot = again.snapshot()
    assert snapshot is not None
    core = Core.restore(world.recipe, snapshot)
    for record in again.replay():
        assert core.step(record.event).facts == record.facts
    assert core.snapshot() == world.core.snapshot()


def test_a_torn_tail_is_left_out_by_readers_too(tmp_path: Path) -> None:
    whole, start = written(3)
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / FIRST).write_bytes(whole[: start + 9])
    assert [number for number, _ in read_journal(tmp_path)] == [1, 2]


def test_what_a_dead_process_left_unsynced_is_synced_before_it_counts() -> None:
    disk = MemoryDisk()
    write(Journal(disk, BIG), 2)
    disk.log.clear()
    Journal(disk, BIG)
    assert ("sync", "00000001.log") in disk.log
