r"""Finds the last `\boxed{..}` of a completion, where models of mathematics put their answer."""

from __future__ import annotations

import re

_OPEN = re.compile(r"\\boxed\s*\{")


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{..}` holds, stripped; None if there is none.

    >>> last_boxed(r"first \boxed{1}, so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    for opening in reversed(list(_OPEN.finditer(text))):
        depth, start = 1, opening.end()
        for place in range(start, len(text)):
            if text[place - 1] == "\\":
                continue  # \{ and \} are braces of a set
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[start:place].strip()
    return None
