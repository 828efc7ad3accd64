"""The answers that a run sampled, as rollouts keep them in `samples/*.jsonl`; which of them a step trained on.

An attempt that was lost on its way may be there beside the one that counted: of each group the newest attempt is taken,
and where a step is asked for, exactly the attempt that it trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.records import read_journal


@dataclass(frozen=True)
class Sample:
    """One completion of a prompt group: `prompt` is all that the model read, `question` what the row asks.

    `answer` is the row's reference answer ("" if it has none), `mean` the group's mean reward.
    """

    group: int
    attempt: int
    purpose: str
    lineage: int
    versions: tuple[int, int]
    dataset: str
    row: int
    prompt: str
    question: str
    answer: str
    completion: str
    reward: float
    parts: dict[str, float]
    length: int
    truncated: bool
    mean: float


def read_samples(run_folder: Path) -> dict[tuple[int, int], list[Sample]]:
    """(group, attempt) -> its samples, in the order written; a line cut short is passed over."""
    found: dict[tuple[int, int], list[Sample]] = {}
    for path in sorted((run_folder / "samples").glob("*.jsonl")):
        with path.open("rb") as file:
            for text in file:
                try:
                    found_here = list(_samples_of(json.loads(text)))
                except (ValueError, KeyError, TypeError, IndexError):
                    continue
                if found_here:
                    found[found_here[0].group, found_here[0].attempt] = found_here
    return found


def trained_on(run_folder: Path, step: int) -> list[tuple[int, int]]:
    """(group, attempt) of what step `step` trained on, in its newest lineage, from the journal; [] for no such step."""
    assigned: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    chosen: list[tuple[int, int]] = []
    for _, record in read_journal(run_folder):
        for fact in record["facts"]:
            if fact["type"] == "assigned" and fact["step"] == step:
                key = fact["lineage"], fact["step"], fact["attempt"]
                groups = [(group["group"], group["attempt"]) for group in fact["message"]["groups"]]
                assigned[key] = assigned.get(key, []) + groups
            elif fact["type"] == "committed" and fact["step"] == step:
                chosen = assigned[fact["lineage"], fact["step"], fact["attempt"]]
    return chosen


def newest(samples: dict[tuple[int, int], list[Sample]], purpose: str) -> list[Sample]:
    """All samples of a purpose, only the newest attempt of each group, in the order of groups."""
    attempts: dict[int, int] = {}
    for group, attempt in samples:
        attempts[group] = max(attempt, attempts.get(group, 0))
    return [
        sample
        for (group, attempt), of_group in sorted(samples.items())
        if attempt == attempts[group]
        for sample in of_group
        if sample.purpose == purpose
    ]


def _samples_of(line: dict[str, Any]) -> Iterator[Sample]:
    rewards = [float(reward) for reward in line["rewards"]]
    for index, reward in enumerate(rewards):
        yield Sample(
            group=line["group"],
            attempt=line["attempt"],
            purpose=line["purpose"],
            lineage=line["lineage"],
            versions=(line["versions"][0], line["versions"][1]),
            dataset=line["dataset"],
            row=line["row"],
            prompt=line["prompt"],
            question=line["question"],
            answer=line["answer"],
            completion=line["completions"][index],
            reward=reward,
            parts=line["parts"][index],
            length=line["lengths"][index],
            truncated=line["truncated"][index],
            mean=sum(rewards) / len(rewards),
        )
