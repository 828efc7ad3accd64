r"""Boxed mathematics, compared by the package math-verify (the extra `math`).

Only LaTeX inside `\boxed{..}` is parsed: math-verify's plain expressions go through Python's eval.
"""

from __future__ import annotations

import logging
from typing import Any

from shared.config.load import RecipeError
from shared.rewards.base import PartFunction, RewardError, Sample
from shared.rewards.boxed import last_boxed


def load_math() -> PartFunction:
    r"""The part: 1 if the last `\boxed{..}` equals the reference answer (boxed or bare) as mathematics; else 0.

    Raises RecipeError where math-verify is not installed.
    """
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise RecipeError(
            f'rewards.parts: kind "math" needs the package {error.name}, which is not installed here: '
            "pip install 'orrery[math]'"
        ) from error
    # its own limits work by signals and are off: it warns of that each time; workers have a limit of their own
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    extraction = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

    def parsed(latex: str) -> list[Any]:
        return math_verify.parse(rf"\boxed{{{latex}}}", extraction_config=extraction, parsing_timeout=None)

    def boxed_math(sample: Sample) -> float:
        reference = last_boxed(sample.reference) or sample.reference
        wanted = parsed(reference)
        if not wanted:
            raise RewardError(f"expected a reference answer that is LaTeX, got {reference!r}; mend the row")
        answer = last_boxed(sample.completion)
        found = parsed(answer) if answer else []
        return float(bool(found) and math_verify.verify(wanted, found, timeout_seconds=None))

    return boxed_math
