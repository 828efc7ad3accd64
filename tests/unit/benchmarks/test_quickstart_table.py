"""The table's statistics: gains over the same problems, and their bounds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.quickstart_table import Z95, answers, paired_gain, unpaired_gain
from deploy.readers.evaluations import Evaluation


def verdict(correct: int, n: int = 100, version: int = 5) -> Evaluation:
    return Evaluation("heldout", 1, version, "train", n, correct, 0.0, 1.0, "last")


def test_a_paired_gain_is_that_of_the_differences_computed_one_by_one() -> None:
    before = {row: row % 3 == 0 for row in range(300)}
    after = {row: row % 3 == 0 or row % 5 == 0 for row in range(300)} | {0: False}
    differences = [int(after[row]) - int(before[row]) for row in range(300)]
    mean = sum(differences) / 300
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 300)
    assert paired_gain(before, after) == pytest.approx((mean, mean - Z95 * deviation / math.sqrt(300)))


def test_pairing_tightens_the_bound_where_the_same_problems_stay_right() -> None:
    before = {row: row < 40 for row in range(100)}
    after = {row: row < 60 for row in range(100)}
    gain, low = paired_gain(before, after)
    assert gain == pytest.approx(0.2)
    assert low > unpaired_gain(verdict(40), verdict(60))[1]


def test_verdicts_on_different_problems_are_not_paired() -> None:
    with pytest.raises(ValueError, match="expected two verdicts on the same problems, got 2 and 1, 1 of them in both"):
        paired_gain({0: True, 1: False}, {0: True})


def test_answers_are_those_of_the_judged_version_only(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    common = {"purpose": "eval", "dataset": "heldout", "lineage": 1, "versions": [5, 5], "rewards": [1.0]}
    lines = [
        {**common, "row": 0},
        {**common, "row": 1, "rewards": [0.01]},
        {**common, "row": 2, "versions": [4, 4]},
        {**common, "row": 3, "purpose": "train"},
        {**common, "row": 4, "lineage": 2},
    ]
    (tmp_path / "samples" / "rollout-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert answers(tmp_path, verdict(1), "heldout", 1.0) == {0: True, 1: False}
