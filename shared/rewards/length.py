"""Length shaping."""

from __future__ import annotations

from shared.rewards.base import Sample


def overlong(sample: Sample, max_length: int, cache_length: int) -> float:
    """Soft overlong punishment, from 0 to -1; DAPO, Yu et al., arXiv 2503.14476, eq. 13.

    R(y) = 0                                            where |y| <= L_max - L_cache
         = ((L_max - L_cache) - |y|) / L_cache          where L_max - L_cache < |y| <= L_max
         = -1                                           where L_max < |y|
    """
    over = sample.tokens - (max_length - cache_length)
    return -min(1.0, over / cache_length) if over > 0 else 0.0
