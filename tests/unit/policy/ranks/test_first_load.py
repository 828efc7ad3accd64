"""Ranks that load a model from its files: each reads and holds its own part, with the values of the whole model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.parallel_table.families import tiny

SCRIPT = str(Path(__file__).with_name("loading_ranks.py"))


def loaded(tools: Any, folder: Path, layout: dict[str, int]) -> list[dict[str, Any]]:
    """What each rank told."""
    recipe = tools.recipe(policy__parallel=layout).model_dump(exclude_none=True)
    recipe["model"] = {"path": str(folder / "model"), "dtype": "float32"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, SCRIPT, str(folder)], input=json.dumps(recipe).encode(), env=environment, check=True,
        timeout=120,
    )  # fmt: skip
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9].json"))]


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2", {"pp": 2, "tp": 2}),
        ("qwen3", {"tp": 2, "fsdp": 2}),
        ("qwen3_moe", {"pp": 2, "ep": 2}),
        ("qwen3_moe", {"tp": 2, "fsdp": 2}),
        ("qwen2_5_vl", {"fsdp": 2, "tp": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(f"{axis}{size}" for axis, size in value.items()),
)
def test_each_rank_has_its_part_of_what_transformers_loads_to_the_bit(
    tools: Any, tmp_path: Path, family: str, layout: dict[str, int]
) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    told = loaded(tools, tmp_path, layout)
    assert len(told) == 4
    assert all(rank["differ"] == [] and rank["buffers"] for rank in told)
    names = {name for name, _ in model.named_parameters()}
    assert {name for rank in told for name in rank["names"]} == names


@pytest.mark.parametrize(
    ("layout", "share"), [({"fsdp": 4}, 0.25), ({"tp": 2}, 0.5)], ids=lambda value: str(value).replace(" ", "")
)
def test_a_rank_reads_and_takes_memory_for_its_share_alone(
    tools: Any, tmp_path: Path, layout: dict[str, int], share: float
) -> None:
    sizes = {"num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8000}
    config = Qwen2Config(**sizes, hidden_size=256, intermediate_size=1024, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="20MB")
    for rank in loaded(tools, tmp_path, layout):
        assert rank["differ"] == []
        assert rank["read"] == rank["holds"] == pytest.approx(share * rank["whole"], rel=0.01)
        assert rank["took"] < (share + 0.15) * rank["whole"], rank
