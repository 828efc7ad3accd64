"""Worked answers that SFT learns, written from a reasoning-gym row's metadata.

A task without an entry in `TRACES` has no worked answers: it serves RL and evaluation, and SFT on it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def worked_answer(task: str, entry: dict[str, Any]) -> str | None:
    """`<think>steps</think><answer>..</answer>` for a row of `task`, or None where no steps can be written."""
    steps = TRACES.get(task)
    return None if steps is None else f"<think>{steps(entry)}</think><answer>{entry['answer']}</answer>"


def _chain_sum(entry: dict[str, Any]) -> str:
    """Partial sums from the left: "4 + 3 - 9" -> "4+3=7;7-9=-2"."""
    first, *rest = entry["metadata"]["expression"].split(" ")
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{before}{sign}{term}={total}")
    return ";".join(steps) or first


TRACES: dict[str, Callable[[dict[str, Any]], str]] = {"chain_sum": _chain_sum}
