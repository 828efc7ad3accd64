"""What a finished, rewarded group becomes: a `GroupReport` with its payload frames, and a line for a person to read.

Called by the rollout service's loop. Invariant: the arrays of a report list the samples in order, each token with the
log-probability and the weight version that it was sampled with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from services.rollout.generation import Group
from shared.arrays import Frame, pack
from shared.messages import ArrayHeader, GroupReport
from shared.rewards.score import Score
from shared.telemetry import LineFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def group_report(group: Group, scores: Sequence[Score]) -> tuple[GroupReport, list[Frame]]:
    """The report of a group and the frames behind it; an eval group has no frames."""
    samples = group.finished()
    versions = np.concatenate([sample.versions for sample in samples])
    headers: list[ArrayHeader] = []
    frames: list[Frame] = []
    if group.grant.purpose != "eval":
        headers, frames = pack(
            {
                "prompt": np.asarray(group.prompt, dtype=np.int32),
                "tokens": np.concatenate([sample.tokens for sample in samples]),
                "logprobs": np.concatenate([sample.logprobs for sample in samples]),
                "versions": versions,
            }
        )
    report = GroupReport(
        group=group.grant.group,
        attempt=group.grant.attempt,
        lineage=group.grant.lineage,
        rewards=[scored.total for scored in scores],
        parts={kind: [scored.parts[kind] for scored in scores] for kind in scores[0].parts},
        prompt_length=len(group.prompt),
        lengths=[len(sample.tokens) for sample in samples],
        truncated=[sample.truncated for sample in samples],
        oldest=int(versions.min()),
        newest=int(versions.max()),
        seconds=group.seconds,
        arrays=headers,
    )
    return report, frames


def completion_text(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, truncated: bool) -> str:
    """The text of a sample, without the stop token that ended it."""
    words = tokens if truncated else tokens[:-1]
    return str(tokenizer.decode(words.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class SampleLog:
    """`samples/<replica>.jsonl` in the run folder: one line a group, written whole or not at all."""

    def __init__(self, run_folder: Path, replica: str) -> None:
        path = run_folder / "samples" / f"{replica}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = LineFile(path)

    def write(self, group: Group, prompt: str, completions: Sequence[str], scores: Sequence[Score]) -> None:
        """Append the group. A full disk costs lines, not the run."""
        grant, samples = group.grant, group.finished()
        versions = [sample.versions for sample in samples]
        self._file.write(
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
                    "completions": list(completions),
                    "rewards": [scored.total for scored in scores],
                    "parts": [scored.parts for scored in scores],
                    "lengths": [len(sample.tokens) for sample in samples],
                    "truncated": [sample.truncated for sample in samples],
                }
            )
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()
