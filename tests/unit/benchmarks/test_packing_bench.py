"""Packed and padded micro-batches compute the same thing, and padding is counted as it was."""

from __future__ import annotations

import pytest

from benchmarks.packing import Packed, Padded, expect_equal, make_model, make_rows, ratios

ROWS = make_rows(6, median=9.0, sigma=0.9, longest=64, seed=3)


@pytest.mark.parametrize("limit", [1, 150, 1000])
def test_both_ways_have_one_loss_and_one_gradient(limit: int) -> None:
    packed, padded = Packed(make_model(64, 1, 64)), Padded(make_model(64, 1, 64))
    tokens = sum(row.length for row in ROWS)
    (loss, computed), (other, with_padding) = packed.gradients(ROWS, limit), padded.gradients(ROWS, limit)
    assert loss == pytest.approx(other, rel=1e-6)
    assert packed.norm() == pytest.approx(padded.norm(), rel=1e-5)
    assert computed == tokens
    assert with_padding == tokens if limit == 1 else with_padding > tokens


def test_padded_micro_batches_stay_within_the_limit_where_they_can() -> None:
    padded = Padded(make_model(64, 1, 64))
    longest = max(row.length for row in ROWS)
    assert padded.gradients(ROWS, 1000)[1] == longest * len(ROWS)


def test_ratios_are_of_rounds_one_by_one() -> None:
    assert ratios({"packed": [1.0, 2.0, 4.0], "padded": [2.0, 2.0, 12.0]}) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_two_ways_that_differ_are_an_error() -> None:
    expect_equal("loss", 1.0, 1.0 + 1e-7, 1e-6)
    with pytest.raises(AssertionError, match="loss: expected both ways"):
        expect_equal("loss", 1.0, 1.1, 1e-6)
