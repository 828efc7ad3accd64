"""Completions as a person reads them: their text, and a line for each group in the run folder.

Called by the loop of an `EngineService`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from shared.rewards.score import Score
from shared.serving.generation import Group
from shared.telemetry import LineFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def completion_text(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, truncated: bool) -> str:
    """The text of a sample, without the stop token that ended it."""
    words = tokens if truncated else tokens[:-1]
    return str(tokenizer.decode(words.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


MOST_BYTES = 64 << 20
"""A replica's samples are moved to `<replica>.old.jsonl` at this size: a long run keeps twice as much at most."""


class SampleLog:
    """`samples/<replica>.jsonl` in the run folder: one line a group, written whole or not at all; bounded in size."""

    def __init__(self, run_folder: Path, replica: str, most_bytes: int = MOST_BYTES) -> None:
        self._path = run_folder / "samples" / f"{replica}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._most_bytes = most_bytes
        self._file = LineFile(self._path)
        self._bytes = self._path.stat().st_size

    def write(self, group: Group, prompt: str, completions: Sequence[str], scores: Sequence[Score]) -> None:
        """Append the group. A full disk costs lines, not the run."""
        grant, samples = group.grant, group.finished()
        versions = [sample.versions for sample in samples]
        self._append(
            msgspec.json.encode(
                {
                    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "group": grant.group,
                    "attempt": grant.attempt,
                    "purpose": grant.purpose,
                    "lineage": grant.lineage,
                    "versions": [int(min(v.min() for v in versions)), int(max(v.max() for v in versions))],
                    "dataset": grant.dataset,
                    "row": grant.row,
                    "prompt": prompt,
                    "question": group.question,
                    "answer": group.answer,
                    "completions": list(completions),
                    "rewards": [scored.total for scored in scores],
                    "parts": [scored.parts for scored in scores],
                    "lengths": [len(sample.tokens) for sample in samples],
                    "truncated": [sample.truncated for sample in samples],
                }
            )
        )

    def _append(self, line: bytes) -> None:
        if self._bytes and self._bytes + len(line) >= self._most_bytes:
            self._file.close()
            self._path.replace(self._path.with_suffix(".old.jsonl"))
            self._file, self._bytes = LineFile(self._path), 0
        self._file.write(line)
        self._bytes += len(line) + 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()
