"""A series of numbers as one line of block characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int, *, low: float | None = None, high: float | None = None) -> str:
    """At most `width` characters for the whole series: each is the mean of an equal share of the values.

    The scale runs from the smallest value to the largest, unless `low` or `high` fix it; values that are not finite are
    left out. A flat series is a line in the middle, or on the ground if `low` fixes that.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    count = min(width, len(finite))
    edges = [index * len(finite) // count for index in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    bottom = min(means) if low is None else low
    top = max(means) if high is None else high
    if top <= bottom:
        return _BARS[0 if low is not None else 3] * count
    top_bar = len(_BARS) - 1
    return "".join(_BARS[round(top_bar * min(1.0, max(0.0, (mean - bottom) / (top - bottom))))] for mean in means)
