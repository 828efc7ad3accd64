"""The reward of one completion: the weighted sum of the recipe's parts, each of which is kept for the metrics.

Called in reward workers, away from the processes that generate and learn: verifiers and users' functions are foreign
code. Invariant: a score that comes out is finite; anything else is a `RewardError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shared.config.schema import PythonPart, RewardPart
from shared.rewards.base import RewardError, Sample
from shared.rewards.build import build_part
from shared.rewards.functions import what_was_raised

MOST_VALUES = 32
"""Numbers that a function may return by name; each becomes a metric."""
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Score:
    """`total` is the weighted sum; `parts` are the unweighted values by the parts' names.

    A part that returned several numbers has its sum under its name, and each number under `name/key`.
    """

    total: float
    parts: dict[str, float]


def weighted(score: Score, weights: Mapping[str, float]) -> Score:
    """The score with its total under other weights (by part, each of which it has); without any, as it is."""
    if not weights:
        return score
    total = 0.0
    for name, weight in weights.items():  # in the recipe's order, as `Scorer` adds them up
        total += weight * score.parts[name]
    return Score(total, score.parts)


class Scorer:
    """The parts of a recipe, ready to judge. RecipeError if one of them cannot be made."""

    def __init__(self, parts: Sequence[RewardPart]) -> None:
        self._parts = [(part, build_part(part)) for part in parts]

    def score(self, sample: Sample, begin: Callable[[str], None] = lambda name: None) -> Score:
        """Judge a sample by every part; `begin` hears the name of each before its turn.

        Raises RewardError, which names the part, and lets MemoryError through: the process may not be fit to go on.
        """
        total = 0.0
        values: dict[str, float] = {}
        for part, function in self._parts:
            begin(part.name)
            try:
                value, named = _numbers(function(sample))
            except MemoryError:
                raise
            except RewardError as error:
                raise RewardError(f"reward part {title(part)}: {error}") from error
            except BaseException as error:  # foreign code may even raise SystemExit
                raise RewardError(f"reward part {title(part)}: {what_was_raised(error)}; {_advice(part)}") from error
            values[part.name] = value
            values.update((f"{part.name}/{key}", each) for key, each in named.items())
            total += part.weight * value
        return Score(total, values)


def title(part: RewardPart) -> str:
    """A part's name for a message, with the function behind it."""
    return f"{part.name!r} ({part.function})" if isinstance(part, PythonPart) else repr(part.name)


def _advice(part: RewardPart) -> str:
    if isinstance(part, PythonPart):
        return "mend the function, or have it return 0.0 for what it cannot judge"
    return "mend the row, or take it out of the data set"


def _numbers(returned: object) -> tuple[float, dict[str, float]]:
    """What a part returned, as its value and the named numbers that make it up."""
    if not isinstance(returned, dict):
        return _number(returned, ""), {}
    if not returned or len(returned) > MOST_VALUES:
        raise RewardError(f"expected a dict of 1 to {MOST_VALUES} numbers, got one of {len(returned)}; return a number")
    for key in returned:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise RewardError(
                f"expected names of letters, digits, '.', '_' and '-', at most 64, got the key {key!r}; rename it"
            )
    named = {key: _number(value, f" under {key!r}") for key, value in returned.items()}
    return math.fsum(named.values()), named


def _number(value: object, where: str) -> float:
    """A finite float; numpy's and torch's scalars are numbers too, and True is 1."""
    number = math.nan
    if not isinstance(value, str | bytes) and hasattr(value, "__float__"):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # an array of several, a whole number too long
            number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"it returned {_short(value)}{where}, expected a finite number; return a float for every completion"
        )
    return number


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
