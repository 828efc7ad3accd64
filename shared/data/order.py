"""The order in which rows are asked: a seeded permutation of each epoch, computed from a counter alone.

The controller draws prompts with it and journals only the counter, so that a restart, a resumption and an audit see
the same rows. Pure Python: imports neither torch nor numpy.

A balanced Feistel network is a permutation of 2^(2h) numbers whatever its round function; walking the cycle until a
number falls below `length` makes it a permutation of the rows (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002).
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

ROUNDS = 8
MASK = (1 << 64) - 1


def permuted_row(counter: int, length: int, seed: int) -> tuple[int, int]:
    """(epoch, row) of the `counter`-th draw from `length` rows; each epoch takes every row once.

    >>> sorted(permuted_row(counter, 5, seed=1)[1] for counter in range(5))
    [0, 1, 2, 3, 4]
    """
    if counter < 0:
        raise ValueError(f"the counter of a draw starts at 0, got {counter}")
    if length < 1:
        raise ValueError(f"an order wants at least one row, got length {length}")
    epoch, place = divmod(counter, length)
    keys = _round_keys(seed, epoch)
    # both halves need at least one bit, and 2^(2 * half) numbers must cover the rows: at most 4 * length of them
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    row = _feistel(place, half, keys)
    while row >= length:
        row = _feistel(row, half, keys)
    return epoch, row


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """One 64-bit key a round, from blake2b of seed and epoch."""
    stream = blake2b(f"orrery order {seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def _feistel(number: int, half: int, keys: tuple[int, ...]) -> int:
    low_mask = (1 << half) - 1
    left, right = number >> half, number & low_mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low_mask)
    return left << half | right


def _mix(number: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31
