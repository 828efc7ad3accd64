"""Makes the function of a part from its table in the recipe."""

from __future__ import annotations

from functools import partial

from shared.config.schema import (
    ChoicePart,
    ExactPart,
    FormatPart,
    LengthPart,
    MathPart,
    NumberPart,
    PythonPart,
    RewardPart,
    VerifierPart,
)
from shared.rewards.answers import exact, format_, verifier
from shared.rewards.base import PartFunction
from shared.rewards.choice import choice
from shared.rewards.functions import load_function
from shared.rewards.length import overlong
from shared.rewards.mathematics import load_math
from shared.rewards.number import number


def build_part(part: RewardPart) -> PartFunction:
    """The function behind a part. RecipeError if it needs what is not here: a package, a module of the user's."""
    match part:
        case VerifierPart():
            return verifier
        case ExactPart():
            return exact
        case FormatPart():
            return format_
        case ChoicePart():
            return partial(choice, options=part.options)
        case MathPart():
            return load_math()
        case NumberPart():
            return partial(number, tolerance=part.tolerance)
        case LengthPart():
            return partial(overlong, max_length=part.max_length, cache_length=part.cache_length)
        case PythonPart():
            return load_function(part)
