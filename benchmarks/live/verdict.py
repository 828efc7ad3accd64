"""Whether a run came through: all steps done, books clean, policies equal; and what speaks against each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.live.goodput import newest, read_metrics
from benchmarks.live.timeline import Timeline
from services.controller.audit import audit_run
from shared.config import Recipe, load_recipe


@dataclass(frozen=True)
class Verdict:
    """`faults` is empty when the run came through; `audit` is the audit's table.

    `steps` counts by stage, `trained` the prompt groups that training consumed, each once however often a rollback had
    them trained. The policies' states were compared at `comparisons` checkpoints, up to `compared` of them at once;
    `digest` is the last one's.
    """

    steps: dict[str, int]
    trained: int
    rollbacks: int
    terms: int
    comparisons: int
    compared: int
    digest: str
    faults: list[str]
    audit: list[str]


def judge(folder: Path, timeline: Timeline) -> Verdict:
    """Look at what the run in `folder` left. JournalDamaged if its journal cannot be read."""
    recipe = load_recipe(folder / "config.toml")
    audit = audit_run(folder)
    steps = newest(read_metrics(folder))
    counts = Counter(line["stage"] for line in steps)
    comparisons = timeline.of("compared")
    last = comparisons[-1].fact if comparisons else {"digests": {}}
    faults = [*audit.faults[:5]]
    if audit.outcome != "complete":
        faults.append(f"the run is {audit.outcome}, not complete")
    faults += missing_steps(recipe, steps)
    faults += unequal_policies(timeline, recipe.policy.replicas, len(steps))
    return Verdict(
        steps=dict(counts),
        trained=len({group for moment in timeline.of("consumed") for group in moment.fact["groups"]}),
        rollbacks=len(audit.rollbacks),
        terms=audit.terms,
        comparisons=len(comparisons),
        compared=max((len(moment.fact["digests"]) for moment in comparisons), default=0),
        digest=next(iter(sorted(set(last["digests"].values()))), ""),
        faults=faults,
        audit=audit.lines(),
    )


def missing_steps(recipe: Recipe, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """What speaks against all steps being done. A stop rule may end SFT early; RL does all its batches."""
    faults = []
    numbers = [line["step"] for line in steps]
    if numbers != list(range(len(numbers))):
        faults.append("metrics.jsonl lacks steps")
    counts = Counter(line["stage"] for line in steps)
    if recipe.train is not None:
        wanted = recipe.train.batches * recipe.train.mu * recipe.train.minibatches
        if counts["train"] != wanted:
            faults.append(f"stage train did {counts['train']} steps of {wanted}")
    if recipe.sft is not None and recipe.sft.stop is None and counts["sft"] != recipe.sft.batches:
        faults.append(f"stage sft did {counts['sft']} steps of {recipe.sft.batches}")
    return faults


def unequal_policies(timeline: Timeline, replicas: int, steps: int) -> list[str]:
    """What speaks against the policies being equal at each checkpoint, and all of them at the end, after `steps`."""
    comparisons = [moment.fact for moment in timeline.of("compared")]
    faults = [
        f"at step {fact['step']} these policies were not equal to the others: {', '.join(fact['different'])}"
        for fact in comparisons
        if fact["different"]
    ]
    last = max((len(fact["digests"]) for fact in comparisons if fact["step"] == steps), default=1)
    if last < replicas:
        faults.append(f"expected {replicas} policies to be compared after the last step, got {last}")
    return faults
