"""The samples that a replica keeps for a person: whole lines, bounded in size."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from shared.serving.samples import SampleLog


def write(log: SampleLog, number: int) -> None:
    grant = SimpleNamespace(group=number, attempt=1, purpose="train", lineage=1, dataset="sums", row=0)
    sample = SimpleNamespace(tokens=np.zeros(3), versions=np.array([1, 2, 2]), truncated=False)
    score = SimpleNamespace(total=1.0, parts={"exact": 1.0})
    group = SimpleNamespace(grant=grant, finished=lambda: [sample], question="1+1", answer="2")
    log.write(group, "<ask>1+1", ["answer"], [score])  # type: ignore[arg-type,list-item]


def groups(path: Path) -> list[int]:
    return [json.loads(line)["group"] for line in path.read_text().splitlines()]


def test_a_group_is_one_line_with_its_versions(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, "rollout-0")
    write(log, 7)
    log.close()
    line = json.loads((tmp_path / "samples" / "rollout-0.jsonl").read_text())
    assert (line["group"], line["versions"], line["rewards"]) == (7, [1, 2], [1.0])
    assert (line["prompt"], line["question"], line["answer"]) == ("<ask>1+1", "1+1", "2")
    assert line["completions"] == ["answer"]


def test_a_full_file_is_set_aside_and_the_one_before_it_dropped(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, "rollout-0", most_bytes=700)
    for number in range(9):
        write(log, number)
    log.close()
    folder = tmp_path / "samples"
    kept = [*groups(folder / "rollout-0.old.jsonl"), *groups(folder / "rollout-0.jsonl")]
    assert kept == list(range(9 - len(kept), 9))
    assert all(path.stat().st_size <= 700 for path in folder.iterdir())
    assert {path.name for path in folder.iterdir()} == {"rollout-0.old.jsonl", "rollout-0.jsonl"}


def test_a_restarted_replica_goes_on_in_its_file(tmp_path: Path) -> None:
    for number in range(2):
        log = SampleLog(tmp_path, "rollout-0")
        write(log, number)
        log.close()
    assert groups(tmp_path / "samples" / "rollout-0.jsonl") == [0, 1]
