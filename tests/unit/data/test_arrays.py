"""Arrays as raw frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared.arrays import DTYPES, ArrayError, pack, unpack
from shared.messages import ArrayHeader

any_array = st.sampled_from(DTYPES).flatmap(
    lambda name: arrays.arrays(np.dtype(name), arrays.array_shapes(min_dims=0, min_side=0, max_dims=3))
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.text(max_size=5), any_array, max_size=4))
def test_what_was_packed_comes_back(given_arrays: dict[str, np.ndarray]) -> None:
    headers, frames = pack(given_arrays)
    received = unpack(headers, [bytes(frame) for frame in frames])
    assert list(received) == list(given_arrays)
    for name, array in given_arrays.items():
        assert received[name].dtype == array.dtype
        assert received[name].shape == array.shape
        assert received[name].tobytes() == array.tobytes()


def test_big_endian_and_strided_arrays_travel_little_endian_and_row_major() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    headers, frames = pack({"a": array})
    assert headers == [ArrayHeader(name="a", dtype="int32", shape=[3, 2])]
    assert bytes(frames[0]) == np.array([0, 3, 1, 4, 2, 5], dtype="<i4").tobytes()


def test_neither_way_copies_a_contiguous_array() -> None:
    array = np.arange(4, dtype=np.float32)
    headers, frames = pack({"a": array})
    received = unpack(headers, frames)["a"]
    assert np.shares_memory(received, array)
    assert not received.flags.writeable


def test_types_that_may_not_travel_are_refused() -> None:
    with pytest.raises(ArrayError, match="got object"):
        pack({"a": np.array([{}])})
    with pytest.raises(ArrayError, match="type 'object'"):
        unpack([ArrayHeader("a", "object", [1])], [b"x" * 8])


@pytest.mark.parametrize(
    ("headers", "frames", "text"),
    [
        ([ArrayHeader("a", "int32", [2])], [b"x" * 7], "wants a frame of 8 bytes, got 7"),
        ([ArrayHeader("a", "int32", [-1])], [b"x" * 4], "negative"),
        ([ArrayHeader("a", "int32", [1])], [], "got 0 frames"),
        ([ArrayHeader("a", "int8", [1])] * 2, [b"x", b"y"], "announced twice"),
        ([ArrayHeader("a", "int32", [2**40, 2**40])], [b"x" * 4], "wants a frame of"),
    ],
)
def test_frames_that_do_not_fit_their_headers_are_refused(
    headers: list[ArrayHeader], frames: list[bytes], text: str
) -> None:
    with pytest.raises(ArrayError, match=text):
        unpack(headers, frames)
