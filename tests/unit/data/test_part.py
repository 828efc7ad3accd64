"""Parts of a data set: what keeps held-out questions unseen."""

from __future__ import annotations

import pytest

from shared.config.schema import DataTable
from shared.data import open_dataset
from shared.data.dataset import DataError, Dataset

OPTIONS = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}


def part(low: float, high: float, seed: int = 0, size: int = 400) -> Dataset:
    table = DataTable(
        kind="reasoning_gym", task="chain_sum", size=size, seed=seed, options=dict(OPTIONS), part=[low, high]
    )
    return open_dataset("some", table)


def questions(dataset: Dataset) -> set[str]:
    return {dataset.row(index).messages[-1]["content"] for index in range(len(dataset))}


def test_disjoint_parts_share_no_question_even_of_a_small_space_and_other_seeds() -> None:
    assert questions(part(0.0, 0.8, seed=1)) & questions(part(0.0, 1.0, seed=2))
    assert not questions(part(0.0, 0.8, seed=1)) & questions(part(0.8, 1.0, seed=2))


def test_parts_together_hold_every_row_once() -> None:
    assert len(part(0.0, 0.3)) + len(part(0.3, 1.0)) == 400


def test_a_row_is_judged_by_its_own_answer() -> None:
    dataset = part(0.5, 0.7)
    row = dataset.row(len(dataset) - 1)
    assert dataset.score(row.index, row.answer) == 1.0
    assert dataset.score(row.index, str(int(row.answer) + 1)) < 1.0


def test_two_parts_have_two_fingerprints() -> None:
    assert part(0.0, 0.5).identity.fingerprint != part(0.0, 0.6).identity.fingerprint


def test_a_part_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="widen `part`"):
        part(0.0, 1e-9, size=3)
