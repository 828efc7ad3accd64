"""Advantages of a prompt group and the equal-reward filter: pure functions of rewards.

Sources: GRPO, Shao et al., DeepSeekMath, arXiv 2402.03300, eq. 21 (group-normalised outcome rewards); Dr.GRPO, Liu et
al., arXiv 2503.20783 (no division by the standard deviation, which favours easy and hard questions); dynamic sampling,
Yu et al., DAPO, arXiv 2503.14476 (groups whose rewards are all equal carry no gradient and are replaced).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

EPSILON = 1e-6
"""Added to the standard deviation so that an all-but-equal group doesn't explode."""


def group_advantages(rewards: Sequence[float], kind: Literal["group_norm", "unbiased"]) -> list[float]:
    """Advantage of each sample: r_i - mean(r), for `group_norm` divided by std(r) + EPSILON (population std)."""
    mean = math.fsum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if kind == "unbiased":
        return centred
    deviation = math.sqrt(math.fsum(value * value for value in centred) / len(centred))
    return [value / (deviation + EPSILON) for value in centred]


def all_equal(rewards: Sequence[float]) -> bool:
    """True when no sample did better than another, so that every advantage is zero."""
    return max(rewards) - min(rewards) < EPSILON
