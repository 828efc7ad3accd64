"""Rows of no use are given up one by one; too many in a row end the run."""

from __future__ import annotations

import pytest

from shared.data.dataset import DataError
from shared.data.unusable import UnusableRows


def test_so_many_in_a_row_are_one_too_many() -> None:
    rows = UnusableRows(limit=3)
    rows.given_up("train", "sums", "too long")
    rows.given_up("train", "sums", "too long")
    with pytest.raises(DataError, match="data.sums: 3 rows in a row could not be used, the last one: far too long"):
        rows.given_up("train", "sums", "far too long")


def test_a_good_row_of_the_same_purpose_begins_the_count_anew() -> None:
    rows = UnusableRows(limit=2)
    rows.given_up("train", "sums", "bad")
    rows.used("train")
    rows.given_up("train", "sums", "bad")
    rows.used("eval")
    with pytest.raises(DataError):
        rows.given_up("train", "sums", "bad")
