"""The run's memory on disk: how journal records and spooled payloads are framed, and how anyone reads them.

The controller alone writes them; this module lets every tool read them without its code: records come back as plain
msgpack maps, so that a journal can be read by any msgpack reader in any version.

    journal/00000001.log    magic, then records: u32 length | u32 crc | u64 number | msgpack map (little-endian)
    spool/00000001.seg      payload bytes at the offsets that `reported` events tell

The crc (zlib.crc32) covers number and map. Numbers count from 1 without a gap over all segments.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import xxhash

MAGIC = b"ORRERYJ1"
HEADER = struct.Struct("<IIQ")
JOURNAL = "journal"
SPOOL = "spool"


class JournalDamaged(Exception):
    """A journal that cannot be trusted: not a torn tail, but a record that is wrong in the middle."""


class SpoolDamaged(Exception):
    """A spooled payload whose bytes are not the ones that were reported."""


@dataclass(frozen=True)
class Scan:
    """The whole records of a segment's bytes, and where they end; `torn` bytes after that are an unfinished append."""

    records: list[tuple[int, bytes]]
    length: int
    torn: int


def frame(number: int, payload: bytes) -> bytes:
    """One record as it lies in a segment."""
    crc = zlib.crc32(payload, zlib.crc32(number.to_bytes(8, "little")))
    return HEADER.pack(len(payload), crc, number) + payload


def scan(data: bytes, name: str, first: int) -> Scan:
    """The records of a segment that begins with record `first`. JournalDamaged if one is wrong that was once whole."""
    if len(data) < len(MAGIC):
        return Scan([], 0, len(data))
    if not data.startswith(MAGIC):
        raise JournalDamaged(
            f"{name}: expected a journal segment ({MAGIC!r}), got {data[:8]!r}; restore it from a copy"
        )
    records: list[tuple[int, bytes]] = []
    at, expected = len(MAGIC), first
    while at < len(data):
        record = _whole_record(data, at, expected)
        if record is None:
            if _any_record_after(data, at + 1, expected + 1):
                raise JournalDamaged(
                    f"{name}: record {expected} at byte {at} is damaged though later records are whole: "
                    "this is no torn tail; restore the file from a copy, its acknowledged work can't be guessed"
                )
            break
        records.append((expected, record))
        at += HEADER.size + len(record)
        expected += 1
    return Scan(records, at, len(data) - at)


def read_journal(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of every record of the run in `folder`, in order; a torn tail is left out.

    A record is a map: `core` (version), `term`, `event` (a map with `type`), `facts` (a list of such maps).
    """
    expected = 1
    paths = sorted((folder / JOURNAL).glob("*.log"))
    for path in paths:
        found = scan(path.read_bytes(), path.name, expected)
        if found.torn and path != paths[-1]:
            raise JournalDamaged(
                f"{path.name}: {found.torn} bytes at its end are no record, but a later segment follows"
            )
        for number, payload in found.records:
            yield number, msgpack.unpackb(payload, strict_map_key=False)
        expected += len(found.records)


def segment_path(folder: Path, segment: int) -> Path:
    """Where a spool segment of the run in `folder` lies."""
    return folder / SPOOL / f"{segment:08d}.seg"


def read_spooled(folder: Path, place: dict[str, Any]) -> list[bytes]:
    """The payload frames at a spooled place (a map with segment, offset, sizes, hash) of the run in `folder`."""
    path = segment_path(folder, place["segment"])
    try:
        with path.open("rb") as file:
            file.seek(place["offset"])
            data = file.read(sum(place["sizes"]))
    except FileNotFoundError:
        raise SpoolDamaged(f"{path.name} is gone: its groups are settled, and settled payloads are deleted") from None
    return split_frames(data, place["sizes"], place["hash"], f"{path.name} at byte {place['offset']}")


def split_frames(data: bytes, sizes: list[int], expected: int, where: str) -> list[bytes]:
    """Cut spooled bytes into their frames; SpoolDamaged if they are not the ones that were reported."""
    if len(data) != sum(sizes) or xxhash.xxh3_64_intdigest(data) != expected:
        raise SpoolDamaged(f"{where}: the payload is not the one that was reported (length or hash differ)")
    frames, at = [], 0
    for size in sizes:
        frames.append(data[at : at + size])
        at += size
    return frames


def _whole_record(data: bytes, at: int, number: int) -> bytes | None:
    if at + HEADER.size > len(data):
        return None
    length, crc, found = HEADER.unpack_from(data, at)
    payload = data[at + HEADER.size : at + HEADER.size + length]
    if found != number or len(payload) != length:
        return None
    return payload if zlib.crc32(payload, zlib.crc32(number.to_bytes(8, "little"))) == crc else None


def _any_record_after(data: bytes, start: int, number: int) -> bool:
    """Whether a later whole record follows a bad one; a torn tail has none."""
    numbers = range(number, number + (len(data) - start) // HEADER.size)
    at = start
    while at + HEADER.size <= len(data):
        found = int.from_bytes(data[at + 8 : at + 16], "little")
        if found in numbers and _whole_record(data, at, found) is not None:
            return True
        at += 1
    return False
