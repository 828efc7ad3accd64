"""Digests of models: additive over slices, sensitive to every bit, place and name."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.weights.digest import BLOCK, box_sum, digest_of, hexadecimal, slice_sum
from shared.weights.slices import Box

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn]


def noise(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    raw = random.Random(seed).randbytes(count * dtype.itemsize)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), count=st.integers(1, 3 * BLOCK // 2))
def test_any_partition_adds_up_to_the_whole(data: st.DataObject, dtype: torch.dtype, count: int) -> None:
    whole = noise(count, dtype)
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=6))})
    parts = [(start, end) for start, end in zip(cuts, cuts[1:], strict=False)]
    data.draw(st.randoms()).shuffle(parts)
    total = sum(slice_sum("w", whole[start:end], [count], start) for start, end in parts)
    assert hexadecimal(total) == digest_of({"w": whole})


def test_slices_of_several_tensors_add_up_in_any_order() -> None:
    tensors = {"a": noise(300, torch.float32).view(20, 15), "b": noise(70, torch.bfloat16, seed=1)}
    rows = sum(slice_sum("a", tensors["a"][row], [20, 15], 15 * row) for row in reversed(range(20)))
    halves = slice_sum("b", tensors["b"][35:], [70], 35) + slice_sum("b", tensors["b"][:35], [70], 0)
    assert hexadecimal(halves + rows) == digest_of(tensors) == digest_of(dict(reversed(tensors.items())))


@settings(deadline=None, max_examples=200)
@given(dtype=st.sampled_from(DTYPES), byte=st.integers(0, 399), bit=st.integers(0, 7))
def test_flipping_any_bit_changes_it(dtype: torch.dtype, byte: int, bit: int) -> None:
    whole = noise(400 // dtype.itemsize, dtype)
    changed = whole.clone()
    bits(changed)[byte] ^= 1 << bit
    assert digest_of({"w": changed}) != digest_of({"w": whole})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_flipping_the_signs_of_any_two_elements_changes_it(dtype: torch.dtype) -> None:
    whole = noise(24, dtype)
    original = digest_of({"w": whole})
    for i in range(24):
        for j in range(i):
            changed = whole.clone()
            for element in (i, j):
                bits(changed)[(element + 1) * dtype.itemsize - 1] ^= 0x80
            assert digest_of({"w": changed}) != original


@settings(deadline=None, max_examples=100)
@given(dtype=st.sampled_from(DTYPES), i=st.integers(0, 2 * BLOCK - 1), j=st.integers(0, 2 * BLOCK - 1))
def test_swapping_two_elements_changes_it(dtype: torch.dtype, i: int, j: int) -> None:
    whole = noise(2 * BLOCK, dtype)
    swapped = whole.clone()
    pair = bits(whole).view(2 * BLOCK, -1)
    bits(swapped).view(2 * BLOCK, -1)[[i, j]] = pair[[j, i]]
    same = torch.equal(pair[i], pair[j])
    assert (digest_of({"w": swapped}) == digest_of({"w": whole})) == same


def test_swapping_two_blocks_changes_it() -> None:
    whole = noise(2 * BLOCK, torch.bfloat16)
    swapped = torch.cat([whole[BLOCK:], whole[:BLOCK]])
    assert digest_of({"w": swapped}) != digest_of({"w": whole})


def test_names_shapes_and_types_count_even_for_zeros() -> None:
    one, other = noise(6, torch.float32), noise(6, torch.float32, seed=1)
    zeros = torch.zeros(6)
    digests = {
        digest_of({"a": one, "b": other}),
        digest_of({"a": other, "b": one}),
        digest_of({"a": one.view(2, 3), "b": other}),
        digest_of({"a": one.view(torch.int32), "b": other}),
        digest_of({"a": zeros}),
        digest_of({"b": zeros}),
        digest_of({"a": zeros[:5]}),
        digest_of({"a": zeros, "b": zeros}),
        digest_of({"a": zeros.view(3, 2)}),
    }
    assert len(digests) == 9


def test_negative_zero_and_the_payload_of_a_nan_count() -> None:
    values = [torch.tensor([0.0]), torch.tensor([-0.0]), torch.tensor([float("nan")])]
    values.append((values[2].view(torch.int32) + 1).view(torch.float32))
    assert len({digest_of({"a": value}) for value in values}) == 4


def test_strides_do_not_count() -> None:
    matrix = noise(12, torch.float32).view(3, 4)
    assert digest_of({"a": matrix.T}) == digest_of({"a": matrix.T.contiguous()})
    assert digest_of({"a": torch.empty(0)}) == hexadecimal(0)
    assert digest_of({"a": torch.tensor(1.5)}) != digest_of({"a": torch.tensor([1.5])})


def test_the_digest_is_the_same_for_ever() -> None:
    assert digest_of({"w": torch.arange(100_000, dtype=torch.int32)}) == "75e5bb51eaba2ae0"


@settings(deadline=None, max_examples=60)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rows=st.integers(1, 90), columns=st.integers(1, 4000))
def test_boxes_of_a_matrix_add_up_to_the_whole(
    data: st.DataObject, dtype: torch.dtype, rows: int, columns: int
) -> None:
    whole = noise(rows * columns, dtype).view(rows, columns)
    across, down = data.draw(st.integers(1, columns)), data.draw(st.integers(1, rows))
    total = 0
    for top, bottom in ((0, down), (down, rows)):
        for left, right in ((0, across), (across, columns)):
            if top < bottom and left < right:
                box = Box((top, left), (bottom, right))
                total += box_sum("w", whole[top:bottom, left:right], whole.shape, box)
    assert hexadecimal(total) == digest_of({"w": whole})
