"""A run folder as services leave it, made up: for tests of what reads one."""

from __future__ import annotations

import json
from pathlib import Path

RECIPE = """
[model.build]
hidden_size = 32

[data.sums]
kind = "jsonl"
path = "sums.jsonl"

[train]
dataset = "sums"
batches = 40
batch_size = 4
lr = 1e-3

[evaluation.suites.sums]
problems = 100
"""


def line(step: int, *, stage: str = "train", lineage: int = 1, **figures: object) -> dict[str, object]:
    """One line of metrics.jsonl."""
    base: dict[str, object] = {
        "time": 1000.0 + step,
        "lineage": lineage,
        "step": step,
        "version": step,
        "stage": stage,
        "batches": 40,
        "batch": step + 1,
        "step_seconds": 0.5,
        "tokens": 100,
        "tokens_per_s": 100.0,
        "samples_per_s": 16.0,
        "loss": 1.0 / (step + 1),
        "reward": 0.01 * step,
        "staleness_mean": 0.5,
        "staleness_max": 1,
        "response_length": 12.0,
        "response_length_max": 20,
        "truncated": 0.0,
        "time/policy/train": 0.75,
        "time/policy/wait": 0.25,
    }
    return base | figures


def write_lines(folder: Path, lines: list[dict[str, object]]) -> None:
    """Append to metrics.jsonl."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(it) + "\n" for it in lines)


def write_verdict(folder: Path, version: int, correct: int, why: str, stage: str = "train", lineage: int = 1) -> None:
    """One file of eval/."""
    (folder / "eval").mkdir(exist_ok=True)
    share = correct / 100
    verdict = {"suite": "sums", "lineage": lineage, "version": version, "stage": stage, "why": why, "n": 100}
    verdict |= {"correct": correct, "accuracy": share, "interval": [max(0.0, share - 0.1), min(1.0, share + 0.1)]}
    verdict |= {"categories": {}, "seconds": 1.0}
    (folder / "eval" / f"sums-{lineage}-{version}.json").write_text(json.dumps(verdict))


def write_group(folder: Path, group: int, rewards: list[float], *, attempt: int = 1, purpose: str = "train") -> None:
    """One line of samples/rollout-0.jsonl."""
    (folder / "samples").mkdir(exist_ok=True)
    count = len(rewards)
    record = {"time": "2026-01-01T00:00:00Z", "group": group, "attempt": attempt, "purpose": purpose, "lineage": 1}
    record |= {"versions": [0, 1], "dataset": "sums", "row": group, "prompt": f"<ask>{group}+1"}
    record |= {"question": f"{group}+1", "answer": str(group + 1)}
    record |= {"completions": [f"answer {group}.{i} of attempt {attempt}" for i in range(count)], "rewards": rewards}
    record |= {"parts": [{"exact": r} for r in rewards], "lengths": [5] * count, "truncated": [False] * count}
    with (folder / "samples" / "rollout-0.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def make_run(folder: Path) -> Path:
    """A whole short run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(RECIPE)
    write_lines(folder, [line(step) for step in range(40)])
    write_verdict(folder, 0, 20, "first")
    write_verdict(folder, 40, 70, "last", "closing")
    for group in range(1, 9):
        write_group(folder, group, [0.0, 1.0, 0.5, group / 10])
    return folder
