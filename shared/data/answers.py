"""Finds the answer in a completion."""

from __future__ import annotations

OPEN = "<answer>"
CLOSE = "</answer>"


def extract_answer(completion: str) -> str | None:
    """The text of the last complete `<answer>..</answer>`, stripped; None if there is none.

    >>> extract_answer("<think>1+1=2</think><answer> 2 </answer>")
    '2'
    """
    end = completion.rfind(CLOSE)
    start = completion.rfind(OPEN, 0, end) if end >= 0 else -1
    return completion[start + len(OPEN) : end].strip() if start >= 0 else None
