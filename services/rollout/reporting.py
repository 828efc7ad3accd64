"""What a finished, rewarded group becomes: a `GroupReport` with its payload frames.

Called by the rollout service's loop. Invariant: the arrays of a report list the samples in order, each token with the
log-probability and the weight version that it was sampled with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from shared.arrays import Frame, pack
from shared.messages import ArrayHeader, GroupReport
from shared.rewards.score import Score
from shared.serving.generation import Group


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
        parts=_by_name(scores),
        prompt_length=len(group.prompt),
        lengths=[len(sample.tokens) for sample in samples],
        truncated=[sample.truncated for sample in samples],
        oldest=int(versions.min()),
        newest=group.newest(),
        seconds=group.seconds,
        arrays=headers,
        judge_seconds=max(0.0, time.monotonic() - group.started - group.seconds),
    )
    return report, frames


def _by_name(scores: Sequence[Score]) -> dict[str, list[float]]:
    """Each part's unweighted values, one a sample; one that was given for some samples only is 0 in others."""
    names = dict.fromkeys(name for scored in scores for name in scored.parts)
    return {name: [scored.parts.get(name, 0.0) for scored in scores] for name in names}
