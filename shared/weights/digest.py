"""Digests of whole models that add up over slices.

Source and receivers of a sync compare them, and so do checkpoints. No rank need hold a whole tensor: each element's
contribution depends on its tensor's name, dtype and shape, and on its position in the whole tensor alone, and the
digest is the sum of all contributions modulo 2^64, in any order.

An element is cut into 16-bit units (8-bit for one-byte types), and the tensor into blocks of BLOCK units. Unit u at
place i of block b adds (u + OFFSET) * C[i] * K[b] mod 2^64, where C is a fixed table of odd pseudo-random numbers, the
same for all blocks, and K[b] an odd hash of name, dtype, shape and b: the multilinear hash family of Lemire and Kaser,
"Strongly universal string hashing is fast" (2014), with the block's key factored out so that the work per unit is one
multiplication. Narrow units matter: a coefficient times a difference of 2^k keeps only 64 - k of its bits, so a flipped
sign bit in a 64-bit unit would leave one. This guards against errors, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b, shake_128

import torch
from torch import Tensor

from shared.weights.slices import Box, runs

BLOCK = 1 << 16
OFFSET = 0x9E3779B97F4A7C15
"""Added to each unit, so that zeros count too."""
MODULUS = 1 << 64


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The digest of whole tensors by name: 16 hexadecimal digits."""
    return hexadecimal(sum(slice_sum(name, tensor, tensor.shape, 0) for name, tensor in tensors.items()))


def hexadecimal(total: int) -> str:
    """The digest that a total of `slice_sum`s stands for."""
    return f"{total % MODULUS:016x}"


def slice_sum(name: str, part: Tensor, shape: Sequence[int], start: int) -> int:
    """What the elements `start` .. `start + part.numel()` of the flattened tensor `name` add to the digest.

    `part` holds those elements, contiguous; `shape` is the whole tensor's.
    """
    units = part.detach().contiguous().reshape(-1).view(torch.int8 if part.element_size() == 1 else torch.int16)
    place = start * max(1, part.element_size() // 2)
    seed = f"{name} {part.dtype} {list(shape)}".encode()
    coefficients, prefix = _table(part.device)
    scratch = torch.empty(min(BLOCK, units.numel()), dtype=torch.int64, device=part.device)
    total = done = 0
    while done < units.numel():
        block, first = divmod(place + done, BLOCK)
        count = min(BLOCK - first, units.numel() - done)
        products = scratch[:count].copy_(units[done : done + count]).mul_(coefficients[first : first + count])
        offsets = OFFSET * (prefix[first + count] - prefix[first])
        total += (int(products.sum()) + offsets) * _block_key(seed, block)
        done += count
    return total % MODULUS


@lru_cache(maxsize=8)
def _table(device: torch.device) -> tuple[Tensor, list[int]]:
    """The coefficients C as int64[BLOCK], and the sums of their first n for n = 0 .. BLOCK."""
    noise = bytearray(shake_128(b"orrery weights digest").digest(8 * BLOCK))
    coefficients = torch.frombuffer(noise, dtype=torch.int64) | 1
    prefix = [0, *torch.cumsum(coefficients, 0).tolist()]
    return coefficients.to(device), prefix


def box_sum(name: str, part: Tensor, shape: Sequence[int], box: Box) -> int:
    """What a box of the tensor `name` adds to the digest; `part` holds just the box, `shape` is the whole tensor's.

    Short runs are added up many at a time, by the same formula: a call of `slice_sum` for each would take longer than
    the sums.
    """
    places = list(runs(box, shape))
    length = places[0][1] - places[0][0] if places else 0
    rows = part.detach().contiguous().reshape(-1).view(torch.int8 if part.element_size() == 1 else torch.int16)
    per_element = max(1, part.element_size() // 2)
    width = length * per_element
    if len(places) == 1 or width > BLOCK:
        parts = zip(part.contiguous().reshape(len(places), -1), places, strict=True)
        return sum(slice_sum(name, run, shape, start) for run, (start, _) in parts) % MODULUS
    seed = f"{name} {part.dtype} {list(shape)}".encode()
    coefficients, prefix = _table(part.device)
    windows = torch.cat([coefficients, coefficients]).unfold(0, width, 1)  # coefficients of a run, by its place
    many = max(1, BLOCK * 8 // width)
    total = 0
    for first in range(0, len(places), many):
        starts = [divmod(start * per_element, BLOCK) for start, _ in places[first : first + many]]
        units = rows[first * width : (first + len(starts)) * width].view(len(starts), width).to(torch.int64)
        products = units.mul_(windows[torch.tensor([place for _, place in starts], device=part.device)])
        sums = products.sum(1).tolist()
        for row, (block, place) in enumerate(starts):
            here = min(width, BLOCK - place)
            ahead = int(products[row, here:].sum()) if here < width else 0  # of the run's units in the next block
            own = sums[row] - ahead + OFFSET * (prefix[place + here] - prefix[place])
            total += own * _block_key(seed, block)
            if here < width:
                total += (ahead + OFFSET * prefix[width - here]) * _block_key(seed, block + 1)
    return total % MODULUS


def _block_key(seed: bytes, block: int) -> int:
    return int.from_bytes(blake2b(seed, digest_size=8, salt=block.to_bytes(16, "little")).digest(), "little") | 1
