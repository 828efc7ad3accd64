"""The seeded order of rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.order import permuted_row


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_every_epoch_takes_every_row_once(length: int, seed: int, epoch: int) -> None:
    draws = [permuted_row(epoch * length + place, length, seed) for place in range(length)]
    assert {drawn_epoch for drawn_epoch, _ in draws} == {epoch}
    assert sorted(row for _, row in draws) == list(range(length))


def order(epoch: int, length: int, seed: int) -> list[int]:
    return [permuted_row(epoch * length + place, length, seed)[1] for place in range(length)]


def test_epochs_and_seeds_differ_in_their_order() -> None:
    orders = [order(epoch, 100, seed) for epoch in range(4) for seed in range(4)]
    assert len(set(map(tuple, orders))) == 16
    assert order(0, 100, 0) != list(range(100))


def test_rows_are_spread_evenly_over_the_places() -> None:
    firsts = [order(epoch, 10, seed=3)[0] for epoch in range(2000)]
    assert min(firsts.count(row) for row in range(10)) > 140


def test_the_order_is_the_same_for_ever() -> None:
    assert order(0, 8, seed=0) == [4, 2, 5, 6, 7, 0, 1, 3]
    assert order(1, 8, seed=0) != order(0, 8, seed=0)


def test_a_large_data_set_costs_no_table() -> None:
    epoch, row = permuted_row(10**15 * 3 + 17, 10**15, seed=1)
    assert epoch == 3
    assert 0 <= row < 10**15


@pytest.mark.parametrize(("counter", "length"), [(-1, 5), (0, 0)])
def test_impossible_draws_are_refused(counter: int, length: int) -> None:
    with pytest.raises(ValueError, match="got"):
        permuted_row(counter, length, 0)


def test_the_order_imports_without_torch_and_numpy() -> None:
    probe = "import sys; sys.modules['numpy'] = sys.modules['torch'] = None; import shared.data.order"
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=60)
