"""What a judged held-out group becomes: a `GroupReport` without arrays, since nothing is trained on it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shared.arrays import Frame
from shared.messages import GroupReport
from shared.rewards.score import Score
from shared.serving.generation import Group


def eval_report(group: Group, scores: Sequence[Score]) -> tuple[GroupReport, list[Frame]]:
    """The report of a group with one raw score a sample, and no frames."""
    samples = group.finished()
    report = GroupReport(
        group=group.grant.group,
        attempt=group.grant.attempt,
        lineage=group.grant.lineage,
        rewards=[scored.total for scored in scores],
        parts={name: [scored.parts[name] for scored in scores] for name in scores[0].parts},
        prompt_length=len(group.prompt),
        lengths=[len(sample.tokens) for sample in samples],
        truncated=[sample.truncated for sample in samples],
        oldest=min(int(sample.versions.min()) for sample in samples),
        newest=max(int(sample.versions.max()) for sample in samples),
        seconds=group.seconds,
        arrays=[],
        judge_seconds=max(0.0, time.monotonic() - group.started - group.seconds),
    )
    return report, []
