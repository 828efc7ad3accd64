"""Intervals of shares, for whoever tells an accuracy."""

from __future__ import annotations

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(correct: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927): lower and upper bound.

    `correct` may be a sum of shares, where a row was sampled several times: n counts rows, whose shares spread no more
    than single answers do, so the interval is then a little too wide and never too narrow.
    """
    share, z2 = correct / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    spread = Z95 / (1 + z2 / n) * (share * (1 - share) / n + z2 / (4 * n * n)) ** 0.5
    return max(0.0, centre - spread), min(1.0, centre + spread)
