"""What a rewards pool and its workers say to each other over pipes: length-prefixed msgpack frames.

A frame is a 4-byte big-endian length and a msgpack map. The pool sends one `Setup`, then `Task`s, one at a time; the
worker answers `Ready` (or `Unable`) once and each task with `Working`, once a part of the reward, and a `Verdict`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TypeVar

import msgspec

LENGTH = struct.Struct(">I")
MAX_FRAME = 8 * 1024 * 1024
"""A longer frame is garbage: completions and verdicts are texts of some kilobytes."""


class WireError(Exception):
    """Bytes that are no frame of this protocol."""


class Setup(msgspec.Struct, frozen=True, tag=True):
    """Pool -> worker, first: tables of the recipe as plain maps, and the worker's address space in MiB."""

    datasets: dict[str, dict[str, object]]
    parts: list[dict[str, object]]
    memory_mb: int


class Task(msgspec.Struct, frozen=True, tag=True):
    """Pool -> worker: judge `completion`, of `tokens` tokens, an answer to `row` of `dataset`.

    By the recipe's parts; a held-out one by the data set's verifier alone.
    """

    number: int
    dataset: str
    row: int
    completion: str
    tokens: int
    held_out: bool


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker -> pool: data sets and rewards are open. `address_space_mb` is what that took."""

    address_space_mb: int


class Unable(msgspec.Struct, frozen=True, tag=True):
    """Worker -> pool: it cannot start, and why; it exits. `recipe`: no other worker could, as the recipe stands."""

    cause: str
    recipe: bool


class Working(msgspec.Struct, frozen=True, tag=True):
    """Worker -> pool: task `number` is accepted, and now judged by this part of the reward."""

    number: int
    part: str


class Verdict(msgspec.Struct, frozen=True, tag=True):
    """Worker -> pool: the score of task `number`, or why there is none (`error` is empty when there is one).

    `leaving`: the worker exits now and takes no further task.
    """

    number: int
    total: float
    parts: dict[str, float]
    error: str
    leaving: bool = False


_Decoded = TypeVar("_Decoded")

ToWorker = Setup | Task
ToPool = Ready | Unable | Working | Verdict

_to_worker = msgspec.msgpack.Decoder(ToWorker)
_to_pool = msgspec.msgpack.Decoder(ToPool)
_encode = msgspec.msgpack.Encoder().encode


def frame(message: ToWorker | ToPool) -> bytes:
    """The message as a frame."""
    body = _encode(message)
    return LENGTH.pack(len(body)) + body


def decode_to_worker(body: bytes) -> ToWorker:
    """A frame's body that came from the pool. Raises `WireError`."""
    return _decoded(_to_worker, body)


def split_to_pool(buffer: bytearray) -> Iterator[ToPool]:
    """Take the whole frames that came from a worker off the front of `buffer`, one by one.

    Raises `WireError` on garbage, once what came before it was taken.
    """
    while len(buffer) >= LENGTH.size:
        (length,) = LENGTH.unpack_from(buffer)
        if length > MAX_FRAME:
            raise WireError(f"expected a frame of at most {MAX_FRAME} bytes, got one of {length}")
        if len(buffer) < LENGTH.size + length:
            break
        body = bytes(buffer[LENGTH.size : LENGTH.size + length])
        del buffer[: LENGTH.size + length]
        yield _decoded(_to_pool, body)


def _decoded(decoder: msgspec.msgpack.Decoder[_Decoded], body: bytes) -> _Decoded:
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise WireError(f"expected a message of the rewards pool, got {body[:40]!r}: {error}") from error
