"""Arrays as raw frames: what travels behind a message, described by its `ArrayHeader`s.

Rollouts and policies pack and unpack; the controller forwards the frames without decoding them. Invariant: a frame
is row-major and little-endian, and holds exactly the bytes that its header announces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from shared.messages import ArrayHeader

Frame = bytes | memoryview

DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
"""Names of the element types that may travel."""


class ArrayError(ValueError):
    """Frames and headers do not fit each other, or an array's type may not travel."""


def pack(arrays: Mapping[str, np.ndarray]) -> tuple[list[ArrayHeader], list[Frame]]:
    """Headers and frames of `arrays`, in their order; contiguous little-endian arrays are not copied.

    The frames are views: the arrays must not change until the frames have been sent.
    """
    headers: list[ArrayHeader] = []
    frames: list[Frame] = []
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ArrayError(f"array {name!r}: expected one of the types {', '.join(DTYPES)}, got {array.dtype}")
        wire = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)
        headers.append(ArrayHeader(name=name, dtype=array.dtype.name, shape=list(array.shape)))
        # memoryview refuses to cast a view without elements
        frames.append(wire.data.cast("B") if wire.size else b"")
    return headers, frames


def unpack(headers: Sequence[ArrayHeader], frames: Sequence[Frame]) -> dict[str, np.ndarray]:
    """Read-only arrays that look into `frames` (no copy), keyed by name, in the order of `headers`."""
    if len(headers) != len(frames):
        raise ArrayError(f"expected one frame for each of {len(headers)} array headers, got {len(frames)} frames")
    arrays: dict[str, np.ndarray] = {}
    for header, frame in zip(headers, frames, strict=True):
        if header.name in arrays:
            raise ArrayError(f"array {header.name!r} is announced twice")
        arrays[header.name] = _view(header, frame)
    return arrays


def _view(header: ArrayHeader, frame: Frame) -> np.ndarray:
    if header.dtype not in DTYPES:
        raise ArrayError(f"array {header.name!r}: expected one of {', '.join(DTYPES)}, got type {header.dtype!r}")
    if any(size < 0 for size in header.shape):
        raise ArrayError(f"array {header.name!r}: shape {header.shape} has a negative size")
    dtype = np.dtype(header.dtype).newbyteorder("<")
    expected = prod(header.shape) * dtype.itemsize
    if memoryview(frame).nbytes != expected:
        raise ArrayError(
            f"array {header.name!r}: shape {header.shape} of {header.dtype} wants a frame of {expected} bytes, "
            f"got {memoryview(frame).nbytes}"
        )
    array = np.frombuffer(frame, dtype=dtype).reshape(header.shape)
    array.flags.writeable = False
    return array
