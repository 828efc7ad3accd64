"""Multiple choice: which option does a completion choose?"""

from __future__ import annotations

import re
from functools import lru_cache

from shared.data.answers import extract_answer
from shared.rewards.base import RewardError, Sample
from shared.rewards.boxed import last_boxed

LETTERS = "ABCDEFGHIJ"
_THOUGHT_END = "</think>"


def choice(sample: Sample, options: int) -> float:
    """1 if the completion chooses the option of the row's reference answer ("B", "(B)", "B. Lima"); else 0."""
    wanted = chosen(sample.reference, options)
    if wanted is None:
        raise RewardError(
            f"expected a reference answer that names an option from A to {LETTERS[options - 1]}, got "
            f"{sample.reference!r}; mend the row, or set `options`"
        )
    return float(chosen(sample.completion, options) == wanted)


def chosen(completion: str, options: int = len(LETTERS)) -> str | None:
    r"""The letter that a completion chooses, of the first `options`; None if it chooses none, or several.

    Looked for inside `<answer>`, then in the last `\boxed{..}`, then in what follows the thoughts. There, in this
    order: nothing but a letter; the last "answer is B"; "B. Lima" or "(B) Lima"; the only letter that stands alone.

    >>> chosen("Lima is in Peru. The answer is (B).")
    'B'
    """
    text = extract_answer(completion)
    if text is None:
        text = last_boxed(completion)
    if text is None:
        text = completion.rpartition(_THOUGHT_END)[2]
    alone, said, leading, standing = _patterns(LETTERS[:options])
    if match := alone.fullmatch(text):
        return match[1].upper()
    if found := said.findall(text):
        return found[-1]
    if match := leading.fullmatch(text.strip()):
        return match[1]
    letters = set(standing.findall(text))
    return letters.pop() if len(letters) == 1 else None


@lru_cache
def _patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    either = letters + letters.lower()
    word = r"(?i:\banswer\s*(?:is\b|:|=)?|\b(?:option|choice)\s*(?:is\b|:|=))\s*(?i:(?:option|choice|letter)\b)?"
    return (
        re.compile(rf"(?:\\text\w*)?[\W_]*([{either}])[\W_]*"),
        re.compile(rf"{word}[\s:*_(\"'\[]*([{letters}])\b(?!')"),
        re.compile(rf"[*_]*[(\[]?([{letters}])[)\].:][*_]*\s.+"),
        # "A number" and "I think" are words, not options; "A or B" are
        re.compile(rf"(?<![\w'])(?![AI]\s+(?!(?:or|and|is)\b)[a-z])([{letters}])\b(?!')"),
    )
