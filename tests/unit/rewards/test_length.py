"""Length shaping, by the formula's own numbers."""

from __future__ import annotations

import pytest

from tests.unit.rewards.judge import worth


@pytest.mark.parametrize(
    ("tokens", "value"),
    [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0), (5000, -1.0)],
)
def test_punishment_falls_over_the_cache_from_nothing_to_minus_one(tokens: int, value: float) -> None:
    part = {"kind": "length", "max_length": 100, "cache_length": 20}
    assert worth(part, "", tokens=tokens) == pytest.approx(value)
