"""Rows in a row that were of no use: some are given up one by one, too many of them end the run by name.

Who answers leases (policies for SFT, engines for prompts) counts here. Without a limit, a run whose rows are all of no
use would draw new ones for ever.
"""

from __future__ import annotations

from collections import Counter

from shared.data.dataset import DataError

LIMIT = 100


class UnusableRows:
    """Counts by purpose, so that good held-out rows do not hide bad ones of training."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._in_a_row: Counter[str] = Counter()

    def used(self, purpose: str) -> None:
        """A row was good."""
        self._in_a_row[purpose] = 0

    def given_up(self, purpose: str, dataset: str, why: str) -> None:
        """A row was of no use; DataError if it was one too many."""
        self._in_a_row[purpose] += 1
        if self._in_a_row[purpose] >= self._limit:
            raise DataError(
                f"data.{dataset}: {self._in_a_row[purpose]} rows in a row could not be used, the last one: {why}"
            )
