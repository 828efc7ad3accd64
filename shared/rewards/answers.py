"""Parts that compare the text inside `<answer>`, and the part that wants it to be there."""

from __future__ import annotations

import re

from shared.data.answers import extract_answer
from shared.rewards.base import Sample

_FORM = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def verifier(sample: Sample) -> float:
    """The data set's own judgement of the text inside `<answer>`, 0 to 1; 0 without an answer."""
    answer = extract_answer(sample.completion)
    return 0.0 if answer is None else sample.judge.score(sample.row, answer)


def exact(sample: Sample) -> float:
    """1 if the text inside `<answer>` equals the row's reference answer, white space at the ends aside; else 0."""
    return float(extract_answer(sample.completion) == sample.reference)


def format_(sample: Sample) -> float:
    """1 if the completion is `<think>..</think><answer>..</answer>`, each tag once, nothing around them; else 0."""
    completion = sample.completion
    return float(_FORM.fullmatch(completion) is not None and all(completion.count(tag) == 1 for tag in _TAGS))
